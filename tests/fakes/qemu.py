"""A QEMU process as a state machine: what was measured of QEMU 10.0 (``tests/contract/test_qemu_facts.py``).

The guest is a counter that runs while the vCPUs do, and the boot that it belongs to. Its volumes remember the counter
of the last acknowledged write. So a copy that runs beside another, or on older memory than its disk, can be told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from emp.hypervisor.base import (
    BlockDevice,
    LaunchPlan,
    MachineEvent,
    MachineEventKind,
    ProcessId,
    RelaySocket,
    RunState,
    StreamInfo,
    StreamLimits,
    StreamStatus,
)
from emp.hypervisor.qemu.disks import NBD_RECONNECT_DELAY_S
from emp.model.errors import Conflict, HypervisorError, NotFound
from tests.fakes.fabric import LOOK_S, Fabric

TICKS_PER_S = 1000.0
SOCKET_BYTES = 32 << 20
"""what a hung target's socket takes before its source is stuck in the write (fact 11)"""

KIND = MachineEventKind
_CONT_STARTS = (RunState.PAUSED, RunState.PRELAUNCH, RunState.POSTMIGRATE, RunState.IO_ERROR)


@dataclass(frozen=True)
class Guest:
    """A guest's memory."""

    boot: int
    ticks: float = 0.0
    answers: int = 0
    """what its console has been asked"""
    dirty_bytes_per_s: float = 2e6
    working_set_bytes: int = 8 << 20
    uses_volumes: bool = True
    """writes to all of them for as long as it executes"""


