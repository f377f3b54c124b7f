"""The EVMs that live on this node, and orders about them: boot, stop, change volumes, retire.

No agent boots a guest from its journal (rule R9): a start needs the controller's order with a fresh epoch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping

from emp.agent.assembly import Assembler, Assembly
from emp.agent.chores import Chores
from emp.agent.guests import Guests
from emp.agent.journal import Journal
from emp.agent.plugs import change_volumes
from emp.agent.resident import Resident
from emp.agent.shelf import Entry, Shelf
from emp.agent.signal import Signal
from emp.hypervisor.base import RunState
from emp.migration import admission
from emp.migration.records import RUNNABLE, Record, RecordKind
from emp.model.errors import Conflict, EmpError, HostError, NotFound, Refused, StaleEpoch, Unavailable
from emp.model.evm import EvmState
from emp.model.names import format_size
from emp.model.node import EvmReport
from emp.model.orders import RetireOrder, StartOrder, StopOrder, VolumeGrant, VolumesOrder

log = logging.getLogger(__name__)


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
        self._chores = Chores()
        self.guests = Guests(journal, self.changed, self._chores, self._is_here)

    # -- what is here

    def get(self, name: str) -> Resident:
        """Raise ``NotFound``."""
        try:
            return self._residents[name]
        except KeyError:
            raise NotFound(f"EVM {name!r} is not on this node", field="evm") from None

    def _is_here(self, resident: Resident) -> bool:
        return self._residents.get(resident.name) is resident

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
                self._chores.begin(resident.assembly.addresses.allow(addresses), f"addresses of {name}")

    def place(self, macs: Mapping[str, str]) -> None:
        """The controller's word on which other node has which MAC."""
        self._chores.begin(self._place(macs), "places of MACs")

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
            self.guests.begin(resident)
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
                    await self.guests.ask_to_shut_down(resident, order.grace_s)
                await self.guests.end(resident, EvmState.STOPPED, resident.reason or "stopped by request")
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

    def settle(self, entry: Entry, assembly: Assembly, state: RunState = RunState.RUNNING) -> Resident:
        """An EVM has come to live here: by a migration, or adopted after a restart, its machine in ``state``."""
        resident = Resident(entry, assembly, EvmState.RUNNING)
        self._residents[entry.spec.name] = resident
        self.guests.begin(resident)
        self.guests.stands(resident, state)
        return resident

    def note(self, entry: Entry, state: EvmState, reason: str | None) -> Resident:
        """An EVM whose machine is not there any more, but whose authority or end is."""
        resident = Resident(entry, None, state, reason)
        self._residents[entry.spec.name] = resident
        return resident

    def unnote(self, name: str) -> None:
        """What was noted of an EVM that could not be adopted is found out anew."""
        if (resident := self._residents.get(name)) and resident.state is EvmState.UNKNOWN:
            del self._residents[name]

    async def depart(self, name: str) -> None:
        """Another node owns it: nothing of it is left here, whoever has ended its machine."""
        await self._forget(name)
        self.shelf.drop(name)
        self.changed.notify()

    async def _forget(self, name: str) -> None:
        """Take away what is left of an EVM that has no authority here."""
        if resident := self._residents.pop(name, None):
            await self.guests.leave(resident)
            if resident.assembly is not None:
                await resident.assembly.dismantle()

    async def close(self) -> None:
        """The agent stops; every EVM goes on."""
        await self._chores.close()
        for resident in self._residents.values():
            await self.guests.leave(resident)
            if resident.assembly is not None:
                await resident.assembly.close()
