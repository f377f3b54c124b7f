"""What happens to a migration from outside: an abort, a cut between its ends, an end that was away, other orders."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.controller import migrations, supervise
from emp.controller.sweep import end_of
from emp.model.errors import Conflict, Forbidden, OutcomeUnknown, Unreachable
from emp.model.evm import EvmState
from emp.model.migration import Outcome, Stage
from emp.model.node import OpenRole
from emp.model.orders import AbortOrder, AnswerOrder, RolePhase
from tests.fakes.agent import Script
from tests.fakes.pool import Pool, a_pool
from tests.fakes.values import a_migration
from tests.unit.test_controller_migrations import CLOSED, closed, migrate


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


# ------------------------------------------------------------------ an abort is answered


async def test_an_abort_is_answered_with_the_evm_back_although_the_target_hangs(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    path = f"/v1/migrations/{begun['id']}"
    await pool.until(path, lambda m: m["stage"] == "source-brownout")
    pool.agents["n2"].hold.clear()
    first = await pool.post(f"{path}/abort")
    second = await pool.post(f"{path}/abort")
    for answer in (first, second):
        assert (answer["outcome"], answer["committed"]) == ("aborted", False)
        assert answer["stage"] != CLOSED, "the target has yet to clear itself"
    pool.agents["n2"].hold.set()
    assert (await closed(pool, begun))["outcome"] == "aborted"


async def test_an_abort_in_the_preparation_is_answered_at_once(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n2"].hold.clear()
    begun = await migrate(pool, target="n2")
    await pool.agents["n2"].reached.wait()
    answer = await pool.post(f"/v1/migrations/{begun['id']}/abort")
    assert (answer["outcome"], answer["stage"]) == ("aborted", "preparation")
    pool.agents["n2"].hold.set()
    assert (await closed(pool, begun))["outcome"] == "aborted"
    assert "handover" not in pool.agents["n1"].verbs()


async def test_an_abort_that_the_source_cannot_hear_says_so(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "DECIDE_S", 0.3)
    await pool.create("web", node="n1")
    pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    path = f"/v1/migrations/{begun['id']}"
    await pool.until(path, lambda m: m["stage"] == "source-brownout")
    pool.agents["n1"].refuse["abort"] = Forbidden("not now")
    pool.agents["n1"].refuse_always.add("abort")
    for _ in range(2):
        with pytest.raises(OutcomeUnknown, match="n1 cannot be reached: not now") as caught:
            await pool.post(f"{path}/abort")
        assert f"emp agent abort {begun['id']}" in (caught.value.hint or "")
    pool.agents["n1"].refuse_always.clear()
    assert (await closed(pool, begun))["outcome"] == "aborted"


async def test_an_abort_that_came_too_late_gets_the_same_answer_for_good(pool: Pool) -> None:
    await pool.create("web", node="n1")
    script = pool.agents["n1"].script = Script()
    script.precopy.set()
    begun = await migrate(pool, target="n2")
    path = f"/v1/migrations/{begun['id']}"
    await pool.until(path, lambda m: m["stage"] == "blackout")
    asking = asyncio.create_task(pool.post(f"{path}/abort"))
    await pool.until(path, lambda m: m["abort_asked"])
    script.blackout.set()
    with pytest.raises(Conflict, match="committed: it only goes forward"):
        await asking
    script.clearing.set()
    await closed(pool, begun)
    with pytest.raises(Conflict, match="committed: it only goes forward"):
        await pool.post(f"{path}/abort")


# ------------------------------------------------------------------ the courier


async def test_words_are_carried_between_agents_that_cannot_reach_each_other(pool: Pool) -> None:
    await pool.create("web", node="n1")
    script = pool.agents["n1"].script = Script.free()
    script.cut = True
    pool.agents["n2"].refuse["go"] = Unreachable("no route")
    pool.agents["n2"].refuse_always.add("go")
    begun = await migrate(pool, target="n2")
    path = f"/v1/migrations/{begun['id']}"
    waits = await pool.until(path, lambda m: "cannot reach each other" in (m["hint"] or ""))
    assert (waits["committed"], waits["outcome"]) == (True, None)
    await pool.until(path, lambda m: "nor can they be reached: no route" in (m["hint"] or ""))
    pool.agents["n2"].refuse_always.clear()
    done = await closed(pool, begun)
    assert (done["outcome"], done["hint"]) == ("completed", None)
    assert (await pool.get("/v1/evms/web"))["owner"] == "n2"
    (answer,) = {(order.word, order.nonce) for verb, order in pool.agents["n1"].orders if verb == "answer"}
    assert answer == ("activated", done["nonce"])


# ------------------------------------------------------------------ what an end that was away still has


async def test_a_target_that_was_away_is_told_that_the_source_is_back(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    target = pool.agents["n2"]
    target.refuse["abort"] = Unreachable("no route")
    target.refuse_always.add("abort")
    await pool.lose("n2")
    await pool.post(f"/v1/migrations/{begun['id']}/abort")
    await closed(pool, begun)
    target.refuse_always.clear()
    target.refuse.clear()
    role = {"migration": begun["id"], "evm": "web", "role": "target", "phase": "switchover"}
    target.open_roles = (OpenRole(**role, epoch=begun["epoch_target"]),)
    told = len(target.orders)
    target.start_beating()
    async with asyncio.timeout(30):
        while len(target.orders) == told:
            target.reached.clear()
            await target.reached.wait()
    verb, order = target.orders[told]
    assert (verb, order.source_is_back) == ("abort", True)
    assert target.parts[begun["id"]].status.phase is RolePhase.WITHDRAWN


async def test_a_source_behind_its_commit_is_told_that_the_target_has_withdrawn(pool: Pool) -> None:
    """It got the order late, its target's machine died, and then it could not reach the target."""
    await pool.create("web", node="n1")
    source, target = pool.agents["n1"], pool.agents["n2"]
    source.script = Script()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    await pool.post(f"/v1/migrations/{begun['id']}/abort")
    await closed(pool, begun)
    assert target.parts[begun["id"]].status.phase is RolePhase.WITHDRAWN
    part = source.parts[begun["id"]]
    await part.move(RolePhase.GIVEN, Stage.BLACKOUT, committed=True)
    role = {"migration": begun["id"], "evm": "web", "role": "source", "phase": "given"}
    source.open_roles = (OpenRole(**role, epoch=begun["epoch_target"]),)
    async with asyncio.timeout(30), part.changed:
        await part.changed.wait_for(lambda: part.status.phase is RolePhase.ABORTED)
    (answer,) = {(order.word, order.nonce) for verb, order in source.orders if verb == "answer"}
    assert answer == ("withdrawn", begun["nonce"] or "p1")


