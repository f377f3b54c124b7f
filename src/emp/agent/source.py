"""The source's end of a migration: carries out what ``emp.migration.source`` decides.

It guarantees: at the end the EVM runs here as before, or it was given away and nothing of it is left here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from emp.agent.assembly import Assembly
from emp.agent.connections import Teller
from emp.agent.forwarding import Forwarder
from emp.agent.journal import Journal, Standing
from emp.agent.links import Message, PeerLink, measure_clock
from emp.agent.relays import Relays
from emp.agent.role import Role
from emp.agent.tunnel import DialFrames
from emp.agent.watchdog import Watchdog
from emp.hypervisor.base import (
    Machine,
    MachineEvent,
    MachineEventKind,
    MachineGone,
    RunState,
    StreamInfo,
    StreamLimits,
    StreamStatus,
)
from emp.migration import events
from emp.migration.convergence import forecast, switchover_limit_ms
from emp.migration.events import Action, Ordered, Stream, StreamMoved, Timer
from emp.migration.source import step
from emp.migration.states import Source, SourcePhase
from emp.model.errors import EmpError, OutcomeUnknown
from emp.model.migration import Policy, Progress
from emp.model.orders import HandoverOrder
from emp.model.orders import Role as RoleName
from emp.wire.link import Link

log = logging.getLogger(__name__)

_PROGRESS_S = 0.2
_RESUME_S = 10.0
_PATIENCE_S = 2.0
"""by which the watchdog is ahead of the core's own timer: it has the figures"""
_REDIAL_S = 0.5
_ENDED = (RunState.SHUTDOWN, RunState.GUEST_PANICKED)

Dial = Callable[[], Awaitable[tuple[Link, Standing]]]