class FakeQemu:
    """One process. Agents come and go (``FakeMachine``); this stays until it is killed."""

    def __init__(self, fabric: Fabric, node: str, plan: LaunchPlan) -> None:
        self.fabric = fabric
        self.node = node
        self.plan = plan
        self.spec = plan.spec
        pid = fabric.next_pid()
        self.process = ProcessId(pid, pid * 7)
        self.alive = True
        self.hung = False
        """SIGSTOPped"""
        self.deaf = False
        """stuck with its big lock held: only out-of-band commands are answered"""
        self.run_state = RunState.INMIGRATE if plan.incoming else RunState.RUNNING
        self.status = StreamStatus.NONE
        self.error: str | None = None
        self.guest: Guest | None = None if plan.incoming else Guest(pid)
        self.refuse_cont = 0
        """how many of the next ``cont`` are refused"""
        self.autostart = False
        self.stream: Stream | None = None
        self.allowed_source: str | None = None
        self.channels = 2
        self.guard_s: dict[StreamStatus, float] = {}
        """how long its guard process lets a stream stay where (rule R12)"""
        self.clock_ms: float | None = None
        """its guest's clock less its node's, as its agent says; None: it has none"""
        self.left_in_socket: list[Callable[[], object]] = []
        self._listeners: list[Callable[[MachineEvent], None]] = []
        self._since: float | None = None
        """when its vCPUs began to execute and their I/O to go through"""
        self._stall: asyncio.TimerHandle | None = None
        fabric.qemus.append(self)
        if not plan.incoming:
            self._executes()

    # -- what it tells

    def subscribe(self, put: Callable[[MachineEvent], None]) -> None:
        self._listeners.append(put)

    def unsubscribe(self, put: Callable[[MachineEvent], None]) -> None:
        if put in self._listeners:
            self._listeners.remove(put)

    def tell(self, kind: MachineEventKind, *, passes: int | None = None, detail: str | None = None) -> None:
        stream = self.status if kind is KIND.STREAM else None
        at_s = self.fabric.wall_clock(self.node)
        for put in tuple(self._listeners):
            put(MachineEvent(kind, at_s, stream=stream, passes=passes, detail=detail))

    def becomes(self, status: StreamStatus, error: str | None = None) -> None:
        self.status = status
        self.error = error or self.error
        self.fabric.watch_stream(self)
        self.tell(KIND.STREAM)
        if status in self.guard_s and self.stream is not None:
            self.fabric.spawn(self._guard(self.stream, status, self.guard_s[status]), f"guard of {self.spec.name}")

    async def _guard(self, stream: Stream, status: StreamStatus, limit_s: float) -> None:
        await asyncio.sleep(limit_s)
        while self.hung:
            await self.fabric.look()
        if self.alive and stream.going and self.status is status:
            stream.cancel()

    # -- its guest

    @property
    def executing(self) -> bool:
        return self.alive and self.run_state is RunState.RUNNING and not self.hung

    def advance(self) -> None:
        """Bring the counter, and the disks, up to this moment."""
        if self._since is None or self.guest is None:
            return
        now = self.fabric.now()
        self.guest = replace(self.guest, ticks=self.guest.ticks + (now - self._since) * TICKS_PER_S)
        self._since = now
        self.fabric.watch_advance(self)
        for device in self.plan.volumes if self.guest.uses_volumes else ():
            self.fabric.watch_write(self, device.volume)

    def _executes(self) -> None:
        self.fabric.watch_run(self)
        self.look_at_storage()

    def look_at_storage(self) -> None:
        """Go on, or stand still in I/O, as the volumes are now; ``advance`` came before what changed them."""
        goes = self.executing and self.storage_is_up()
        if goes and self._since is None:
            self._since = self.fabric.now()
            if self.plan.volumes:
                self.advance()
        elif not goes:
            self._since = None
        if goes or not self.executing:
            if self._stall:
                self._stall.cancel()
                self._stall = None
        elif self._stall is None:
            self._stall = self.fabric.later(NBD_RECONNECT_DELAY_S, self._io_fails)

    # -- its volumes, while it lives

    def check_no_migration(self) -> None:
        going = self.stream is not None and self.stream.going
        away = (RunState.INMIGRATE, RunState.POSTMIGRATE, RunState.FINISH_MIGRATE)
        if going or self.run_state in away:
            raise Conflict(f"{self.spec.name} is being migrated", field="evm")

    def check_source(self, device: BlockDevice) -> None:
        if not self.fabric.served(self.node, device):
            raise HypervisorError(f"blockdev-add: {device.volume}: Connection refused", sent=True)

    def use_volumes(self) -> None:
        """Have the guest write to them from now on."""
        assert self.guest is not None
        self.advance()
        self.guest = replace(self.guest, uses_volumes=True)

    def slot_of(self, serial: str) -> int:
        for slot, device in self.disks.items():
            if device.serial == serial:
                return slot
        raise NotFound(f"{self.spec.name} has no disk with the serial {serial}", field="volume")

    def change(self, disks: dict[int, BlockDevice]) -> None:
        """Have these disks from now on; what the guest has written was written to those it had."""
        self.advance()
        names = tuple(device.volume for device in disks.values())
        self.spec = self.spec.model_copy(update={"volumes": names, "volume_slots": tuple(disks)})
        self.plan = replace(self.plan, spec=self.spec, volumes=tuple(disks.values()))
        self.look_at_storage()

    @property
    def disks(self) -> dict[int, BlockDevice]:
        """slot -> volume"""
        return dict(zip(self.spec.slots, self.plan.volumes, strict=True))

    def storage_is_up(self) -> bool:
        return all(self.fabric.served(self.node, device) for device in self.plan.volumes)

    def _io_fails(self) -> None:
        self._stall = None
        patient = [device for device in self.plan.volumes if isinstance(device.source, RelaySocket)]
        if self.executing and not all(self.fabric.served(self.node, d) for d in self.plan.volumes if d not in patient):
            self.tell(KIND.IO_ERROR, detail="disk0: write: Input/output error, stop")
            self._stands(RunState.IO_ERROR)

    def _stands(self, state: RunState) -> None:
        was = self.run_state
        self.advance()
        self.run_state = state
        self.look_at_storage()
        if was is RunState.RUNNING:
            self.tell(KIND.STOPPED)

    def runs(self) -> None:
        """The vCPUs start."""
        if self.run_state is not RunState.RUNNING:
            self.run_state = RunState.RUNNING
            if not self.hung:
                self._executes()
            self.tell(KIND.RESUMED)

    def hang(self) -> None:
        self.advance()
        self.hung = True
        self.look_at_storage()

    def wake(self) -> None:
        """SIGCONT: what lay in its monitor's socket is executed, or was dropped with the connection (fact 9)."""
        if not self.alive or not self.hung:
            return
        self.hung = False
        if self.run_state is RunState.RUNNING:
            self._executes()
        waiting, self.left_in_socket = self.left_in_socket, []
        for command in waiting:
            if self.fabric.rng.random() < 0.5:
                try:
                    command()
                except HypervisorError:  # nobody waits for the answer any more
                    continue

    # -- what a guest does by itself

    def press_power_button(self) -> None:
        if self.run_state is RunState.RUNNING:
            self.tell(KIND.GUEST_SHUTDOWN, detail="guest-shutdown")
            self._stands(RunState.SHUTDOWN)

    def panic(self) -> None:
        self.tell(KIND.GUEST_PANICKED, detail="pause")
        self._stands(RunState.GUEST_PANICKED)

    def reset(self) -> None:
        assert self.guest is not None
        self.advance()
        self.guest = Guest(self.fabric.next_pid(), ticks=0.0)
        self.fabric.watch_run(self)
        self.tell(KIND.GUEST_RESET, detail="guest-reset")

    # -- QMP

    def cont(self) -> None:
        """As QEMU's own: in ``inmigrate`` it says yes and arms a start at the end of loading (fact 6)."""
        if self.refuse_cont:
            self.refuse_cont -= 1
            raise HypervisorError('Failed to get "write" lock', sent=True)
        if self.run_state is RunState.INMIGRATE:
            self.autostart = True
        elif self.run_state in _CONT_STARTS:
            self.runs()
        elif self.run_state is RunState.FINISH_MIGRATE:
            raise HypervisorError("Migration is not finalized yet", sent=True)
        elif self.run_state is not RunState.RUNNING:
            raise HypervisorError("Resetting the Virtual Machine is required", sent=True)

    def stop(self) -> None:
        if self.run_state is RunState.INMIGRATE:
            self.autostart = False
        elif self.run_state is RunState.RUNNING:
            self._stands(RunState.PAUSED)

    def query_migrate(self) -> StreamInfo:
        stream = self.stream
        if stream is None:
            return StreamInfo(self.status, error=self.error)
        return StreamInfo(
            self.status,
            error=self.error,
            total_ms=int((stream.ended_at or self.fabric.now()) * 1000 - stream.began_at * 1000),
            downtime_ms=stream.downtime_ms,
            setup_ms=1,
            memory_bytes=self.spec.memory_bytes,
            remaining_bytes=int(stream.remaining_bytes),
            transferred_bytes=int(stream.sent_bytes),
            dirty_bytes_per_s=int(self.guest.dirty_bytes_per_s) if self.guest and stream.passes > 1 else 0,
            bandwidth_bytes_per_s=stream.rate(),
            passes=stream.passes,
        )

    def migrate_incoming(self, source: str, channels: int) -> int:
        self.allowed_source, self.channels = source, channels
        return self.fabric.listen(self)

    def migrate(self, port: int, me: str, target: str, limits: StreamLimits) -> None:
        if self.stream is not None and self.stream.going:
            raise HypervisorError("There's a migration process in progress", sent=True)
        if self.run_state is RunState.POSTMIGRATE:
            raise HypervisorError("Can't migrate the vm that was paused due to previous migration", sent=True)
        self.error = None
        self.stream = Stream(self, port, me, target, limits)

    def migrate_continue(self) -> None:
        if self.stream is None or self.status is not StreamStatus.PRE_SWITCHOVER:
            raise HypervisorError(f"Migration not in expected state: {self.status}", sent=True)
        self.stream.go_on()

    def yank_and_cancel(self) -> None:
        if self.stream is not None and self.stream.going:
            self.stream.cancel()

    def stands_for_switchover(self) -> None:
        self._stands(RunState.FINISH_MIGRATE)

    def postmigrate(self) -> None:
        self.run_state = RunState.POSTMIGRATE

    def die(self) -> None:
        """SIGKILL."""
        if not self.alive:
            return
        self.advance()
        self.alive = False
        self.look_at_storage()
        for port in [port for port, qemu in self.fabric.listeners.items() if qemu is self]:
            del self.fabric.listeners[port]
        if self.stream is not None:
            self.stream.source_died()
        self.fabric.qemus.remove(self)
        self.tell(KIND.GONE, detail="killed by signal 9")

    # -- as a target

    async def load(self, guest: Guest) -> None:
        """Everything has arrived: loaded, and paused unless a ``cont`` came too early."""
        self.guest = guest
        self.becomes(StreamStatus.COMPLETED)
        await self.fabric.lag()
        if self.alive:
            self.run_state = RunState.PAUSED
            if self.autostart:
                self.runs()

    def loading_failed(self, error: str) -> None:
        if self.alive and self.status in (StreamStatus.SETUP, StreamStatus.ACTIVE):
            self.becomes(StreamStatus.FAILED, error)