async def test_a_lost_source_that_comes_back_ends_its_relays(pool: Pool) -> None:
    """The volume has been taken over from it; its relay is a process of its own, and did not die with its agent."""
    await pool.create("web", node="n1")
    source = pool.agents["n1"]
    source.script = Script()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    source.lending = (begun["id"], "m-unknown")
    await source.beat()
    assert "take back" not in {verb for verb, _ in source.orders}, "it is needed yet"
    await pool.post(f"/v1/migrations/{begun['id']}/abort")
    await closed(pool, begun)
    told = len(source.orders)
    await source.beat()
    async with asyncio.timeout(30):
        while "take back" not in {verb for verb, _ in source.orders[told:]}:
            source.reached.clear()
            await source.reached.wait()
    assert [order.volumes for verb, order in source.orders[told:] if verb == "take back"] == [None]


async def test_the_last_word_of_a_node_in_doubt_is_taken_once_it_is_believed(pool: Pool) -> None:
    await pool.create("web", node="n1")
    source = pool.agents["n1"]
    script = source.script = Script.free()
    script.clearing.clear()
    source.journal_id, source.journal_seq = "j", 9
    await source.beat()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "target-brownout")
    source.boot_id, source.journal_seq = "again", 8  # an older disk
    await source.beat()
    assert source.quarantine is not None
    script.clearing.set()
    part = source.parts[begun["id"]]
    async with asyncio.timeout(30), part.changed:
        await part.changed.wait_for(lambda: part.status.phase is RolePhase.DONE)
    await asyncio.sleep(2 * supervise.REWATCH_S)  # in which its word is heard, and not taken
    source.journal_seq = 10
    await source.beat()
    await pool.post("/v1/nodes/n1/readmit", {"confirm": True})
    assert (await closed(pool, begun))["outcome"] == "completed"


