"""``emp agent status|abort`` against an agent that only answers, at a unix socket: there is no controller at all."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from emp.model.errors import NotFound
from emp.model.migration import Stage
from emp.model.orders import AbortOrder, LocalStatus, Role, RolePhase, RoleStatus
from emp.wire.faults import install_error_handlers
from emp.wire.serve import Listener, Server
from tests.unit.test_cli_canned import ID, N1
from tests.unit.test_cli_run import Emp, in_process

COPYING = RoleStatus(migration=ID, evm="web", role=Role.SOURCE, phase=RolePhase.PRECOPY, stage=Stage.SOURCE_BROWNOUT)


class Agent:
    """Answers at ``path`` as it is told; ``asked`` are the aborts that came."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.report = N1.report.model_copy(update={"journal_id": "j-1", "journal_seq": 7})
        self.roles: tuple[RoleStatus, ...] = (COPYING,)
        self.after_abort = COPYING.model_copy(update={"phase": RolePhase.ABORTED})
        self.asked: list[tuple[str, AbortOrder]] = []
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self._thread.start()
        assert self._ready.wait(20)

    def _app(self) -> FastAPI:
        app = FastAPI()
        install_error_handlers(app)

        @app.get("/v1/status")
        async def status() -> LocalStatus:
            return LocalStatus(node=self.report, roles=self.roles)

        @app.post("/v1/migrations/{migration}/abort")
        async def abort(migration: str, order: AbortOrder) -> RoleStatus:
            if migration != ID:
                raise NotFound(f"no part in migration {migration}", field="migration")
            self.asked.append((migration, order))
            return self.after_abort

        return app

    async def _serve(self) -> None:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(self.path))
        listening.listen()
        async with Server(self._app(), [Listener(listening, None)], pool="meadow"):
            self._ready.set()
            await self._over.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path / "agent.sock")
    yield made
    made.close()


@pytest.fixture
def emp(capsys: pytest.CaptureFixture[str]) -> Emp:
    return in_process(capsys)


def test_status_shows_the_node_and_its_part_in_migrations(agent: Agent, emp: Emp) -> None:
    code, out, _ = emp(f"agent status --socket {agent.path}")
    assert code == 0
    for word in ("n1", "web (running)", "j-1 at record 7", ID, "source", "pre-copy"):
        assert word in out
    agent.roles = ()
    assert "no part in a migration" in emp(f"agent status --socket {agent.path}")[1]
    found = json.loads(emp(f"agent status --socket {agent.path} --json")[1])
    assert LocalStatus.model_validate(found) == LocalStatus(node=agent.report, roles=())


@pytest.mark.parametrize("which", [ID, "web"])
def test_abort_says_that_the_evm_is_back(agent: Agent, emp: Emp, which: str) -> None:
    code, out, _ = emp(f"agent abort {which} --reason broken --wait 2s --socket {agent.path}")
    assert (code, out) == (0, f"{ID}: web is back here, running\n")
    assert agent.asked == [(ID, AbortOrder(reason="broken", wait_s=2.0))]
    found = json.loads(emp(f"agent abort {which} --socket {agent.path} --json")[1])
    assert RoleStatus.model_validate(found) == agent.after_abort


@pytest.mark.parametrize(
    ("role", "phase", "committed", "exit_code", "says"),
    [
        (Role.TARGET, RolePhase.WITHDRAWN, False, 0, "has not run here"),
        (Role.SOURCE, RolePhase.GIVEN, True, 4, "web goes to the target"),
        (Role.SOURCE, RolePhase.DONE, True, 4, "only goes forward"),
        (Role.TARGET, RolePhase.RUNNING, True, 4, "web goes here"),
        (Role.TARGET, RolePhase.ACTIVATED, True, 4, "web goes here"),
        (Role.SOURCE, RolePhase.ABORTING, False, 8, "not decided yet: aborting"),
        (Role.TARGET, RolePhase.PREPARED, False, 8, "not decided yet"),
        (Role.SOURCE, RolePhase.LOST, False, 10, "emp evm recover web"),
    ],
)
def test_abort_says_what_else_came_of_it(
    agent: Agent, emp: Emp, role: Role, phase: RolePhase, committed: bool, exit_code: int, says: str
) -> None:
    agent.after_abort = COPYING.model_copy(update={"role": role, "phase": phase, "committed": committed})
    code, out, err = emp(f"agent abort {ID} --socket {agent.path}")
    assert code == exit_code
    assert says in out + err


def test_an_evm_that_does_not_migrate_here_is_named(agent: Agent, emp: Emp) -> None:
    code, _, err = emp(f"agent abort shop --socket {agent.path}")
    assert (code, "no part in a migration of shop" in err) == (3, True)
    agent.roles = (COPYING.model_copy(update={"phase": RolePhase.DONE}),)
    assert emp(f"agent abort web --socket {agent.path}")[0] == 3
    assert emp(f"agent abort m-ffffffff --socket {agent.path}")[0] == 3
    assert emp(f"agent abort web --wait 1min --socket {agent.path}")[0] == 2
    assert agent.asked == []


def test_without_an_agent_it_says_where_it_looked(tmp_path: Path, emp: Emp) -> None:
    missing = tmp_path / "nothing.sock"
    code, _, err = emp(f"agent status --socket {missing}")
    assert (code, str(missing) in err, "root" in err) == (7, True, True)
    code, _, err = emp(f"agent abort {ID} --socket {missing} --json")
    assert (code, json.loads(err)["code"]) == (7, "unreachable")


def test_an_agent_that_hangs_leaves_the_outcome_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emp: Emp
) -> None:
    monkeypatch.setattr("emp.client.local.TIMEOUT_S", 0.2)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "agent.sock"))
        deaf.listen()
        code, _, err = emp(f"agent abort {ID} --wait 0s --socket {tmp_path / 'agent.sock'}")
    assert (code, "may or may not" in err) == (8, True)


def test_the_daemon_and_its_verbs_have_one_help(emp: Emp) -> None:
    code, out, _ = emp("agent --help")
    assert code == 0
    for word in ("--config", "status", "abort"):
        assert word in out
    code, _, err = emp("agent")
    assert (code, "--config" in err) == (2, True)
