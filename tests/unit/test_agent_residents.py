"""What a node says of a guest that stands because its storage fails, from QEMU's event or from its run state."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from emp.agent import guests
from emp.agent.journal import Journal
from emp.agent.resident import Resident
from emp.agent.residents import Residents
from emp.hypervisor.base import MachineEvent, MachineEventKind, NoGuestAgent, RunState
from emp.hypervisor.qemu.events import Broadcast
from emp.migration.records import Record, RecordKind
from emp.model.evm import EvmState

KIND = MachineEventKind


class Machine:
    def __init__(self) -> None:
        self.told = Broadcast()
        self.events = self.told.subscribe
        self.state = RunState.RUNNING
        self.conts = 0

    def tell(self, kind: KIND, detail: str | None = None) -> None:
        self.told.publish(MachineEvent(kind, time.time(), detail=detail))

    async def run_state(self) -> RunState:
        return self.state

    async def cont(self) -> None:
        """QEMU says RESUMED to each, and fails the same I/O again."""
        self.conts += 1
        self.tell(KIND.RESUMED)

    async def set_clock(self, *_: Any, **__: Any) -> None:
        raise NoGuestAgent("none here")


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
async def residents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Residents]:
    monkeypatch.setattr(guests, "_AGAIN_S", 0.01)
    journal = Journal.open(tmp_path / "journal")
    await journal.append(Record(RecordKind.OWN, "web", 3))
    made = Residents(journal, cast(Any, None), cast(Any, None), memory_bytes=1)
    yield made
    await made.close()
    journal.close()


def settled(residents: Residents, machine: Machine, state: RunState) -> Resident:
    async def close() -> None:
        pass

    machine.state = state
    entry = SimpleNamespace(spec=SimpleNamespace(name="web"), volumes=())
    assembly = SimpleNamespace(machine=machine, addresses=SimpleNamespace(tell=None), close=close)
    residents.settle(cast(Any, entry), cast(Any, assembly), state)
    return residents.get("web")


async def until(residents: Residents, resident: Resident, state: EvmState) -> None:
    async with asyncio.timeout(5):
        while resident.state is not state:
            await residents.changed.beyond(residents.changed.version)


async def until_tried(machine: Machine, times: int) -> None:
    async with asyncio.timeout(5):
        while machine.conts < times:  # noqa: ASYNC110 - the machine is not awaited by anybody else
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("found", "says"),
    [(RunState.RUNNING, "storage error: disk0: write: EIO"), (RunState.IO_ERROR, "storage error")],
    ids=["as it is told", "as an agent finds it that was restarted"],
)
async def test_a_guest_that_waits_for_its_storage_is_paused_until_its_io_goes_on(
    residents: Residents, machine: Machine, found: RunState, says: str
) -> None:
    """Each ``cont`` that tries the I/O again is answered by RESUMED, which says nothing of how that goes."""
    resident = settled(residents, machine, found)
    if found is RunState.RUNNING:
        machine.state = RunState.IO_ERROR
        machine.tell(KIND.IO_ERROR, "disk0: write: EIO")
        machine.tell(KIND.STOPPED)
    await until_tried(machine, 3)
    assert (resident.state, resident.reason) == (EvmState.PAUSED, says)
    machine.state = RunState.RUNNING
    await until(residents, resident, EvmState.RUNNING)
    assert (resident.reason, resident.waits_for_storage) == (None, False)


async def test_a_guest_that_was_stopped_for_something_else_runs_when_it_says_so(
    residents: Residents, machine: Machine
) -> None:
    resident = settled(residents, machine, RunState.PAUSED)
    assert (resident.state, resident.reason) == (EvmState.PAUSED, "the machine is paused")
    await until_tried(machine, 1)
    await until(residents, resident, EvmState.RUNNING)
    assert machine.conts == 1