@pytest.mark.parametrize(
    ("outcome", "role", "runs_elsewhere", "told"),
    [
        (Outcome.ABORTED, "target", False, ("abort", True)),
        (Outcome.ABORTED, "source", False, ("abort", False)),
        (Outcome.COMPLETED, "source", True, ("answer", "activated")),
        (Outcome.COMPLETED, "target", False, None),
        (Outcome.LOST, "target", False, ("abort", False)),
        (Outcome.LOST, "target", True, ("abort", True)),
        (None, "target", False, ("abort", False)),
        (None, "target", True, ("abort", True)),
        (None, "source", False, ("abort", False)),
    ],
)
def test_what_a_left_over_end_is_told(outcome: Outcome | None, role: str, runs_elsewhere: bool, told: object) -> None:
    """``None``: there is no record of the migration. A loaded copy goes only if the EVM is known to be elsewhere."""
    record = None if outcome is None else a_migration(stage=Stage.CLOSED, outcome=outcome, nonce="p1")
    order = end_of(
        record,
        OpenRole(migration="m-1", evm="web", role=role, phase="prepared", epoch=2),
        runs_elsewhere=runs_elsewhere,
    )
    match order:
        case AbortOrder():
            assert told == ("abort", order.source_is_back)
        case AnswerOrder():
            assert (told, order.nonce) == (("answer", order.word), "p1")
        case None:
            assert told is None


# ------------------------------------------------------------------ life goes on meanwhile


async def test_a_deletion_aborts_the_migration_first(pool: Pool) -> None:
    made = await pool.create("web", node="n1", volumes=["io2:16MiB"])
    pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    await pool.delete("/v1/evms/web")
    over = await pool.get(f"/v1/migrations/{begun['id']}")
    assert (over["outcome"], over["cause"]) == ("aborted", "asked")
    assert over["abort_asked"] == "EVM web is to be deleted"
    assert pool.agents["n1"].evms == pool.agents["n2"].evms == {}
    assert made["spec"]["volumes"][0] not in pool.volumes.volumes


async def test_a_deletion_waits_for_a_migration_that_is_committed(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    await pool.create("web", node="n1")
    script = pool.agents["n1"].script = Script()
    script.precopy.set()
    script.blackout.set()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["committed"])
    monkeypatch.setattr(migrations, "END_S", 0.2)
    with pytest.raises(OutcomeUnknown, match=f"migration {begun['id']} is committed"):
        await pool.delete("/v1/evms/web")
    assert (await pool.get("/v1/evms/web"))["migration"] == begun["id"], "nothing has been deleted"
    monkeypatch.setattr(migrations, "END_S", 30.0)
    deleting = asyncio.create_task(pool.delete("/v1/evms/web"))
    script.clearing.set()
    await deleting
    assert (await pool.get(f"/v1/migrations/{begun['id']}"))["outcome"] == "completed"
    assert pool.agents["n2"].evms == {}


async def test_a_guest_that_shuts_down_or_reboots_meanwhile_is_as_its_owner_says(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    await pool.agents["n1"].beat()  # rebooted from inside: QEMU resets, the same machine goes on, nothing is told
    assert (await pool.get("/v1/evms/web"))["state"] == "migrating"
    pool.agents["n1"].set_state("web", EvmState.STOPPED, "shut down from inside")
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "stopped")
    await pool.post(f"/v1/migrations/{begun['id']}/abort")
    await closed(pool, begun)
    assert (await pool.get("/v1/evms/web"))["state"] == "stopped", "and it stays so: nothing restarts it"


async def test_there_is_no_verb_but_those_that_have_an_answer(pool: Pool) -> None:
    """``docs/during-a-migration.md`` has a row for each; a new one needs an answer there."""
    verbs = {
        path.split("/")[4] for path in (await pool.get("/openapi.json"))["paths"] if path.startswith("/v1/evms/{name}/")
    }
    assert verbs == {"start", "recover", "stop", "console", "migrations", "volumes", "network", "clock"}
