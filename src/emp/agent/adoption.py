"""Getting everything back after a restart of the agent: nothing happens to a guest that may run.

For each EVM the journal's last record decides, and what is alive on the node:

============  ==========================  =====================================================================
last record   its machine is alive        its machine is gone
============  ==========================  =====================================================================
OWN           adopted                     crashed: the controller decides about a cold restart
ACTIVATED     adopted; run if it stands   crashed
HANDOVER      the migration is aborted;   lost: OWN(e_s), the controller decides
              with its stream complete
              the target is asked first
GIVEN         GO is sent again            GO is sent again
PREPARED      asks its source             WITHDRAWN
others        killed: it has lost         -
none          **quarantine**: a machine without a record is not touched, and reported
============  ==========================  =====================================================================
"""

from __future__ import annotations

import asyncio
import logging

from emp.agent.assembly import Assembly
from emp.agent.claims import Claims
from emp.agent.journal import Journal
from emp.agent.migrations import Migrations
from emp.agent.relays import Side
from emp.agent.residents import Residents
from emp.agent.shelf import Entry
from emp.hypervisor.base import MachineGone, ProcessId, RunState, StreamStatus
from emp.migration.records import Record, RecordKind
from emp.migration.recovery import resume_source, resume_target
from emp.migration.sweep import Sweep, sweep, waits_for_its_owner
from emp.model.errors import EmpError, HostError
from emp.model.evm import EvmState

log = logging.getLogger(__name__)

AGAIN_S = 1.0


