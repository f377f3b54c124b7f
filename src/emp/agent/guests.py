"""What guests do by themselves on this node, and what is done about it: pauses, shutdowns, crashes, clocks, ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from emp.agent import guest_clock
from emp.agent.chores import Chores
from emp.agent.journal import Journal
from emp.agent.resident import Resident
from emp.agent.signal import Signal
from emp.hypervisor.base import MachineEvent, MachineEventKind, MachineGone, RunState
from emp.migration.records import OWNING, RUNNABLE, Record, RecordKind
from emp.model.clock import GuestClock
from emp.model.errors import EmpError, OutcomeUnknown
from emp.model.evm import EvmState

log = logging.getLogger(__name__)

_AGAIN_S = 1.0
PRESS_AGAIN_S = 2.0
PANICKED = "the guest's kernel panicked"
STORAGE = "storage error"


class Guests:
    def __init__(self, journal: Journal, changed: Signal, chores: Chores, is_here: Callable[[Resident], bool]) -> None:
        """``is_here`` says whether it is still the one that the node knows by its name."""
        self._journal = journal
        self._changed = changed
        self._chores = chores
        self._is_here = is_here

    def begin(self, resident: Resident) -> None:
        """Its guest runs here from now on: listen to it."""
        resident.become(EvmState.RUNNING)
        if resident.assembly is not None:
            follow = self._follow(resident, resident.assembly.machine.events())
            resident.follower = asyncio.create_task(follow, name=f"resident {resident.name}")
            resident.assembly.addresses.tell = self._changed.notify
        self._set_clock(resident)
        self._changed.notify()

    # -- what happens

    def stands(self, resident: Resident, state: RunState) -> None:
        """Take over a state that no event has told of."""
        match state:
            case RunState.RUNNING:
                pass
            case RunState.SHUTDOWN:
                self._shut_down(resident)
            case RunState.IO_ERROR:
                self._wait_for_storage(resident)
            case RunState.GUEST_PANICKED:
                resident.become(EvmState.PANICKED, PANICKED)
            case _:
                resident.become(EvmState.PAUSED, f"the machine is {state}")
                self._let_run(resident)

    async def catch_up(self, resident: Resident) -> None:
        """A migration has ended here; had its guest or its machine ended meanwhile, nobody would have noted it."""
        with contextlib.suppress(OutcomeUnknown):
            try:
                if resident.assembly is not None and resident.state is EvmState.RUNNING:
                    self.stands(resident, await resident.assembly.machine.run_state())
                    self._set_clock(resident)
            except MachineGone:
                await self.crashed(resident, "its QEMU process ended")

    async def _follow(self, resident: Resident, events: AsyncIterator[MachineEvent]) -> None:
        async for event in events:
            await self._hear(resident, event)

    async def _hear(self, resident: Resident, event: MachineEvent) -> None:
        match event.kind:
            case MachineEventKind.GUEST_SHUTDOWN:
                self._shut_down(resident)
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
        self._changed.notify()

    def _wait_for_storage(self, resident: Resident, detail: str | None = None) -> None:
        resident.become(EvmState.PAUSED, ": ".join(filter(None, (STORAGE, detail))), waits_for_storage=True)
        self._let_run(resident)

    def _let_run(self, resident: Resident) -> None:
        self._chores.begin(self._until_it_runs(resident), f"pause of {resident.name}")

    async def _until_it_runs(self, resident: Resident) -> None:
        """Nobody pauses a guest on purpose: QEMU does instead of failing its I/O, and ``cont`` tries that again.

        It does not always say that it was for that: a volume that fails in the very moment of a migration's end leaves
        a guest that was stopped, and no event of a storage error.
        """
        while True:
            await asyncio.sleep(_AGAIN_S)  # and look then: right after ``cont`` the guest seems to run in any case
            if not self._is_here(resident) or resident.state is not EvmState.PAUSED:
                return
            async with resident.lock:
                try:
                    await self._cont(resident)
                except EmpError as error:
                    log.info("%s: it is paused, and does not run again: %s", resident.name, error)

    async def _cont(self, resident: Resident) -> None:
        assembly, last = resident.assembly, self._journal.last(resident.name)
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
                self._changed.notify()

    def _shut_down(self, resident: Resident) -> None:
        """The guest has shut itself down; its machine goes as soon as no migration holds it."""
        self._chores.begin(self._after_shutdown(resident), f"shutdown of {resident.name}")

    async def _after_shutdown(self, resident: Resident) -> None:
        if resident.role is not None:
            await resident.role.until_final()
        while resident.assembly is not None and self._is_here(resident):
            try:
                async with resident.lock:
                    if resident.assembly is not None:
                        await self.end(resident, EvmState.STOPPED, "shut down from inside")
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

    async def crashed(self, resident: Resident, reason: str) -> None:
        """A migration has ended with the machine gone: the EVM is here, and needs a cold restart."""
        if resident.assembly is not None:
            assembly, resident.assembly = resident.assembly, None
            await assembly.dismantle()
        resident.become(EvmState.CRASHED, reason)
        self._changed.notify()

    # -- its clock

    def _set_clock(self, resident: Resident) -> None:
        """The guest begins to run here, and its clock may be behind."""
        assembly = resident.assembly

        def may_go_on() -> bool:
            is_here = self._is_here(resident) and resident.assembly is assembly
            return is_here and resident.state is EvmState.RUNNING and not resident.is_migrating

        def told(clock: GuestClock) -> None:
            resident.clock = clock
            self._changed.notify()

        def done(task: asyncio.Task[None]) -> None:
            if resident.clock_setter is task:
                resident.clock_setter = None

        if assembly is not None and resident.clock_setter is None and may_go_on():
            setting = guest_clock.set_right(assembly.machine, may_go_on, told)
            resident.clock_setter = self._chores.add(setting, f"clock of {resident.name}")
            resident.clock_setter.add_done_callback(done)

    def leave_clock(self, resident: Resident) -> None:
        """It is not to be set now, as the guest stands or is about to be migrated; what was known of it is over."""
        resident.clock = None
        if resident.clock_setter is not None:
            resident.clock_setter.cancel()
            resident.clock_setter = None

    # -- its end

    async def ask_to_shut_down(self, resident: Resident, grace_s: float) -> None:
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

    async def end(self, resident: Resident, state: EvmState, reason: str) -> None:
        last = self._journal.last(resident.name)
        if last is not None and last.kind in OWNING:
            await self._journal.append(Record(RecordKind.STOPPED, resident.name, last.epoch))
        resident.become(state, reason)
        if resident.assembly is not None:
            await resident.assembly.relays.flush(resident.name)
            await resident.assembly.dismantle()
            resident.assembly = None
        self._changed.notify()

    async def leave(self, resident: Resident) -> None:
        """Listen to it no more."""
        self.leave_clock(resident)
        if resident.follower is not None and resident.follower is not asyncio.current_task():
            resident.follower.cancel()
            await asyncio.gather(resident.follower, return_exceptions=True)


async def _until_shut_down(events: AsyncIterator[MachineEvent]) -> None:
    async for event in events:
        if event.kind in (MachineEventKind.GUEST_SHUTDOWN, MachineEventKind.GONE):
            return
