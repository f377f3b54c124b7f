"""A node that is lost: nothing of it starts elsewhere without proof, and it comes back without its old authority."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.controller import trust
from emp.controller.patience import until_known
from emp.fencing.manual import ManualFence
from emp.model.errors import BadInput, Conflict, FenceFailed, NodeDown, NoPlacement, NotFound, Refused, Unavailable
from emp.model.evm import EvmState
from emp.model.node import Fence
from tests.fakes.agent import Script
from tests.fakes.pool import Pool, a_pool
from tests.fakes.values import GIB, a_node, a_report


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


async def fence(pool: Pool, node: str = "n1", **body: Any) -> Any:
    return await pool.post(f"/v1/nodes/{node}/fence", {"confirm": True} | body)


async def come_back(pool: Pool, node: str = "n1") -> None:
    """The node was switched on: a new agent reports, and finds no machine."""
    pool.agents[node].reboot()
    pool.agents[node].start_beating()


# ------------------------------------------------------------------ fence, recover, return


async def test_a_lost_nodes_evm_starts_elsewhere_only_behind_a_fence(pool: Pool) -> None:
    made = await pool.create("web", node="n1", volumes=["io2:16MiB"])
    (volume,) = made["spec"]["volumes"]
    await pool.lose("n1")
    with pytest.raises(NodeDown, match="EVM web may run on n1: node n1 is down") as refused:
        await pool.post("/v1/evms/web/recover")
    assert "emp node fence n1 --confirm" in (refused.value.hint or "")
    assert pool.volumes.holders(volume) == {"n1": made["epoch"]}, "nothing has been done"

    fenced = await fence(pool, reason="ada: it burns")
    assert (fenced["fence"]["driver"], fenced["fence"]["by"], fenced["ready"]) == ("lab", "ada: it burns", False)
    assert pool.power.off == {"n1"}
    shown = await pool.get("/v1/evms/web")
    assert (shown["state"], shown["reason"]) == ("unknown", "node n1 is fenced")

    recovered = await pool.post("/v1/evms/web/recover")
    assert (recovered["owner"], recovered["state"]) == ("n2", "running")
    assert pool.volumes.holders(volume) == {"n2": recovered["epoch"]}
    retire = (await pool.get("/v1/nodes/n1"))["fence"]["retire"]
    assert made["epoch"] < retire["web"] < recovered["epoch"]

    await come_back(pool)
    back = await pool.until("/v1/nodes/n1", lambda node: node["fence"] is None)
    assert back["ready"]
    assert ("retire", retire["web"]) in [
        (verb, order.epoch) for verb, order in pool.agents["n1"].orders if verb != "start"
    ]
    assert pool.power.off == set()
    assert (await pool.get("/v1/evms/web"))["owner"] == "n2"
    assert (await pool.create("db", node="n1"))["state"] == "running"


async def test_without_confirm_it_says_what_it_would_do(pool: Pool) -> None:
    await pool.create("web", node="n1")
    with pytest.raises(BadInput, match="switches n1 off") as said:
        await pool.post("/v1/nodes/n1/fence")
    assert "EVMs there: web" in said.value.message
    assert (said.value.field, said.value.hint) == ("confirm", "do it: emp node fence n1 --confirm")
    assert pool.power.off == set()
    with pytest.raises(NotFound):
        await fence(pool, "n9")


async def test_a_fence_that_is_not_proven_is_none(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.lose("n1")
    pool.power.failing["fence"] = FenceFailed("n1 is on, says its switch")
    with pytest.raises(FenceFailed, match="n1 is on"):
        await fence(pool)
    assert (await pool.get("/v1/nodes/n1"))["fence"] is None
    with pytest.raises(NodeDown):
        await pool.post("/v1/evms/web/recover")


async def test_a_persons_word_is_not_taken_against_a_node_that_answers(pool: Pool, tmp_path: Path) -> None:
    assert pool.controller is not None
    pool.controller.services.fences._driver = ManualFence()
    with pytest.raises(Refused, match="its agent answers"):
        await fence(pool)
    await pool.lose("n1")
    assert (await fence(pool))["fence"]["driver"] == "manual"


async def test_a_late_word_of_the_fenced_process_lifts_nothing(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.lose("n1")
    await fence(pool)
    await pool.agents["n1"].beat()  # the same process: it was on its way, or the node never was off
    node = await pool.get("/v1/nodes/n1")
    assert node["fence"] is not None and not node["ready"]
    assert "it is fenced" in (pool.agents["n1"].quarantine or "")


async def test_until_it_has_retired_what_was_taken_it_stays_quarantined(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.lose("n1")
    await fence(pool)
    await pool.post("/v1/evms/web/recover")
    agent = pool.agents["n1"]
    agent.refuse["retire"] = Unavailable("the journal cannot be written")
    agent.refuse_always.add("retire")
    await come_back(pool)
    await pool.until("/v1/nodes/n1", lambda node: node["ready"])
    while "retire" not in agent.verbs():
        await agent.beat()
    assert "it is fenced" in (agent.quarantine or "")
    assert (await pool.get("/v1/nodes/n1"))["fence"] is not None
    for what in (pool.create("db", node="n1"), pool.post("/v1/evms/web/migrations", {"target": "n1"})):
        with pytest.raises((Refused, Unavailable), match="it is fenced"):
            await what
    agent.refuse_always.clear()
    agent.refuse.clear()
    await pool.until("/v1/nodes/n1", lambda node: node["fence"] is None)
    assert "web" not in agent.evms


async def test_what_was_not_taken_from_it_counts_again_once_it_is_back(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.lose("n1")
    await fence(pool)
    await come_back(pool)
    await pool.until("/v1/nodes/n1", lambda node: node["fence"] is None)
    shown = await pool.until("/v1/evms/web", lambda evm: evm["state"] != "unknown")
    assert shown["owner"] == "n1"


async def test_a_deletion_behind_a_fence_is_owed_too(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.lose("n1")
    with pytest.raises(NodeDown, match="may run on n1"):
        await pool.delete("/v1/evms/web")
    await fence(pool)
    await pool.delete("/v1/evms/web")
    assert list((await pool.get("/v1/nodes/n1"))["fence"]["retire"]) == ["web"]
    await come_back(pool)
    await pool.until("/v1/nodes/n1", lambda node: node["fence"] is None)
    assert pool.agents["n1"].evms == {}


async def test_fences_and_what_is_owed_outlive_a_restart(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.lose("n1")
    await fence(pool)
    await pool.post("/v1/evms/web/recover")
    lost = pool.agents.pop("n1")
    await pool.restart()
    assert list((await pool.get("/v1/nodes/n1"))["fence"]["retire"]) == ["web"]
    pool.agents["n1"] = lost
    await lost.forget_controller()
    await come_back(pool)
    await pool.until("/v1/nodes/n1", lambda node: node["fence"] is None)
    assert "web" not in lost.evms


async def test_a_start_that_waits_for_a_dead_node_says_so_and_goes_on_once_it_is_fenced(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    agent = pool.agents["n1"]
    agent.refuse["retire"] = Unavailable("no answer")
    agent.refuse_always.add("retire")
    starting = asyncio.create_task(pool.post("/v1/evms/web/start", {"node": "n2"}))
    shown = await pool.until("/v1/evms/web", lambda evm: "waiting" in (evm["reason"] or ""))
    assert "waiting for n1, which may hold it: no answer" in shown["reason"]
    assert "emp node fence n1 --confirm" in shown["reason"]
    await agent.stop_beating()
    await fence(pool)
    assert (await starting)["owner"] == "n2"


async def test_a_start_on_a_node_that_is_fenced_meanwhile_ends(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    pool.agents["n2"].refuse["start"] = Unavailable("no answer")
    pool.agents["n2"].refuse_always.add("start")
    starting = asyncio.create_task(pool.post("/v1/evms/web/start", {"node": "n2"}))
    await pool.until("/v1/evms/web", lambda evm: "waiting" in (evm["reason"] or ""))
    await fence(pool, "n2")
    with pytest.raises(Conflict, match="node n2 is fenced"):
        await starting
    await pool.until("/v1/evms/web", lambda evm: evm["state"] in ("crashed", "stopped"))
    assert (await pool.post("/v1/evms/web/recover"))["owner"] == "n1"
    assert list((await pool.get("/v1/nodes/n2"))["fence"]["retire"]) == ["web"], "it may have got the order"


async def test_a_node_that_turned_out_to_own_it_must_give_it_up_too(pool: Pool) -> None:
    """The controller had missed a hand-over, as after its store was restored: who attests the newer epoch holds it."""
    made = await pool.create("web", node="n1")
    pool.agents["n1"].evms.clear()
    pool.agents["n2"].arrive("web", made["epoch"] + 9)
    await pool.agents["n2"].beat()
    assert (await pool.get("/v1/evms/web"))["owner"] == "n2"
    await pool.lose("n2")
    with pytest.raises(NodeDown, match="may run on n2"):
        await pool.post("/v1/evms/web/recover")


async def test_fenced_and_quarantined_nodes_are_counted(pool: Pool) -> None:
    await pool.lose("n1")
    await fence(pool)
    pool.agents["n2"].journal_id = "j1"
    await pool.agents["n2"].beat()
    pool.agents["n2"].boot_id, pool.agents["n2"].journal_id = "c", "j2"
    await pool.agents["n2"].beat()
    lines = (await pool.api._client.get("/metrics")).text.splitlines()
    for line in ('emp_nodes{state="down"} 1.0', 'emp_nodes{state="fenced"} 1.0', 'emp_nodes{state="quarantined"} 1.0'):
        assert line in lines


async def test_an_evm_that_runs_needs_no_recovery(pool: Pool) -> None:
    await pool.create("web", node="n1")
    with pytest.raises(Conflict, match="needs no recovery: it is running on n1"):
        await pool.post("/v1/evms/web/recover")


async def test_a_fenced_node_is_asked_now_and_then_and_not_all_the_time(pool: Pool) -> None:
    assert pool.controller is not None
    await pool.lose("n2")
    await fence(pool, "n2")
    asked = 0

    async def ask() -> None:
        nonlocal asked
        asked += 1
        raise Unavailable("no answer")

    services = pool.controller.services
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3.0):
            await until_known(services.book, services.nodes, "n2", ask)
    assert 1 < asked < 10


async def test_a_migration_is_not_given_up_for_an_evm_that_fits_nowhere(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n1"].script = Script()
    begun = await pool.post("/v1/evms/web/migrations", {"target": "n2"})
    path = f"/v1/migrations/{begun['id']}"
    await pool.until(path, lambda m: m["stage"] == "source-brownout")
    await pool.lose("n1")
    await fence(pool)
    await pool.post("/v1/nodes/n2/cordon")
    with pytest.raises(NoPlacement, match="n2: cordoned"):
        await pool.post("/v1/evms/web/recover")
    assert (await pool.get(path))["stage"] != "closed"
    await pool.post("/v1/nodes/n2/uncordon")
    assert (await pool.post("/v1/evms/web/recover"))["owner"] == "n2"


# ------------------------------------------------------------------ a migration that was lost


async def test_a_migration_whose_end_is_lost_is_given_up_only_behind_a_fence(pool: Pool) -> None:
    made = await pool.create("web", node="n1", volumes=["io2:16MiB"])
    await pool.add_agent("n3")
    pool.agents["n1"].script = Script()
    begun = await pool.post("/v1/evms/web/migrations", {"target": "n2"})
    path = f"/v1/migrations/{begun['id']}"
    await pool.until(path, lambda m: m["stage"] == "source-brownout")
    with pytest.raises(Conflict, match="is open, and neither end is lost"):
        await pool.post("/v1/evms/web/recover")
    await pool.lose("n1")
    waits = await pool.until(path, lambda m: m["hint"])
    assert "waits for n1" in waits["hint"] and "emp node fence n1 --confirm" in waits["hint"]
    with pytest.raises(NodeDown, match="may run on n1"):
        await pool.post("/v1/evms/web/recover")
    await fence(pool)
    recovered = await pool.post("/v1/evms/web/recover", {"node": "n3"})
    assert (recovered["owner"], recovered["migration"]) == ("n3", None)
    closed = await pool.get(path)
    assert (closed["stage"], closed["outcome"]) == ("closed", "lost")
    assert "retire" in pool.agents["n2"].verbs(), "the end that answers has sworn it"
    assert list((await pool.get("/v1/nodes/n1"))["fence"]["retire"]) == ["web"]
    assert pool.volumes.holders(made["spec"]["volumes"][0]) == {"n3": recovered["epoch"]}


# ------------------------------------------------------------------ quarantine


async def test_an_older_journal_is_quarantined_until_a_person_readmits_it(pool: Pool) -> None:
    agent = pool.agents["n1"]
    agent.journal_id, agent.journal_seq = "j1", 40
    await pool.create("web", node="n1")
    await agent.beat()
    assert (await pool.get("/v1/nodes/n1"))["journal_seq"] == 40
    agent.boot_id, agent.journal_seq = "after the restore", 33
    agent.set_state("web", EvmState.STOPPED, "so says an old journal")
    assert "record 33, and it had reported 40" in ((await agent.beat()).quarantine or "")
    shown = await pool.until("/v1/evms/web", lambda evm: evm["state"] == "unknown")
    assert "node n1 cannot speak for it: it is quarantined" in shown["reason"]
    with pytest.raises(NoPlacement, match="n1: it is quarantined"):
        await pool.create("big", memory_bytes=64 * GIB)
    with pytest.raises(NodeDown, match="emp node readmit n1 --confirm"):
        await pool.post("/v1/evms/web/recover")
    agent.journal_seq = 50  # going on from there does not make it right
    assert (await agent.beat()).quarantine

    with pytest.raises(BadInput, match="takes what that journal says for the truth"):
        await pool.post("/v1/nodes/n1/readmit")
    assert (await pool.post("/v1/nodes/n1/readmit", {"confirm": True}))["quarantine"] is None
    assert (await agent.beat()).quarantine is None
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "stopped")
    with pytest.raises(Conflict, match="not quarantined"):
        await pool.post("/v1/nodes/n1/readmit", {"confirm": True})


async def test_another_journal_is_quarantined_and_remembered_over_a_restart(pool: Pool) -> None:
    agent = pool.agents["n1"]
    agent.journal_id, agent.journal_seq = "j1", 4
    await agent.beat()
    await pool.stop()
    agent.boot_id, agent.journal_id, agent.journal_seq = "new disk", "j2", 90
    await pool.start()
    assert "another one than it had" in (agent.quarantine or "")
    await pool.restart()
    assert agent.quarantine
    with pytest.raises(Unavailable, match="it is quarantined"):
        await pool.create("web", node="n1")


async def test_the_word_of_a_quarantined_end_moves_no_migration(pool: Pool) -> None:
    agent = pool.agents["n2"]
    agent.journal_id, agent.journal_seq = "j1", 4
    await agent.beat()
    await pool.create("web", node="n1")
    script = pool.agents["n1"].script = Script()
    script.precopy.set()
    begun = await pool.post("/v1/evms/web/migrations", {"target": "n2"})
    path = f"/v1/migrations/{begun['id']}"
    await pool.until(path, lambda m: m["stage"] == "blackout")
    agent.boot_id, agent.journal_id = "new disk", "j2"
    await agent.beat()
    script.blackout.set()
    await pool.until(path, lambda m: m["committed"])
    assert (await pool.get("/v1/evms/web"))["owner"] == "n1", "it runs on n2, but n2 cannot speak for it"
    await pool.post("/v1/nodes/n2/readmit", {"confirm": True})
    script.clearing.set()
    await pool.until(path, lambda m: m["outcome"] == "completed")


def test_what_an_agent_distrusts_by_itself_needs_no_readmission_once_it_is_repaired() -> None:
    first = trust.heard(None, a_report("n1", journal_id="j", journal_seq=9), at_s=0.0)
    torn = a_report("n1", boot_id="c", journal="line 9 is torn", journal_id="a makeshift one", journal_seq=0)
    distrusted = trust.heard(first, torn, at_s=0.0)
    assert trust.doubt(distrusted) == "its journal cannot be trusted: line 9 is torn"
    assert "start its agent again" in trust.remedy(distrusted)
    repaired = trust.heard(distrusted, a_report("n1", boot_id="d", journal_id="j", journal_seq=9), at_s=0.0)
    assert trust.doubt(repaired) is None
    behind = trust.heard(distrusted, a_report("n1", boot_id="d", journal_id="j", journal_seq=8), at_s=0.0)
    assert behind.quarantine
    stranger = trust.heard(None, torn, at_s=0.0)
    assert (stranger.journal_id, stranger.journal_seq) == ("", 0)


def test_a_report_that_was_overtaken_is_no_older_journal() -> None:
    known = a_node("n1", journal_id="j", journal_seq=9, boot_id="b").model_copy(
        update={"journal_id": "j", "journal_seq": 9}
    )
    late = a_report("n1", journal_id="j", journal_seq=8, boot_id="b")
    assert trust.is_late(known, late)
    assert not trust.is_late(known, late.model_copy(update={"boot_id": "c"}))
    assert trust.heard(known, late.model_copy(update={"boot_id": "c"}), at_s=0.0).quarantine
    assert trust.heard(known, late.model_copy(update={"journal_seq": 9}), at_s=0.0).quarantine is None
    fenced = known.model_copy(update={"fence": Fence(driver="lab", by="x", at_s=0.0, boot_id="b")})
    assert trust.is_late(fenced, late.model_copy(update={"journal_seq": 10}))