class Adoption:
    """One pass at the agent's start, before it takes orders."""

    def __init__(self, journal: Journal, residents: Residents, migrations: Migrations, claims: Claims) -> None:
        self._journal = journal
        self._residents = residents
        self._migrations = migrations
        self._claims = claims
        self._left: dict[str, Record] = {}
        """EVM -> last record, of those that could not be adopted yet"""

    async def run(self) -> tuple[str, ...]:
        """Take back what is here; return the names of machines in quarantine."""
        assembler = self._residents.assembler
        alive = dict(await assembler.hypervisor.found())
        ports = await assembler.network.leftovers()
        for evm in self._journal.evms:
            await self._try(evm, alive.pop(evm, None))
        for evm in self._residents.shelf.evms - set(self._journal.evms) - set(alive):
            await assembler.clear(evm, None)  # the agent died between the shelf and the journal
            self._residents.shelf.drop(evm)
        for evm in ports - set(self._journal.evms) - set(alive):
            await assembler.clear(evm, None)
        return tuple([evm for evm, process in alive.items() if not await self._never_ran(evm, process)])

    async def go_on(self) -> None:
        """Until everything is adopted: what hung while the agent started is tried again, unless it was retired."""
        while self._left:
            await asyncio.sleep(AGAIN_S)
            try:
                alive = await self._residents.assembler.hypervisor.found()
            except (EmpError, OSError) as error:
                log.error("what is left is not adopted yet: %s", error)
                continue
            for evm, last in tuple(self._left.items()):
                del self._left[evm]
                if self._journal.last(evm) == last:
                    self._residents.unnote(evm)
                    await self._try(evm, alive.get(evm))

    async def _try(self, evm: str, process: ProcessId | None) -> None:
        try:
            await self._take_back(evm, process)
        except (EmpError, OSError) as error:
            log.error("%s: not adopted: %s", evm, error)
            if entry := self._residents.shelf.get(evm):
                self._residents.note(entry, EvmState.UNKNOWN, f"could not be adopted: {error}")
            if last := self._journal.last(evm):
                self._left[evm] = last

    async def _never_ran(self, evm: str, process: ProcessId) -> bool:
        """A machine without a record: killed if it was still waiting for its stream, so that it cannot have run."""
        entry = self._residents.shelf.get(evm)
        try:
            if entry is not None:
                assembly = await self._residents.assembler.adopt(entry.spec, process)
                try:
                    waits = await assembly.machine.run_state() is RunState.INMIGRATE
                except BaseException:
                    await assembly.close()
                    raise
                if waits:
                    log.info("%s: its machine was made, and nothing was promised yet: it goes", evm)
                    await assembly.dismantle()
                    self._residents.shelf.drop(evm)
                    return True
                await assembly.close()
        except MachineGone:
            log.info("%s: its machine had no record in the journal, and has just ended", evm)
            await self._residents.assembler.clear(evm, None)
            self._residents.shelf.drop(evm)
            return True
        except EmpError as error:
            log.error("%s: %s", evm, error)
        log.error("%s: machine %d has no record in the journal: not touched", evm, process.pid)
        return False

    async def _take_back(self, evm: str, process: ProcessId | None) -> None:
        last = self._journal.last(evm)
        entry = self._residents.shelf.get(evm)
        if last is None:
            return
        found = sweep(last)
        if found is Sweep.CLEAR:
            await self._residents.assembler.clear(evm, process)
            relays = self._residents.assembler.relays
            if last.kind is not RecordKind.DONE:
                await relays.end_of(evm)
            elif last.migration:  # what was lent serves its target yet, which may not have been let write
                relays.let_through(last.migration)
            if last.kind is not RecordKind.STOPPED:
                self._residents.shelf.drop(evm)
            elif entry:
                self._residents.note(entry, EvmState.STOPPED, "shut down")
            return
        if entry is None:
            raise HostError(f"the journal has {last.kind} of {evm!r}, and its record is not on the shelf")
        assembly = await self._residents.assembler.adopt(entry.spec, process) if process else None
        try:
            if assembly is None:
                await self._residents.assembler.clear(evm, None)
            match found:
                case Sweep.OWNED:
                    await self._owned(last, entry, assembly)
                case Sweep.LEAVING:
                    await self._leaving(last, entry, assembly)
                case Sweep.ARRIVING:
                    await self._arriving(last, entry, assembly, process)
        except BaseException:
            if assembly is not None:
                await assembly.close()  # it is adopted again: a monitor of QEMU's serves one client
            raise

    async def _owned(self, last: Record, entry: Entry, assembly: Assembly | None) -> None:
        await self._residents.assembler.relays.end_of(last.evm, Side.LENT)  # before the guest runs beside one
        if assembly is None:
            self._residents.note(entry, EvmState.CRASHED, "its QEMU process ended while the agent was away")
            return
        state = await assembly.machine.run_state()
        stands = waits_for_its_owner(last, loaded=state is RunState.PAUSED, completed=state is RunState.POSTMIGRATE)
        if stands:
            # The record is on disk and only ``cont`` was missing: this is the owner (rule R1).
            await assembly.open_ports()
            await assembly.machine.cont()
            state = RunState.RUNNING
        if state is RunState.RUNNING:
            await assembly.open_ports()
            if stands or last.kind is RecordKind.ACTIVATED:  # the segment may not have heard that it is here
                await assembly.announce()
        self._residents.settle(entry, assembly, state)
        self._claims.begin(entry.volumes, epoch=last.epoch)  # the agent that wrote the record may not have come to it

    async def _leaving(self, last: Record, entry: Entry, assembly: Assembly | None) -> None:
        if entry.peer is None:
            raise HostError(f"the shelf does not know where {last.peer} is")
        completed = False
        if assembly is None:
            self._residents.note(entry, EvmState.PAUSED, "in a migration")
        else:
            # Both: a guest that has come back by the target's WITHDRAWN runs after ``completed`` (rule R10).
            state = await assembly.machine.run_state()
            completed = state is RunState.POSTMIGRATE
            completed = completed and (await assembly.machine.stream_info()).status is StreamStatus.COMPLETED
            self._residents.settle(entry, assembly, state)
        role, event = resume_source(last, alive=assembly is not None, completed=completed)
        self._migrations.resume_source(role, entry.peer, event)

    async def _arriving(self, last: Record, entry: Entry, assembly: Assembly | None, process: ProcessId | None) -> None:
        same = process is not None and (process.pid, process.start_ticks) == (last.pid, last.start_ticks)
        alive = assembly is not None and same
        loaded = broken = False
        if alive and assembly is not None:
            loaded = await assembly.machine.run_state() is RunState.PAUSED
            broken = not loaded and (await assembly.machine.stream_info()).status.ended_badly
        state, event = resume_target(last, alive=alive, loaded=loaded, broken=broken)
        self._migrations.resume_target(state, entry, assembly, event)