class Broken(Exception):
    """The connection of the stream is gone."""


class Stream:
    """A migration on its way; runs in a task of the fabric until it is over or cancelled."""

    def __init__(self, source: FakeQemu, port: int, me: str, target: str, limits: StreamLimits) -> None:
        self.source = source
        self.fabric = source.fabric
        self.limits = limits
        self.began_at = self.fabric.now()
        self.ended_at: float | None = None
        self.stopped_at: float | None = None
        self.downtime_ms: int | None = None
        self.remaining_bytes = float(source.spec.memory_bytes)
        self.sent_bytes = 0.0
        self.passes = 0
        self.going = True
        self.target: FakeQemu | None = None
        self._continued = asyncio.Event()
        self._all_sent = False
        self._cancelled = False
        self._draining = False
        source.becomes(StreamStatus.SETUP)
        self._task = self.fabric.spawn(self._run(port, me, target), f"stream of {source.spec.name}")

    def rate(self) -> float:
        there = self.target.node if self.target else self.source.node
        rate = self.fabric.rate(self.source.node, there)
        return min(rate, self.limits.max_bandwidth_bytes_per_s or rate)

    # -- from outside

    def go_on(self) -> None:
        self._continued.set()

    def cancel(self) -> None:
        """``yank`` and ``migrate_cancel``; a drain of the guest's I/O is waited for first."""
        if self._draining:
            self._cancelled = True
            return
        self._task.cancel()
        self.source.becomes(StreamStatus.CANCELLING)
        self._over(StreamStatus.CANCELLED, None)

    def source_died(self) -> None:
        if self.going:
            self.going = False
            self._task.cancel()
            self._tell_target("the source is gone")

    # -- the way of it

    async def _run(self, port: int, me: str, name: str) -> None:
        try:
            await self._connect(port, me, name)
            await self._precopy()
            await self._switchover()
        except Broken as error:
            self._over(StreamStatus.FAILED, str(error))

    async def _connect(self, port: int, me: str, name: str) -> None:
        await self.fabric.breath(0.001, 0.004)
        target = self.fabric.listeners.get(port)
        if target is None or not self.fabric.reaches(self.source.node, target.node):
            raise Broken("Failed to connect: Connection refused")
        if name.partition("-")[2] != target.node or me != target.allowed_source:
            raise Broken("TLS handshake failed: the certificate does not match")
        del self.fabric.listeners[port]
        self.target = target
        for end in (self.source, target):
            if end is target:
                target.becomes(StreamStatus.SETUP)
            end.becomes(StreamStatus.ACTIVE)
        if target.spec.uuid != self.source.spec.uuid:
            target.becomes(StreamStatus.FAILED, "UUID received does not match")
            raise Broken("the target refused the stream")

    async def _precopy(self) -> None:
        while True:
            self.passes += 1
            self.source.tell(KIND.PASS, passes=self.passes)
            began_at = self.fabric.now()
            await self._carry()
            guest = self.source.guest
            assert guest is not None
            dirtied = guest.dirty_bytes_per_s * (self.fabric.now() - began_at)
            runs = self.source.run_state is RunState.RUNNING
            self.remaining_bytes = min(dirtied, guest.working_set_bytes) if runs else 0.0
            if self.remaining_bytes * 1000 <= self.limits.downtime_limit_ms * self.rate():
                return

    async def _switchover(self) -> None:
        source, target = self.source, self.target
        assert target is not None
        self._was_running = source.run_state is RunState.RUNNING
        self.stopped_at = self.fabric.now()
        source.stands_for_switchover()
        await self._drain()
        source.becomes(StreamStatus.PRE_SWITCHOVER)
        await self._continued.wait()
        source.becomes(StreamStatus.DEVICE)
        await self._carry()
        guest = source.guest
        assert guest is not None
        if not set(source.disks) <= set(target.disks):
            target.becomes(StreamStatus.FAILED, "Unknown savevm section or instance: scsi-disk")
            raise Broken("the target refused the stream")
        self._all_sent = True
        loaded = asyncio.Event()
        self.fabric.spawn(_load(target, guest, loaded), f"loading {target.spec.name}")
        while not self._passes() or not loaded.is_set():
            await self._look()
        await self.fabric.breath()
        self.going, self.ended_at = False, self.fabric.now()
        self.downtime_ms = int((self.ended_at - self.stopped_at) * 1000)
        self.remaining_bytes = 0.0
        source.becomes(StreamStatus.COMPLETED)  # and the run state a moment later (fact 3)
        await self.fabric.lag()
        source.postmigrate()

    async def _drain(self) -> None:
        """I/O of the guest that is on its way is waited for, with QEMU deaf meanwhile; then it fails."""
        deadline = self.fabric.now() + NBD_RECONNECT_DELAY_S
        self._draining = self.source.deaf = True
        up = self.source.storage_is_up
        while not up() and self.fabric.now() < deadline and self.source.alive:
            await self.fabric.look()
        self._draining = self.source.deaf = False
        if not up() or self._cancelled:
            raise Broken("the guest's disks could not be flushed: Input/output error")

    async def _carry(self) -> None:
        """Send what remains."""
        while self.remaining_bytes > 0:
            while not self._passes() and not (self._is_hung() and self._fits_the_socket()):
                self.source.deaf = self._is_hung() and self.source.status is StreamStatus.DEVICE
                await self._look()
            self.source.deaf = False
            step = min(self.remaining_bytes, self.rate() * LOOK_S)
            await asyncio.sleep(step / self.rate())
            self.remaining_bytes -= step
            self.sent_bytes += step

    def _is_hung(self) -> bool:
        assert self.target is not None
        return self.target.hung or self.source.hung

    def _fits_the_socket(self) -> bool:
        return not self.source.hung and self.remaining_bytes <= SOCKET_BYTES

    def _passes(self) -> bool:
        assert self.target is not None
        reachable = self.fabric.reaches(self.source.node, self.target.node)
        if not self.target.alive and reachable and not self.source.hung:
            raise Broken("Unable to write to socket: Broken pipe")
        return reachable and not self._is_hung()

    async def _look(self) -> None:
        await self.fabric.look()

    # -- the end of it

    def _over(self, status: StreamStatus, error: str | None) -> None:
        self.going, self.ended_at = False, self.fabric.now()
        self.source.deaf = False
        self.source.becomes(status, error)
        if self.stopped_at is not None and self.source.alive:
            self.source.run_state = RunState.PAUSED
            if self._was_running:  # fact 1: by itself, on any failure or cancel
                self.source.runs()
        self._tell_target("Failed to load: the stream broke")

    def _tell_target(self, error: str) -> None:
        if self.target is not None and not self._all_sent:
            self.fabric.spawn(self._break_target(self.target, error), "end of a stream")

    async def _break_target(self, target: FakeQemu, error: str) -> None:
        await self.fabric.breath()
        while target.alive and (target.hung or not self.fabric.reaches(self.source.node, target.node)):
            await self.fabric.look()
        target.loading_failed(error)


async def _load(target: FakeQemu, guest: Guest, loaded: asyncio.Event) -> None:
    """All bytes are in the target's socket: it loads them, whatever has become of the source (fact 7)."""
    await target.fabric.breath()
    while target.alive and target.hung:
        await target.fabric.look()
    if not target.alive or target.status is not StreamStatus.ACTIVE:
        return
    if target.fabric.rng.random() < 0.5:
        loaded.set()
        await target.fabric.breath()
    if target.alive:
        await target.load(guest)
    loaded.set()