class SourceRole(Role[Source]):
    name = RoleName.SOURCE

    def __init__(
        self,
        state: Source,
        order: HandoverOrder | None,
        *,
        journal: Journal,
        assembly: Assembly | None,
        dial: Dial,
        dial_frames: DialFrames | None,
        qemu_name: Callable[[str], str],
        claim: Callable[[], None],
        distrust: Callable[[str], None],
        relays: Relays,
        on_end: Callable[[SourceRole], Awaitable[None]],
    ) -> None:
        policy = order.policy if order else Policy()
        deadlines_s = {
            Timer.DEADLINE: policy.deadline_s + _PATIENCE_S,
            Timer.BLACKOUT: policy.blackout_deadline_s,
        }
        super().__init__(state, self._watched_step, journal, deadlines_s)
        self.order = order
        self.assembly = assembly
        self._dial = dial
        self._qemu_name = qemu_name
        self._claim = claim
        self._distrust = distrust
        self._relays = relays
        self._on_end = on_end
        self._telling: asyncio.Task[None] | None = None
        self._watchdog = Watchdog(policy, self._ask_target)
        self._peer = PeerLink(self.feed, journal, self._watchdog.told)
        self._forwarder = self._new_forwarder(policy, dial_frames)
        self._connections = Teller(assembly.addresses, self._peer.send) if assembly is not None else None
        self._tracking: asyncio.Task[None] | None = None
        self._max_blackout_ms = policy.max_blackout_ms
        self._limit_ms = policy.max_blackout_ms

    @property
    def machine(self) -> Machine:
        assert self.assembly is not None
        return self.assembly.machine

    def _new_forwarder(self, policy: Policy, dial: DialFrames | None) -> Forwarder | None:
        if self.assembly is None or dial is None:
            return None
        is_told = any(port.is_told for port in self.assembly.ports)
        return Forwarder(
            self.state.migration,
            self.assembly.ports,
            [self.assembly.addresses.macs(nic) for nic in range(len(self.assembly.ports))],
            dial,
            quiet_s=policy.forward_quiet_s,
            most_s=policy.forward_reassign_most_s if is_told else policy.forward_most_s,
        )

    # -- beginning

    async def start(self) -> None:
        """Open the link, measure its clocks, then begin. Raises ``Unreachable`` if the target's agent is not there."""
        link, standing = await self._dial()
        try:
            offset_ms, error_ms = await measure_clock(link)
            if self._forwarder is not None:
                await self._forwarder.connect()
        except BaseException:
            link.abort()
            raise
        link.dead_after_s = self._watchdog.policy.target_silence_s
        self.measured(clock_offset_ms=offset_ms, clock_error_ms=error_ms)
        self._peer.attach(link, standing)
        self.spawn(self._peer.pump(link))
        self._listen()
        self._telling = self.spawn(self._tell_addresses())
        self.begin(Ordered())

    def resume(self, event: events.Event) -> None:
        """Go on after a restart of the agent: the state was made from the journal."""
        self._listen()
        self.spawn(self._keep_link())
        self._telling = self.spawn(self._tell_addresses())
        self.begin(event)

    def _listen(self) -> None:
        if self.assembly is None:
            self.feed(events.MachineGone())
        else:
            self.spawn(self._follow_machine(self.machine.events()))

    async def _keep_link(self) -> None:
        """Dial the target again while there is something left to say."""
        while not self.phase.final:
            if not self._peer.up:
                try:
                    link, standing = await self._dial()
                except EmpError as error:
                    log.info("%s: no link to the target: %s", self.state.migration, error)
                else:
                    if self._peer.attach(link, standing):
                        self.spawn(self._peer.pump(link))
                        await self._speak()
            await asyncio.sleep(_REDIAL_S)

    async def serve(self, link: Link, standing: Standing) -> None:
        """Use ``link``, which the target has opened, until it ends."""
        if self._peer.attach(link, standing):
            await self._speak()
            await self._peer.pump(link)

    async def _tell_addresses(self) -> None:
        """What the EVM learns to use before the switchover may be used on the target too."""
        while self.assembly is not None and not self.state.committed:
            changed = self.assembly.addresses.changed
            seen = changed.version
            await self._send_addresses()
            await changed.beyond(seen)

    async def _send_addresses(self) -> None:
        if self.assembly is not None:
            learnt = [one.model_dump() for one in self.assembly.addresses.learnt]
            await self._peer.send({"type": "addresses", "learnt": learnt})

    async def _tell_connections(self) -> None:
        """The guest has stopped: what has changed since the last look."""
        if self._tracking is not None:
            self._tracking.cancel()
        if self._connections is not None:
            await self._connections.tell()
            self.measured(connections_carried=self._connections.count)

    async def _send_traffic(self) -> None:
        """For the counters alone: it follows GO, and is lost with the link."""
        if self.assembly is not None:
            with contextlib.suppress(EmpError):
                counted = self.assembly.addresses.traffic
                await self._peer.send({"type": "traffic", "counted": counted.model_dump()})

    async def _speak(self) -> None:
        """Say over a new link at once what would be said at the next repeat."""
        if not self.state.committed:
            if self._connections is not None:
                self._connections.again()
            await self._send_addresses()
        match self.state.phase:
            case SourcePhase.GIVEN:
                await self.act(events.SendGo())
            case SourcePhase.ASKING | SourcePhase.OVERRULED:
                await self.act(events.Ask())
            case SourcePhase.STUCK:
                await self.act(events.SendAborted())

    # -- what happens

    async def _follow_machine(self, heard: AsyncIterator[MachineEvent]) -> None:
        async for event in heard:
            if self.phase.final and event.kind is not MachineEventKind.RESUMED:
                return  # what comes now is another migration's; only when the guest ran again may still be to be told
            try:
                await self._hear(event)
            except MachineGone:
                pass  # the GONE event follows
            except EmpError as error:
                log.warning("%s: %s", self.state.migration, error)

    async def _hear(self, event: MachineEvent) -> None:
        match event.kind:
            case MachineEventKind.STREAM:
                await self._stream_moved(event.stream)
            case MachineEventKind.STOPPED:
                if self._forwarder is not None:
                    self._forwarder.stopped(self.machine)
                self.measured(stopped_at_s=event.at_s)
                self.spawn(self._tell_connections())
            case MachineEventKind.RESUMED:
                self.measured(resumed_at_s=event.at_s)
                self.feed(events.GuestRuns())
            case MachineEventKind.GUEST_SHUTDOWN:
                self.feed(events.AbortAsked("the guest has shut itself down"))
            case MachineEventKind.GUEST_PANICKED:
                self.feed(events.AbortAsked("the guest has panicked"))
            case MachineEventKind.IO_ERROR if self.state.phase is SourcePhase.PRECOPY:
                self._bite(self._watchdog.io_error(event.detail))
            case MachineEventKind.GONE:
                self.feed(events.MachineGone())

    async def _stream_moved(self, status: StreamStatus | None) -> None:
        match status:
            case StreamStatus.PRE_SWITCHOVER:
                self.feed(StreamMoved(Stream.PRE_SWITCHOVER))
            case StreamStatus.COMPLETED:
                await self._attest_completed()
            case StreamStatus.FAILED | StreamStatus.CANCELLED:
                if self._forwarder is not None:
                    self._forwarder.goes_back(self.machine)
                reason = None
                with contextlib.suppress(EmpError):
                    reason = (await self.machine.stream_info()).error
                self.feed(StreamMoved(Stream.BROKEN, reason))

    async def _attest_completed(self) -> None:
        """``completed`` counts only when the run state says ``postmigrate`` too: one may be ahead of the other."""
        while await self.machine.run_state() is not RunState.POSTMIGRATE:  # noqa: ASYNC110
            await asyncio.sleep(0.001)  # QEMU has no event for the run state's change
        self.feed(StreamMoved(Stream.COMPLETED))
        if self._forwarder is not None:
            self._forwarder.completed(self.machine)
        self._note(await self.machine.stream_info())

    def _note(self, info: StreamInfo) -> None:
        self.measured(
            qemu_total_ms=info.total_ms,
            qemu_downtime_ms=info.downtime_ms,
            sent_bytes=info.transferred_bytes,
            passes=info.passes,
        )
        if info.dirty_bytes_per_s or not self.figures.dirty_bytes_per_s:
            self.measured(dirty_bytes_per_s=info.dirty_bytes_per_s)
        if info.bandwidth_bytes_per_s:
            self.measured(bandwidth_bytes_per_s=info.bandwidth_bytes_per_s)
        guess = forecast(
            remaining_bytes=info.remaining_bytes,
            bandwidth_bytes_per_s=info.bandwidth_bytes_per_s,
            dirty_bytes_per_s=info.dirty_bytes_per_s,
            max_blackout_ms=self._max_blackout_ms,
        )
        self.progress = Progress(
            memory_bytes=info.memory_bytes,
            remaining_bytes=info.remaining_bytes,
            sent_bytes=info.transferred_bytes,
            dirty_bytes_per_s=info.dirty_bytes_per_s,
            bandwidth_bytes_per_s=info.bandwidth_bytes_per_s,
            passes=info.passes,
            eta_s=guess.eta_s,
        )
        self.changed.notify()

    async def _show_progress(self) -> None:
        while self.state.phase is SourcePhase.PRECOPY:
            await asyncio.sleep(_PROGRESS_S)
            if self.state.phase is SourcePhase.PRECOPY:
                info = None
                try:
                    info = await self.machine.stream_info()
                    self._note(info)
                    await self._open_limit(info.passes)
                except EmpError as error:
                    log.info("%s: no progress: %s", self.state.migration, error)
                if self.state.phase is SourcePhase.PRECOPY:
                    self._bite(self._watchdog.look(info))
                    await self._watchdog.ask()

    def _bite(self, abort: events.AbortAsked | None) -> None:
        self.watched = self._watchdog.lines
        if abort is not None:
            self.feed(abort)

    def _watched_step(self, state: Source, event: events.Event) -> tuple[Source, tuple[Action, ...]]:
        """The core's step; what makes it go back is noted at its check."""
        after, actions = step(state, event)
        if after.cause and not state.cause:
            self._watchdog.goes_back(event)
            self.watched = self._watchdog.lines
        return after, actions

    async def _ask_target(self, message: Message) -> None:
        await self._peer.send(message)

    async def _open_limit(self, passes: int) -> None:
        """Allow the hypervisor a longer pause when passes go by without a switchover."""
        limit_ms = switchover_limit_ms(passes, self._max_blackout_ms)
        if limit_ms > self._limit_ms and self.order is not None:
            log.info(
                "%s: %d passes without a switchover: up to %d ms are allowed", self.state.migration, passes, limit_ms
            )
            policy = self.order.policy
            await self.machine.set_limits(
                StreamLimits(policy.max_bandwidth_bytes_per_s, limit_ms, policy.multifd_channels)
            )
            self._limit_ms = limit_ms

    # -- what is to be done

    async def act(self, action: Action) -> None:
        match action:
            case events.StartStream():
                await self._start_stream()
            case events.ContinueStream():
                try:
                    await self.machine.continue_stream()
                except EmpError as error:
                    self.feed(events.AbortAsked(f"the switchover was refused: {error}"))
            case events.CancelStream():
                self.spawn(self._cancel_stream())
            case events.SendGo():
                message = {"type": "go", "epoch": self.state.epoch_target, "nonce": self.state.nonce}
                await self._send_or_dial(message)
                self.spawn(self._send_traffic())
            case events.SendAborted():
                await self._peer.send({"type": "aborted"})
            case events.Ask():
                await self._send_or_dial({"type": "ask", "nonce": self.state.nonce})
            case events.ClaimVolumes():
                self._claim()
            case events.OpenRelays():
                self._relays.let_through(self.state.migration)
            case events.CloseRelays():
                await self._take_back_volumes()
            case events.Forward():
                if self._forwarder is not None:
                    self._forwarder.begin()
            case events.TakeBackFrames():
                await self._take_back_frames()
            case events.Quarantine(reason):
                self._distrust(reason)
            case events.Run():
                await self._run()
            case events.AwaitGuest():
                self.spawn(self._await_guest())
            case events.KillMachine():
                self.spawn(self._kill())

    def readdressed(self) -> None:
        """The cloud sends what is for the EVM to the target from now on."""
        if self.assembly is not None:
            for port in self.assembly.ports:
                port.readdressed()

    async def _take_back_frames(self) -> None:
        if self._forwarder is not None:
            await self._forwarder.put_back(self.machine)
            self._count_frames(self._forwarder)

    def _count_frames(self, forwarder: Forwarder) -> None:
        self.measured(frames_held=forwarder.held, frames_forwarded=forwarder.forwarded, frames_lost=forwarder.lost)

    async def _take_back_volumes(self) -> None:
        """None may be left beside the guest that runs here, so it is tried until that is so."""
        while True:
            try:
                await self._relays.take_back(self.state.migration)
            except (EmpError, OSError) as error:
                log.error("%s: a relay has not ended yet: %s", self.state.migration, error)
                await asyncio.sleep(_REDIAL_S)
            else:
                return

    async def _send_or_dial(self, message: Message) -> None:
        if self._peer.up:
            await self._peer.send(message)
        elif not any(task.get_name().endswith("_keep_link") for task in self._tasks):
            self.spawn(self._keep_link())

    async def _start_stream(self) -> None:
        assert self.order is not None
        policy, prepared = self.order.policy, self.order.prepared
        self._limit_ms = switchover_limit_ms(0, policy.max_blackout_ms)
        limits = StreamLimits(policy.max_bandwidth_bytes_per_s, self._limit_ms, policy.multifd_channels)
        self._watchdog.begin()
        if self._forwarder is not None:
            self._forwarder.watch()
        if self._connections is not None:
            self._tracking = self.spawn(self._connections.keep_telling())
        self.measured(precopy_began_at_s=_now_s())
        guard_s = policy.blackout_deadline_s + policy.guard_margin_s  # so that it acts only when this agent does not
        try:
            await self.machine.guard_stream(pre_switchover_s=guard_s, device_s=guard_s)
            await self.machine.send_stream(
                host=prepared.stream_host,
                port=prepared.stream_port,
                target=self._qemu_name(self.state.target),
                limits=limits,
            )
        except EmpError as error:
            self.feed(events.AbortAsked(f"pre-copy did not start: {error}"))
        else:
            self.spawn(self._show_progress())

    async def _cancel_stream(self) -> None:
        """Repeat until the hypervisor says what became of the stream; it may be stuck in a write for a while."""
        if self._forwarder is not None:
            await self._forwarder.looked()
            self._forwarder.goes_back(self.machine)
        while self.state.phase is SourcePhase.CANCELLING:
            try:
                await self.machine.cancel_stream()
                info = await self.machine.stream_info()
            except MachineGone:
                return
            except EmpError as error:
                log.warning("%s: cancel: %s", self.state.migration, error)
            else:
                if info.status is StreamStatus.COMPLETED:
                    self.feed(StreamMoved(Stream.COMPLETED))
                    return
                if info.status is StreamStatus.NONE or info.status.ended_badly:
                    self.feed(StreamMoved(Stream.BROKEN))
                    return
            await asyncio.sleep(0.005)

    async def _run(self) -> None:
        """``cont``: OWN(e_s) is on disk, or the target has sworn that it never ran."""
        try:
            await self.machine.cont()
        except MachineGone:
            return  # the GONE event follows
        except OutcomeUnknown as error:
            log.warning("%s: cont: %s", self.state.migration, error)
        except EmpError as error:
            if not await self._guest_has_ended():
                self.feed(events.RunRefused(str(error)))
            return
        self.spawn(self._await_guest())

    async def _guest_has_ended(self) -> bool:
        with contextlib.suppress(EmpError):
            state = await self.machine.run_state()
            if state in _ENDED:
                self.feed(events.GuestEnded(f"the guest is in the state {state}"))
                return True
        return False

    async def _await_guest(self) -> None:
        """The hypervisor resumes the guest by itself after a broken stream; RESUMED may have come already."""
        try:
            async with asyncio.timeout(_RESUME_S):
                while True:
                    state = await self.machine.run_state()
                    if state is RunState.RUNNING:
                        self.feed(events.GuestRuns())
                        return
                    if state is RunState.FINISH_MIGRATE:
                        await self.machine.cancel_stream()  # it failed in pre-switchover: QEMU must be let go of
                    if state in _ENDED:
                        self.feed(events.GuestEnded(f"the guest is in the state {state}"))
                        return
                    if state is RunState.IO_ERROR:
                        self.feed(events.RunRefused(f"the guest is in the state {state}"))
                        return
                    await asyncio.sleep(0.005)
        except TimeoutError:
            self.feed(events.RunRefused(f"it did not run within {_RESUME_S:.0f} s"))
        except MachineGone:
            pass  # the GONE event follows
        except EmpError as error:
            self.feed(events.RunRefused(str(error)))

    async def _kill(self) -> None:
        if self._forwarder is not None and self.state.phase is SourcePhase.DISMANTLING:
            await self._forwarder.until_moved()
            self._count_frames(self._forwarder)
            if self._connections is not None:
                await self._connections.forget()
        await self.dismantled(self.assembly)
        self.feed(events.MachineGone())

    def written(self, kind: str) -> None:
        if kind == "given":
            self.measured(given_at_s=_now_s())

    async def ended(self) -> None:
        for task in (self._telling, self._tracking):
            if task is not None:
                task.cancel()
        await self._on_end(self)
        if self._forwarder is not None:  # of an EVM that was lost here; else it has ended before
            await self._forwarder.settled()
            await self._forwarder.close()
        await self._peer.close()

    async def close(self) -> None:
        await super().close()
        if self._forwarder is not None:
            await self._forwarder.close()
        await self._peer.close()


def _now_s() -> float:
    """Wall clock, for figures only: clocks decide nothing (rule R6)."""
    return time.time()
