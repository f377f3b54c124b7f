"""An agent that takes back what runs on its node, where something stands in its way."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from emp.agent import adoption
from emp.agent.adoption import Adoption
from emp.hypervisor.base import MachineGone, RunState
from emp.migration.records import Record, RecordKind
from emp.model.errors import HypervisorError

LAST = Record(RecordKind.OWN, "web", 3, migration="m1")


class Monitor:
    """Of a machine that came back here and stands; it serves one client, and refuses the first ``cont``."""

    def __init__(self) -> None:
        self.clients = 0
        self.conts = 0

    async def adopt(self, spec: object, process: object) -> Any:
        assert self.clients == 0, "somebody is still connected"
        self.clients += 1
        machine = SimpleNamespace(run_state=self.run_state, cont=self.cont)
        return SimpleNamespace(machine=machine, close=self.close, open_ports=nothing, announce=nothing)

    async def run_state(self) -> RunState:
        return RunState.RUNNING if self.conts > 1 else RunState.POSTMIGRATE

    async def cont(self) -> None:
        self.conts += 1
        if self.conts == 1:
            raise HypervisorError("not now")

    async def close(self) -> None:
        self.clients -= 1


async def nothing(*_: object) -> frozenset[str]:
    return frozenset()


async def test_an_owner_whose_guest_may_not_run_at_once_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adoption, "AGAIN_S", 0.01)
    monitor, settled = Monitor(), list[RunState]()

    async def found() -> dict[str, object]:
        return {"web": "its process"}

    assembler = SimpleNamespace(
        hypervisor=SimpleNamespace(found=found),
        network=SimpleNamespace(leftovers=nothing),
        adopt=monitor.adopt,
        relays=SimpleNamespace(end_of=nothing),
    )
    residents = SimpleNamespace(
        assembler=assembler,
        shelf=SimpleNamespace(evms=set(), get=lambda evm: SimpleNamespace(spec=evm, volumes=())),
        note=lambda *_: None,
        unnote=lambda *_: None,
        settle=lambda entry, assembly, state: settled.append(state),
    )
    journal = SimpleNamespace(evms=("web",), last=lambda evm: LAST)
    claims = SimpleNamespace(begin=lambda *_, **__: None)
    made = Adoption(cast(Any, journal), cast(Any, residents), cast(Any, None), cast(Any, claims))
    assert await made.run() == ()
    assert settled == []
    async with asyncio.timeout(10):
        await made.go_on()
    assert (settled, monitor.conts) == ([RunState.RUNNING], 2)


@pytest.mark.parametrize("dies", [False, True])
async def test_a_machine_without_a_record_that_ends_as_it_is_looked_at_is_no_reason_for_quarantine(dies: bool) -> None:
    """Its agent was killed while it made it; it cannot have run, and nothing of it may stay."""
    cleared, dropped = list[str](), list[str]()

    async def adopt(spec: object, process: object) -> Any:
        if dies:
            raise MachineGone("the machine web has ended: killed")
        return SimpleNamespace(machine=SimpleNamespace(run_state=running), close=nothing)

    async def running() -> RunState:
        return RunState.RUNNING

    async def found() -> dict[str, object]:
        return {"web": SimpleNamespace(pid=7)}

    async def clear(evm: str, process: object) -> None:
        cleared.append(evm)

    assembler = SimpleNamespace(
        hypervisor=SimpleNamespace(found=found), network=SimpleNamespace(leftovers=nothing), adopt=adopt, clear=clear
    )
    entry = SimpleNamespace(spec="web", volumes=())
    shelf = SimpleNamespace(evms={"web"}, get=lambda evm: entry, drop=dropped.append)
    residents = SimpleNamespace(assembler=assembler, shelf=shelf)
    journal = SimpleNamespace(evms=(), last=lambda evm: None)
    strangers = await Adoption(*cast(Any, (journal, residents, None, None))).run()
    assert (strangers, cleared, dropped) == (((), ["web"], ["web"]) if dies else (("web",), [], []))
