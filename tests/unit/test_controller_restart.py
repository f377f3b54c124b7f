"""What becomes of a guest that has ended by itself, by its restart policy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.controller import restart
from emp.controller.restart import delay_s, wants_restart
from emp.model.errors import HypervisorError
from emp.model.evm import EvmState, RestartPolicy
from tests.fakes.pool import Pool, a_pool
from tests.fakes.values import a_spec, an_evm


@pytest.fixture
async def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    monkeypatch.setattr(restart, "FIRST_DELAY_S", 0.05)
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


@pytest.mark.parametrize(
    ("policy", "restarted"),
    [
        (RestartPolicy.NEVER, set()),
        (RestartPolicy.ON_FAILURE, {EvmState.PANICKED, EvmState.CRASHED}),
        (RestartPolicy.ALWAYS, {EvmState.PANICKED, EvmState.CRASHED, EvmState.STOPPED}),
    ],
)
def test_the_policy_decides_which_ends_are_followed_by_a_start(policy: RestartPolicy, restarted: set[EvmState]) -> None:
    spec = a_spec(restart=policy)
    assert {state for state in EvmState if wants_restart(an_evm(spec=spec, state=state))} == restarted


def test_what_is_stopped_by_request_or_migrating_is_not_restarted() -> None:
    spec = a_spec(restart=RestartPolicy.ALWAYS)
    assert not wants_restart(an_evm(spec=spec, state=EvmState.STOPPED, want_running=False))
    assert not wants_restart(an_evm(spec=spec, state=EvmState.CRASHED, migration="m-1"))
    assert not wants_restart(an_evm(spec=spec, state=EvmState.CRASHED, owner=None))


def test_the_delay_doubles_up_to_a_minute() -> None:
    assert [delay_s(n) for n in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert delay_s(10**6) == 60


async def test_a_crashed_evm_is_started_again_under_a_newer_epoch(pool: Pool) -> None:
    made = await pool.create("web", node="n1")
    pool.agents["n1"].set_state("web", EvmState.CRASHED, "its QEMU process ended")
    again = await pool.until("/v1/evms/web", lambda evm: evm["state"] == "running" and evm["epoch"] > made["epoch"])
    assert (again["owner"], again["reason"]) == ("n1", None)
    assert pool.agents["n1"].verbs() == ["start", "retire", "start"]


async def test_each_start_in_a_row_waits_longer_and_says_which_it_is(pool: Pool) -> None:
    agent = pool.agents["n1"]
    await pool.create("web", node="n1")
    agent.refuse["start"] = HypervisorError("no")
    agent.refuse_always.add("start")
    agent.set_state("web", EvmState.CRASHED, "its QEMU process ended")
    shown = await pool.until("/v1/evms/web", lambda evm: "restart 3" in (evm["reason"] or ""))
    assert "restart 3 after 0.2 s" in shown["reason"]
    del agent.refuse["start"]
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "running")


async def test_a_guest_that_shut_itself_down_stays_down(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n1"].set_state("web", EvmState.STOPPED, "shut down from inside")
    shown = await pool.until("/v1/evms/web", lambda evm: evm["state"] == "stopped")
    assert (shown["reason"], shown["want_running"]) == ("shut down from inside", True)
    await asyncio.sleep(0.2)  # four times the delay after which it would be started
    assert pool.agents["n1"].verbs() == ["start"]
    assert (await pool.post("/v1/evms/web/start"))["state"] == "running"


async def test_always_means_after_a_shutdown_from_inside_too(pool: Pool) -> None:
    made = await pool.create("web", node="n1", restart="always")
    pool.agents["n1"].set_state("web", EvmState.STOPPED, "shut down from inside")
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "running" and evm["epoch"] > made["epoch"])
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    await asyncio.sleep(0.2)  # four times the delay after which it would be started
    assert (await pool.get("/v1/evms/web"))["state"] == "stopped"


async def test_a_restart_that_was_due_is_made_after_a_restart_of_the_controller(pool: Pool) -> None:
    made = await pool.create("web", node="n1")
    await pool.stop()
    pool.agents["n1"].set_state("web", EvmState.PANICKED, "the guest's kernel panicked")
    await pool.start()
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "running" and evm["epoch"] > made["epoch"])


async def test_the_count_begins_anew_after_a_quiet_time(pool: Pool) -> None:
    assert pool.controller is not None
    book = pool.controller.services.book
    pool.controller.restarts.stable_s = 0.1
    await pool.create("web", node="n1")
    pool.agents["n1"].set_state("web", EvmState.CRASHED, "gone")
    async with asyncio.timeout(30):
        await book.until(lambda: book.upkeep.get("web").restarts == 1)
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "running")
    async with asyncio.timeout(30):
        await book.until(lambda: book.upkeep.get("web").restarts == 0)
