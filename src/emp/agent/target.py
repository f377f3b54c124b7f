"""The target's end of a migration: carries out what ``emp.migration.target`` decides.

It guarantees: the EVM never runs here without the source's GO; at the end it runs here, or nothing of it is left here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from pydantic import ValidationError

from emp.agent.assembly import Assembler, Assembly
from emp.agent.connections import Taker
from emp.agent.devices import MakeProbe
from emp.agent.forwarding import ANNOUNCED_S
from emp.agent.health import Health
from emp.agent.journal import Journal, Standing
from emp.agent.links import Message, PeerLink
from emp.agent.role import REPEAT_S, Role
from emp.agent.shelf import Entry
from emp.agent.tunnel import Arrivals
from emp.hypervisor.base import MachineEvent, MachineEventKind, MachineGone, RunState, StreamStatus
from emp.migration import events
from emp.migration.events import Action, Ordered, Stream, StreamMoved
from emp.migration.states import Target, TargetPhase
from emp.migration.target import step
from emp.migration.way_back import VOLUME_UNREAD
from emp.model.errors import Conflict, EmpError, OutcomeUnknown
from emp.model.network import LearntAddress, Traffic
from emp.model.orders import Prepared
from emp.model.orders import Role as RoleName
from emp.model.volume import RbdImage
from emp.wire.link import Link

log = logging.getLogger(__name__)


class TargetRole(Role[Target]):
    name = RoleName.TARGET

    def __init__(
        self,
        state: Target,
        entry: Entry,
        *,
        journal: Journal,
        assembler: Assembler,
        stream_host: str,
        dial: Callable[[], Awaitable[tuple[Link, Standing]]],
        qemu_name: Callable[[str], str],
        claim: Callable[[], None],
        on_end: Callable[[TargetRole], Awaitable[None]],
        assembly: Assembly | None = None,
        multifd_channels: int = 1,
        run_when_local: bool = False,
        probe: MakeProbe | None = None,
    ) -> None:
        super().__init__(state, step, journal, {})
        self.entry = entry
        self.assembly = assembly
        self._assembler = assembler
        self._stream_host = stream_host
        self._stream_port: int | None = None
        self._multifd_channels = multifd_channels
        self._run_when_local = run_when_local
        self._dial = dial
        self._qemu_name = qemu_name
        self._claim = claim
        self._on_end = on_end
        self._probe = probe
        self._arrivals: Arrivals | None = None
        self._connections: Taker | None = None
        self._health: Health | None = None
        self._peer = PeerLink(self.feed, journal, self._told)

    # -- beginning

    def start(self) -> None:
        self.begin(Ordered())

    def resume(self, event: events.Event) -> None:
        """Go on after a restart of the agent: the state was made from the journal."""
        if self.assembly is not None:
            self.spawn(self._follow_machine(self.assembly, self.assembly.machine.events()))
        self.begin(event)

    async def prepared(self) -> Prepared:
        """Return when PREPARED is on disk; raise what made the target withdraw."""
        while self.state.phase in (TargetPhase.MAKING, TargetPhase.PREPARING):
            await self.changed.beyond(self.changed.version)
        if self._stream_port is None or self.state.phase is not TargetPhase.PREPARED:
            raise Conflict(self.state.cause or f"the target is {self.state.phase}", field="target")
        return Prepared(
            migration=self.state.migration,
            nonce=self.state.nonce,
            stream_host=self._stream_host,
            stream_port=self._stream_port,
        )

    async def serve(self, link: Link, standing: Standing) -> None:
        """Use ``link``, which the source has opened, until it ends."""
        if self._peer.attach(link, standing):
            if self.state.phase is TargetPhase.LOADED:
                await self.act(events.SendLoaded())
            await self._peer.pump(link)

    async def _call_source(self) -> None:
        """Open a link from here, and ask over it."""
        try:
            link, standing = await self._dial()
        except EmpError as error:
            log.info("%s: no link to the source: %s", self.state.migration, error)
            return
        if not self._peer.attach(link, standing):
            return
        if self.state.phase is TargetPhase.LOADED:
            await self.act(events.SendLoaded())
        await self.act(events.Ask())
        await self._peer.pump(link)

    def _told(self, message: Message) -> None:
        """What is not the core's business: a question in the source's brownout, and what it has seen of the EVM."""
        if self.assembly is None:
            return
        addresses, prepared = self.assembly.addresses, self.state.phase is TargetPhase.PREPARED
        try:
            match message:
                case {"type": "health"} if prepared:
                    self.spawn(self._peer.send(self._health_of(self.assembly).asked()))
                case {"type": "addresses", "learnt": [*learnt]} if prepared:
                    self.spawn(addresses.take([LearntAddress.model_validate(one) for one in learnt]))
                case {"type": "tracked", "connections": [*tracked]} if not self.phase.final:
                    self._connections = self._connections or Taker(addresses)
                    self.spawn(self._connections.take(tracked))
                case {"type": "traffic", "counted": counted}:
                    addresses.came_with(Traffic.model_validate(counted))
        except ValidationError as error:
            log.warning("%s: %s of the source: %s", self.state.migration, message.get("type"), error)

    def _health_of(self, assembly: Assembly) -> Health:
        if self._health is None:
            # a Ceph image has been opened by the QEMU that waits here, and nothing else of this node could read it
            read = (grant for grant in self.entry.volumes if not isinstance(grant.endpoint, RbdImage))
            probes = {grant.volume.id: self._probe(grant) for grant in read if self._probe}
            self._health = Health(assembly, self._assembler.network, probes)
        return self._health

    # -- what happens

    async def _follow_machine(self, assembly: Assembly, heard: AsyncIterator[MachineEvent]) -> None:
        async for event in heard:
            if self.phase.final and event.kind is not MachineEventKind.RESUMED:
                return
            try:
                await self._hear(assembly, event)
            except MachineGone:
                pass  # the GONE event follows
            except EmpError as error:
                log.warning("%s: %s", self.state.migration, error)

    async def _hear(self, assembly: Assembly, event: MachineEvent) -> None:
        match event.kind:
            case MachineEventKind.STREAM if event.stream is StreamStatus.COMPLETED:
                health = self._health_of(assembly)
                since_s = health.look_at_volumes()
                # Loaded counts only with the guest paused: in ``inmigrate`` a ``cont`` would arm a start.
                while await assembly.machine.run_state() is RunState.INMIGRATE:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)  # QEMU has no event for the run state's change
                if unread := await health.unread_volumes(since_s):
                    self.feed(StreamMoved(Stream.BROKEN, f"{VOLUME_UNREAD} {', '.join(unread)}"))
                else:
                    self.feed(StreamMoved(Stream.COMPLETED))
            case MachineEventKind.STREAM if event.stream and event.stream.ended_badly:
                reason = None
                with contextlib.suppress(EmpError):
                    reason = (await assembly.machine.stream_info()).error
                self.feed(StreamMoved(Stream.BROKEN, reason))
            case MachineEventKind.RESUMED:
                self.measured(resumed_at_s=event.at_s)
                self.feed(events.GuestRuns())
            case MachineEventKind.GONE:
                self.feed(events.MachineGone())

    # -- what is to be done

    async def act(self, action: Action) -> None:
        match action:
            case events.MakeMachine():
                self.spawn(self._make_machine())
            case events.SendLoaded():
                await self._peer.send({"type": "loaded", "nonce": self.state.nonce})
            case events.SendFailed(reason):
                await self._peer.send({"type": "failed", "reason": reason})
            case events.SendAnswer(word):
                await self._peer.send({"type": "answer", "word": word.value, "nonce": self.state.nonce})
            case events.Ask():
                if self._peer.up:
                    await self._peer.send({"type": "ask", "nonce": self.state.nonce})
                elif not any(task.get_name().endswith("_call_source") for task in self._tasks):
                    self.spawn(self._call_source())
            case events.ClaimVolumes():
                self._claim()
            case events.OpenPorts():
                await self._open_ports()
            case events.BlockPorts():
                if self.assembly is not None:
                    await self.assembly.block_ports()
            case events.Run():
                await self._run()
            case events.Announce():
                self.spawn(self._announce())
            case events.KillMachine():
                self.spawn(self._kill())

    async def _make_machine(self) -> None:
        try:
            assembly = await self._assembler.assemble(self.entry, incoming=True)
        except (EmpError, OSError) as error:
            self.feed(events.MachineFailed(str(error)))
            return
        self.assembly = assembly
        self.spawn(self._follow_machine(assembly, assembly.machine.events()))
        try:
            self._stream_port = await assembly.machine.listen_for_stream(
                host=self._stream_host,
                source=self._qemu_name(self.state.source),
                multifd_channels=self._multifd_channels,
            )
        except EmpError as error:
            self.feed(events.MachineFailed(str(error)))
            return
        self._health_of(assembly).look_at_volumes()
        process = assembly.machine.process
        self.feed(events.MachineReady(process.pid, process.start_ticks))

    async def _open_ports(self) -> None:
        assert self.assembly is not None
        try:
            for port in self.assembly.ports:
                port.expect()
            await self.assembly.open_ports()
        except EmpError as error:
            # The commit is made: the guest runs here with or without its network, and a person is told.
            log.error("%s: a port did not open: %s", self.state.migration, error)
        self.measured(port_open_at_s=time.time())

    async def _run(self) -> None:
        if self._run_when_local:  # the classic order of a volume that one node alone can have
            self.spawn(self._run_once_local())
        else:
            await self._cont()

    async def _run_once_local(self) -> None:
        assert self.assembly is not None
        await self.assembly.relays.until_settled(self.state.evm)
        if self.state.phase is TargetPhase.STARTING:
            await self._cont()

    async def _cont(self) -> None:
        assert self.assembly is not None
        try:
            await self.assembly.machine.cont()
        except OutcomeUnknown:
            self.feed(events.RunUnknown())
            self.spawn(self._see_whether_it_runs(self.assembly))
        except MachineGone:
            pass  # the GONE event follows
        except EmpError as error:
            self.feed(events.RunRefused(str(error)))

    async def _see_whether_it_runs(self, assembly: Assembly) -> None:
        """``cont`` was not answered: ask until the hypervisor says, for as long as it lives.

        One that hung may have lost the command. ACTIVATED is on disk and the copy counts as having run, so that it is
        simply said again (rule R1); a refusal now says nothing about the first one (rule R4).
        """
        while self.state.phase is TargetPhase.STARTING:
            try:
                state = await assembly.machine.run_state()
                if state is RunState.RUNNING:
                    self.feed(events.GuestRuns())
                    return
                if state is RunState.PAUSED:
                    await assembly.machine.cont()
            except MachineGone:
                return
            except EmpError as error:
                log.warning("%s: does it run? %s", self.state.migration, error)
            await asyncio.sleep(REPEAT_S)

    async def take_frames(self, link: Link) -> None:
        """Use ``link`` for what the source forwards, until it ends; the role may be over by then."""
        assert self.assembly is not None
        if self._arrivals is None:
            self._arrivals = Arrivals(self.state.migration, self.assembly.ports)
        await self._arrivals.take(link)

    async def _announce(self) -> None:
        assert self.assembly is not None
        if self._arrivals is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrivals.caught_up.wait(), ANNOUNCED_S)
        await self.assembly.announce()
        self.measured(announced_at_s=time.time())

    async def _kill(self) -> None:
        if self._connections is not None:
            await self._connections.forget()
        await self.dismantled(self.assembly)
        self.feed(events.MachineGone())

    async def ended(self) -> None:
        await self._on_end(self)
        await self._stop_looking()

    async def _stop_looking(self) -> None:
        if self._health is not None:
            await self._health.close()

    async def close(self) -> None:
        await super().close()
        await self._stop_looking()
        await self._peer.close()
