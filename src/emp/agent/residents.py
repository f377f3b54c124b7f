"""The EVMs that live on this node: boot, stop, retire, and what their guests do by themselves.

No agent boots a guest from its journal (rule R9): a start needs the controller's order with a fresh epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from emp.agent import guest_clock
from emp.agent.assembly import Assembler, Assembly
from emp.agent.journal import Journal
from emp.agent.plugs import change_volumes
from emp.agent.shelf import Entry, Shelf
from emp.agent.signal import Signal
from emp.agent.source import SourceRole
from emp.hypervisor.base import MachineEvent, MachineEventKind, MachineGone, RunState
from emp.migration import admission
from emp.migration.records import OWNING, RUNNABLE, Record, RecordKind
from emp.model.clock import GuestClock
from emp.model.errors import Conflict, EmpError, HostError, NotFound, OutcomeUnknown, Refused, StaleEpoch, Unavailable
from emp.model.evm import EvmState
from emp.model.names import format_size
from emp.model.node import EvmReport
from emp.model.orders import RetireOrder, StartOrder, StopOrder, VolumeGrant, VolumesOrder

log = logging.getLogger(__name__)

_AGAIN_S = 1.0
PRESS_AGAIN_S = 2.0
PANICKED = "the guest's kernel panicked"
STORAGE = "storage error"


@dataclass
class Resident:
    """One EVM whose authority is here, or whose end is still to be told."""

    entry: Entry
    assembly: Assembly | None
    state: EvmState
    reason: str | None = None
    waits_for_storage: bool = False
    """it is paused, as QEMU stops a guest instead of failing its I/O"""
    role: SourceRole | None = None
    """while it is being migrated away"""
    follower: asyncio.Task[None] | None = None
    clock: GuestClock | None = None
    """as it was found since the guest last began to run here"""
    clock_setter: asyncio.Task[None] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """orders about this EVM, one at a time (rule R1)"""

    @property
    def name(self) -> str:
        return self.entry.spec.name

    @property
    def is_migrating(self) -> bool:
        return self.role is not None and not self.role.phase.final

    def become(self, state: EvmState, reason: str | None = None, *, waits_for_storage: bool = False) -> None:
        self.state, self.reason, self.waits_for_storage = state, reason, waits_for_storage


class Residents:
    def __init__(self, journal: Journal, shelf: Shelf, assembler: Assembler, *, memory_bytes: int) -> None:
        self.journal = journal
        self.shelf = shelf
        self.assembler = assembler
        self.memory_bytes = memory_bytes
        self.changed = Signal()
        self._residents: dict[str, Resident] = {}
        self._reserved_bytes: dict[str, int] = {}
        """EVM name -> memory of machines that are being made or wait for a stream"""
        self._chores: set[asyncio.Task[None]] = set()

    # -- what is here

    def get(self, name: str) -> Resident:
        """Raise ``NotFound``."""
        try:
            return self._residents[name]
        except KeyError:
            raise NotFound(f"EVM {name!r} is not on this node", field="evm") from None

    def reports(self) -> tuple[EvmReport, ...]:
        return tuple(self.report(resident) for resident in self._residents.values())

    def report(self, resident: Resident) -> EvmReport:
        last = self.journal.last(resident.name)
        migrating = resident.is_migrating
        addresses = resident.assembly.addresses if resident.assembly else None
        traffic = mtu_bytes = None
        if addresses is not None and resident.assembly is not None:
            with contextlib.suppress(HostError):  # its taps are gone, and its machine with them
                traffic = addresses.traffic
                mtu_bytes = min(port.mtu_bytes for port in resident.assembly.ports)
        return EvmReport(
            name=resident.name,
            state=EvmState.MIGRATING if migrating else resident.state,
            epoch=last.epoch if last else 0,
            reason=resident.reason,
            migration=resident.role.state.migration if resident.role and migrating else None,
            qemu_pid=resident.assembly.machine.process.pid if resident.assembly else None,
            learnt=addresses.learnt if addresses else (),
            asked=addresses.asked if addresses else (),
            traffic=traffic,
            mtu_bytes=mtu_bytes,
            clock=resident.clock,
        )

    def allow(self, allowed: Mapping[str, Collection[str]]) -> None:
        """The controller's word on addresses that guests were heard to use."""
        for name, addresses in allowed.items():
            if (resident := self._residents.get(name)) and resident.assembly is not None:
                self._chore(resident.assembly.addresses.allow(addresses), f"addresses of {name}")

    def place(self, macs: Mapping[str, str]) -> None:
        """The controller's word on which other node has which MAC."""
        self._chore(self._place(macs), "places of MACs")

    async def _place(self, macs: Mapping[str, str]) -> None:
        try:
            await self.assembler.network.place(macs)
        except EmpError as error:
            log.error("where other nodes' EVMs are is not in force: %s", error)

    @property
    def mtu_bytes(self) -> int | None:
        """Of the node's network; None: it cannot be told."""
        with contextlib.suppress(HostError):
            return self.assembler.network.mtu_bytes
        return None

    @property
    def memory_used_bytes(self) -> int:
        living = (r.entry.spec.memory_bytes for r in self._residents.values() if r.assembly)
        return sum(living) + sum(self._reserved_bytes.values())

    def reserve(self, name: str, memory_bytes: int) -> None:
        """Set memory aside for a machine that is being made; raise ``Refused`` if the node has not got it."""
        free_bytes = self.memory_bytes - self.memory_used_bytes
        if memory_bytes > free_bytes:
            raise Refused(
                f"it needs {format_size(memory_bytes)}, the node has {format_size(max(0, free_bytes))} free",
                field="memory",
                hint="pick another node, or stop or move an EVM away from this one",
            )
        self._reserved_bytes[name] = memory_bytes

    def unreserve(self, name: str) -> None:
        self._reserved_bytes.pop(name, None)

    # -- orders

    async def start(self, order: StartOrder) -> EvmReport:
        """START(k): OWN(k) on disk, then boot. The same order again gets the same answer."""
        name, epoch = order.spec.name, order.epoch
        last = self.journal.last(name)
        if last and last.kind is RecordKind.OWN and last.epoch == epoch and name in self._residents:
            return self.report(self.get(name))
        admission.check_start(self.journal.ledger(name), epoch)
        await self._forget(name)
        entry = Entry(spec=order.spec, volumes=order.volumes)
        self.reserve(name, order.spec.memory_bytes)
        try:
            self.shelf.put(entry)
            await self.journal.append(Record(RecordKind.OWN, name, epoch))
            resident = Resident(entry, None, EvmState.CREATING)
            self._residents[name] = resident
            try:
                resident.assembly = await self.assembler.assemble(entry, incoming=False)
                await resident.assembly.open_ports()
                await resident.assembly.announce()
            except EmpError as error:
                resident.become(EvmState.CRASHED, f"it could not be started: {error}")
                if resident.assembly:
                    await resident.assembly.dismantle()
                    resident.assembly = None
                raise
            self._settle(resident)
        finally:
            self.unreserve(name)
            self.changed.notify()
        return self.report(resident)

    async def stop(self, name: str, order: StopOrder) -> EvmReport:
        """Power button, then after the grace period power off; STOPPED(e) on disk, nothing left but the shelf."""
        resident = self.get(name)
        async with resident.lock:
            self._check_not_migrating(resident)
            if resident.state is EvmState.UNKNOWN:
                raise Unavailable(f"EVM {name!r}: {resident.reason}", field="evm", hint="it is tried again and again")
            if resident.assembly is not None:
                if order.grace_s > 0 and resident.state is EvmState.RUNNING:
                    await self._ask_to_shut_down(resident, order.grace_s)
                await self._end(resident, EvmState.STOPPED, resident.reason or "stopped by request")
        return self.report(resident)

    async def change_volumes(self, name: str, order: VolumesOrder) -> EvmReport:
        """Plug, unplug and grow until the EVM has the volumes of the order, and none while it is being migrated (R1).

        The same order again gets the same answer. Raises ``Conflict`` where the EVM is not owned here under the order's
        epoch, has no machine, or uses what is to be taken away; what ``Machine`` raises leaves it as it was.
        """
        resident = self.get(name)
        async with resident.lock:
            self._check_not_migrating(resident)
            last = self.journal.last(name)
            if last is None or last.kind not in RUNNABLE or last.epoch != order.epoch:
                raise StaleEpoch(f"EVM {name!r} is not owned here under epoch {order.epoch}", field="epoch")
            if resident.assembly is None:
                raise Conflict(f"EVM {name!r} has no machine now", field="evm", hint="see: emp evm show")
            machine, devices = resident.assembly.machine, self.assembler.devices
            entry = await change_volumes(machine, resident.entry, order, devices)
            self.shelf.put(entry)
            resident.entry = entry
            if resident.assembly is not None:
                resident.assembly.spec = entry.spec
        return self.report(resident)

    async def retire(self, name: str, order: RetireOrder) -> EvmReport:
        """RETIRED(k): whatever of this EVM is here is dead, and an order older than k is refused from now on."""
        last = self.journal.last(name)
        report = EvmReport(name=name, state=EvmState.STOPPED, epoch=order.epoch, reason="retired")
        if self.has_retired(name, order):
            return report
        admission.check_epoch(self.journal.ledger(name), order.epoch)
        if resident := self._residents.get(name):
            async with resident.lock:
                self._check_not_migrating(resident)
                await self._forget(name)
        elif last and last.kind in (RecordKind.PREPARED, RecordKind.GIVEN):
            raise Conflict(f"a migration of {name!r} is not over here", field="evm", hint="abort it first")
        # RETIRED swears that nothing runs here: so look, whatever is known of it, and kill what is there.
        await self.assembler.clear(name, (await self.assembler.hypervisor.found()).get(name))
        await self.journal.append(Record(RecordKind.RETIRED, name, order.epoch))
        self.shelf.drop(name)
        self.changed.notify()
        return report

    async def land(self, name: str, grant: VolumeGrant) -> None:
        """Have a machine that borrowed a volume use this node's own attachment, and end its relay. Idempotent."""
        resident = self.get(name)
        async with resident.lock:
            if resident.state is EvmState.UNKNOWN:  # its machine may live, and use the relay
                raise Unavailable(f"EVM {name!r}: {resident.reason}", field="evm", hint="it is tried again and again")
            if resident.assembly is not None:
                await resident.assembly.machine.move_volume(await self.assembler.devices.open(grant))
            others = (grant if mine.volume.id == grant.volume.id else mine for mine in resident.entry.volumes)
            resident.entry = resident.entry.model_copy(update={"volumes": tuple(others)})
            self.shelf.put(resident.entry)  # before the relay ends: a restarted agent must not look for it
            await self.assembler.relays.give_back(grant.volume.id)

    def has_retired(self, name: str, order: RetireOrder) -> bool:
        """The same order again."""
        last = self.journal.last(name)
        return last is not None and (last.kind, last.epoch) == (RecordKind.RETIRED, order.epoch)

    @staticmethod
    def _check_not_migrating(resident: Resident) -> None:
        if resident.role is not None and resident.is_migrating:
            raise Conflict(
                f"EVM {resident.name!r} is being migrated ({resident.role.state.migration})",
                field="evm",
                hint="abort the migration or wait for its end",
            )

    # -- arrivals and departures

    def settle(self, entry: Entry, assembly: Assembly, state: RunState = RunState.RUNNING) -> None:
        """An EVM has come to live here: by a migration, or adopted after a restart, its machine in ``state``."""
        resident = Resident(entry, assembly, EvmState.RUNNING)
        self._residents[entry.spec.name] = resident
        self._settle(resident)
        self._stands(resident, state)

    def _stands(self, resident: Resident, state: RunState) -> None:
        """Take over a state that no event has told of."""
        match state:
            case RunState.RUNNING:
                pass
            case RunState.SHUTDOWN:
                self.shut_down(resident)
            case RunState.IO_ERROR:
                self._wait_for_storage(resident)
            case RunState.GUEST_PANICKED:
                resident.become(EvmState.PANICKED, PANICKED)
            case _:
                resident.become(EvmState.PAUSED, f"the machine is {state}")
                self._let_run(resident)

    def note(self, entry: Entry, state: EvmState, reason: str | None) -> Resident:
        """An EVM whose machine is not there any more, but whose authority or end is."""
        resident = Resident(entry, None, state, reason)
        self._residents[entry.spec.name] = resident
        return resident

    def unnote(self, name: str) -> None:
        """What was noted of an EVM that could not be adopted is found out anew."""
        if (resident := self._residents.get(name)) and resident.state is EvmState.UNKNOWN:
            del self._residents[name]

    def _settle(self, resident: Resident) -> None:
        resident.become(EvmState.RUNNING)
        if resident.assembly is not None:
            follow = self._follow(resident, resident.assembly.machine.events())
            resident.follower = asyncio.create_task(follow, name=f"resident {resident.name}")
            resident.assembly.addresses.tell = self.changed.notify
        self._set_clock(resident)
        self.changed.notify()

    async def depart(self, name: str) -> None:
        """Another node owns it: nothing of it is left here, whoever has ended its machine."""
        await self._forget(name)
        self.shelf.drop(name)
        self.changed.notify()

    async def _forget(self, name: str) -> None:
        """Take away what is left of an EVM that has no authority here."""
        if resident := self._residents.pop(name, None):
            await self._stop_following(resident)
            if resident.assembly is not None:
                await resident.assembly.dismantle()

    # -- what guests do by themselves

    async def _follow(self, resident: Resident, events: AsyncIterator[MachineEvent]) -> None:
        async for event in events:
            await self._hear(resident, event)

    async def _hear(self, resident: Resident, event: MachineEvent) -> None:
        match event.kind:
            case MachineEventKind.GUEST_SHUTDOWN:
                self.shut_down(resident)
            case MachineEventKind.GUEST_PANICKED:
                resident.become(EvmState.PANICKED, PANICKED)
            case MachineEventKind.IO_ERROR:
                self._wait_for_storage(resident, event.detail)
            case MachineEventKind.STOPPED if resident.state is EvmState.RUNNING:
                resident.become(EvmState.PAUSED, resident.reason)
                self.leave_clock(resident)
                if resident.is_migrating:
                    return  # the blackout: the migration tells
                self._let_run(resident)
            case MachineEventKind.RESUMED if resident.state is EvmState.PAUSED and resident.waits_for_storage:
                return  # to try its I/O again: whether it goes on shows in a moment (``_cont``)
            case MachineEventKind.RESUMED:
                resident.become(EvmState.RUNNING)
                self._set_clock(resident)
            case MachineEventKind.GUEST_RESET:
                self.leave_clock(resident)
                self._set_clock(resident)  # it reads a clock of whole seconds when it boots
            case MachineEventKind.GONE:
                await self._machine_gone(resident)
            case _:
                return
        self.changed.notify()

    def _wait_for_storage(self, resident: Resident, detail: str | None = None) -> None:
        resident.become(EvmState.PAUSED, ": ".join(filter(None, (STORAGE, detail))), waits_for_storage=True)
        self._let_run(resident)

    def shut_down(self, resident: Resident) -> None:
        """The guest has shut itself down; its machine goes as soon as no migration holds it."""
        self._chore(self._after_shutdown(resident), f"shutdown of {resident.name}")

    def _chore(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do ``work`` beside; what is being done under that name already is not begun twice."""
        if any(chore.get_name() == name and not chore.done() for chore in self._chores):
            work.close()
            return
        task = asyncio.create_task(work, name=name)
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def _set_clock(self, resident: Resident) -> None:
        """The guest begins to run here, and its clock may be behind."""
        assembly = resident.assembly

        def may_go_on() -> bool:
            is_here = self._residents.get(resident.name) is resident and resident.assembly is assembly
            return is_here and resident.state is EvmState.RUNNING and not resident.is_migrating

        def told(clock: GuestClock) -> None:
            resident.clock = clock
            self.changed.notify()

        def done(task: asyncio.Task[None]) -> None:
            if resident.clock_setter is task:
                resident.clock_setter = None

        if assembly is not None and resident.clock_setter is None and may_go_on():
            setting = guest_clock.set_right(assembly.machine, may_go_on, told)
            resident.clock_setter = asyncio.create_task(setting, name=f"clock of {resident.name}")
            self._chores.add(resident.clock_setter)
            resident.clock_setter.add_done_callback(self._chores.discard)
            resident.clock_setter.add_done_callback(done)

    def leave_clock(self, resident: Resident) -> None:
        """It is not to be set now, as the guest stands or is about to be migrated; what was known of it is over."""
        resident.clock = None
        if resident.clock_setter is not None:
            resident.clock_setter.cancel()
            resident.clock_setter = None

    def _let_run(self, resident: Resident) -> None:
        self._chore(self._until_it_runs(resident), f"pause of {resident.name}")

    async def _until_it_runs(self, resident: Resident) -> None:
        """Nobody pauses a guest on purpose: QEMU does instead of failing its I/O, and ``cont`` tries that again.

        It does not always say that it was for that: a volume that fails in the very moment of a migration's end leaves
        a guest that was stopped, and no event of a storage error.
        """
        while True:
            await asyncio.sleep(_AGAIN_S)  # and look then: right after ``cont`` the guest seems to run in any case
            if self._residents.get(resident.name) is not resident or resident.state is not EvmState.PAUSED:
                return
            async with resident.lock:
                try:
                    await self._cont(resident)
                except EmpError as error:
                    log.info("%s: it is paused, and does not run again: %s", resident.name, error)

    async def _cont(self, resident: Resident) -> None:
        assembly, last = resident.assembly, self.journal.last(resident.name)
        if assembly is None or last is None or last.kind not in RUNNABLE:
            return  # its machine is gone, or a migration has it (rule R1)
        if resident.is_migrating:
            return
        match await assembly.machine.run_state():
            case RunState.IO_ERROR | RunState.PAUSED:
                await assembly.machine.cont()
            case RunState.FINISH_MIGRATE:  # it failed in pre-switchover: QEMU must be let go of
                await assembly.machine.cancel_stream()
            case RunState.RUNNING:  # its event has been missed
                resident.become(EvmState.RUNNING)
                self._set_clock(resident)
                self.changed.notify()

    async def _after_shutdown(self, resident: Resident) -> None:
        if resident.role is not None:
            await resident.role.until_final()
        while resident.assembly is not None and self._residents.get(resident.name) is resident:
            try:
                async with resident.lock:
                    if resident.assembly is not None:
                        await self._end(resident, EvmState.STOPPED, "shut down from inside")
            except EmpError as error:
                log.error("%s has shut down, and its end is not on disk yet: %s", resident.name, error)
                await asyncio.sleep(_AGAIN_S)

    async def _machine_gone(self, resident: Resident) -> None:
        if resident.is_migrating:
            return  # the migration decides what that means
        if resident.state in (EvmState.STOPPED, EvmState.CRASHED):
            return
        if resident.assembly is not None:
            assembly, resident.assembly = resident.assembly, None
            await assembly.dismantle()
        resident.become(EvmState.CRASHED, "its QEMU process ended")

    async def catch_up(self, name: str) -> None:
        """A migration has ended here; had its guest or its machine ended meanwhile, nobody would have noted it."""
        resident = self.get(name)
        with contextlib.suppress(OutcomeUnknown):
            try:
                if resident.assembly is not None and resident.state is EvmState.RUNNING:
                    self._stands(resident, await resident.assembly.machine.run_state())
                    self._set_clock(resident)
            except MachineGone:
                await self.crashed(resident, "its QEMU process ended")

    async def crashed(self, resident: Resident, reason: str) -> None:
        """A migration has ended with the machine gone: the EVM is here, and needs a cold restart."""
        if resident.assembly is not None:
            assembly, resident.assembly = resident.assembly, None
            await assembly.dismantle()
        resident.become(EvmState.CRASHED, reason)
        self.changed.notify()

    async def _ask_to_shut_down(self, resident: Resident, grace_s: float) -> None:
        """Press the power button, now and again: a guest that is booting has not heard it the first time."""
        assert resident.assembly is not None
        machine = resident.assembly.machine
        ended = asyncio.create_task(_until_shut_down(machine.events()), name=f"shutdown of {resident.name}")
        try:
            async with asyncio.timeout(grace_s):
                await machine.power_button()
                while not (await asyncio.wait({ended}, timeout=PRESS_AGAIN_S))[0]:
                    with contextlib.suppress(EmpError):  # busy shutting down
                        await machine.power_button()
            resident.reason = "shut down on request"
        except TimeoutError:
            resident.reason = f"powered off: the guest did not shut down within {grace_s:.0f} s"
        except EmpError as error:
            resident.reason = f"powered off: {error}"
        finally:
            ended.cancel()
            await asyncio.wait({ended})

    async def _end(self, resident: Resident, state: EvmState, reason: str) -> None:
        last = self.journal.last(resident.name)
        if last is not None and last.kind in OWNING:
            await self.journal.append(Record(RecordKind.STOPPED, resident.name, last.epoch))
        resident.become(state, reason)
        if resident.assembly is not None:
            await resident.assembly.relays.flush(resident.name)
            await resident.assembly.dismantle()
            resident.assembly = None
        self.changed.notify()

    async def _stop_following(self, resident: Resident) -> None:
        self.leave_clock(resident)
        if resident.follower is not None and resident.follower is not asyncio.current_task():
            resident.follower.cancel()
            await asyncio.gather(resident.follower, return_exceptions=True)

    async def close(self) -> None:
        """The agent stops; every EVM goes on."""
        for task in tuple(self._chores):
            task.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        for resident in self._residents.values():
            await self._stop_following(resident)
            if resident.assembly is not None:
                await resident.assembly.close()


async def _until_shut_down(events: AsyncIterator[MachineEvent]) -> None:
    async for event in events:
        if event.kind in (MachineEventKind.GUEST_SHUTDOWN, MachineEventKind.GONE):
            return
