"""Migrations through the REST API: there, back, refused with reasons, aborted, two at once, over a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.controller.reach import Reach
from emp.model.addresses import Assigned
from emp.model.errors import (
    BadInput,
    Conflict,
    HypervisorError,
    NodeDown,
    NoPlacement,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unreachable,
)
from emp.model.evm import EvmSpec, EvmState
from tests.fakes.agent import Script
from tests.fakes.pool import Pool, a_pool
from tests.fakes.values import GIB, MIB, versions

CLOSED = "closed"


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


async def migrate(pool: Pool, evm: str = "web", **body: Any) -> Any:
    return await pool.post(f"/v1/evms/{evm}/migrations", body)


async def closed(pool: Pool, migration: Any) -> Any:
    return await pool.until(f"/v1/migrations/{migration['id']}", lambda m: m["stage"] == CLOSED)


async def stages(pool: Pool, migration: Any, last_event_id: str = "") -> list[tuple[str, str]]:
    """Follow a migration to its end; return (event id, stage) wherever the stage is new."""
    seen: list[tuple[str, str]] = []
    path = f"/v1/migrations/{migration['id']}/events"
    async with contextlib.aclosing(pool.api.events(path, last_event_id=last_event_id)) as events:
        async for event in events:
            stage = json.loads(event.data)["stage"]
            if not seen or seen[-1][1] != stage:
                seen.append((event.id, stage))
    return seen


# ------------------------------------------------------------------ there


async def test_an_evm_moves_with_its_volume_and_leaves_a_report(pool: Pool) -> None:
    made = await pool.create("web", volumes=["io2:16MiB"], node="n1")
    (volume,) = made["spec"]["volumes"]
    begun = await migrate(pool, target="n2")
    assert (begun["source"], begun["target"], begun["stage"]) == ("n1", "n2", "preparation")
    assert made["epoch"] < begun["epoch_target"] < begun["epoch_source"]
    done = await closed(pool, begun)
    assert (done["outcome"], done["cause"], done["committed"]) == ("completed", None, True)
    assert done["report"]["stages"]["source_brownout_s"] == pytest.approx(1.0)
    assert done["report"]["stages"]["blackout_ms"] == pytest.approx(12.0)
    assert done["report"]["stages"]["target_brownout_s"] > 0
    assert done["report"]["vcpu_pause_ms"] == pytest.approx(10.0)
    assert done["report"]["memory_bytes"] == 512 * MIB
    evm = await pool.get("/v1/evms/web")
    assert (evm["owner"], evm["epoch"], evm["state"], evm["migration"]) == (
        "n2",
        begun["epoch_target"],
        "running",
        None,
    )
    assert pool.volumes.holders(volume) == {"n2": begun["epoch_target"]}
    assert pool.volumes.fences[volume] == begun["epoch_target"]
    assert [a["node"] for a in (await pool.get(f"/v1/volumes/{volume}"))["attachments"]] == ["n2"]
    assert evm["spec"] == made["spec"]


async def test_the_orders_carry_what_the_protocol_needs(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:16MiB"], node="n1")
    done = await closed(pool, await migrate(pool, target="n2", policy={"max_blackout_ms": 7}))
    (_, prepare), (_, handover) = pool.agents["n2"].orders[0], pool.agents["n1"].orders[1]
    assert (prepare.epoch, prepare.source.node) == (done["epoch_target"], "n1")
    assert [(g.attachment.node, g.attachment.epoch) for g in prepare.volumes] == [("n2", done["epoch_target"])]
    assert (handover.epoch_target, handover.epoch_source) == (done["epoch_target"], done["epoch_source"])
    assert (handover.target.node, handover.prepared.nonce) == ("n2", "p1")
    assert handover.policy.max_blackout_ms == 7


async def test_there_and_back_uses_ever_newer_epochs(pool: Pool) -> None:
    await pool.create("web", node="n1")
    there = await closed(pool, await migrate(pool, target="n2"))
    back = await closed(pool, await migrate(pool, target="n1"))
    assert (there["outcome"], back["outcome"]) == ("completed", "completed")
    assert there["epoch_source"] < back["epoch_target"]
    assert (await pool.get("/v1/evms/web"))["owner"] == "n1"
    listed = (await pool.get("/v1/migrations?evm=web"))["items"]
    assert [m["id"] for m in listed] == [back["id"], there["id"]]


async def test_placement_picks_the_target_and_says_why(pool: Pool) -> None:
    await pool.add_agent("n3", memory_bytes=2 * GIB)
    await pool.create("web", node="n1")
    begun = await migrate(pool)
    assert begun["target"] == "n2"
    assert begun["placement"] == "most free memory of 2 nodes that fit (4 GiB free); not n1: it runs there"
    await closed(pool, begun)


async def test_every_stage_is_told_once_and_in_order(pool: Pool) -> None:
    await pool.create("web", node="n1")
    script = pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    following = asyncio.create_task(stages(pool, begun))
    path = f"/v1/migrations/{begun['id']}"
    shown = await pool.until(path, lambda m: m["progress"]["memory_bytes"] > 0)
    assert (shown["stage"], shown["progress"]["passes"]) == ("source-brownout", 1)
    assert (await pool.get("/v1/evms/web"))["state"] == "migrating"
    script.precopy.set()
    await pool.until(path, lambda m: m["stage"] == "blackout")
    script.blackout.set()
    await pool.until(path, lambda m: m["stage"] == "target-brownout" and m["committed"])
    script.clearing.set()
    told = await following
    assert [stage for _, stage in told] == [
        "preparation",
        "source-brownout",
        "blackout",
        "target-brownout",
        "closed",
    ]
    # a client that comes back with the last id it saw hears of every stage since, and of nothing before
    assert [stage for _, stage in await stages(pool, begun, told[1][0])] == ["blackout", "target-brownout", "closed"]
    assert await stages(pool, begun, told[-1][0]) == []


async def test_the_metrics_have_the_stages(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await closed(pool, await migrate(pool, target="n2"))
    text = (await pool.api._client.get("/metrics")).text
    assert 'emp_migrations_total{outcome="completed"} 1.0' in text
    for figure in ("source_brownout", "blackout", "target_brownout", "vcpu_pause"):
        assert f"emp_migration_{figure}_seconds_count 1.0" in text


# ------------------------------------------------------------------ two at once


async def test_two_evms_swap_nodes_at_the_same_time(tmp_path: Path) -> None:
    async with a_pool(tmp_path, "n1", "n2", memory_bytes=GIB) as pool:
        await pool.create("a", node="n1")
        await pool.create("b", node="n2")
        for agent in pool.agents.values():
            agent.script = Script()
        begun = [await migrate(pool, "a", target="n2"), await migrate(pool, "b", target="n1")]
        with pytest.raises(NoPlacement, match="0 B free"):  # both ends are claimed until both are closed
            await pool.create("c")
        for agent in pool.agents.values():
            for event in (agent.script.precopy, agent.script.blackout, agent.script.clearing):
                event.set()
        assert [(await closed(pool, m))["outcome"] for m in begun] == ["completed", "completed"]
        assert [(await pool.get(f"/v1/evms/{name}"))["owner"] for name in "ab"] == ["n2", "n1"]
        assert (await pool.create("c"))["state"] == "running"


async def test_a_swap_without_room_is_refused_and_not_overcommitted(tmp_path: Path) -> None:
    async with a_pool(tmp_path, "n1", "n2", memory_bytes=768 * MIB) as pool:
        await pool.create("a", node="n1")
        await pool.create("b", node="n2")
        for name, target in (("a", "n2"), ("b", "n1")):
            with pytest.raises(Refused, match="256 MiB free") as caught:
                await migrate(pool, name, target=target)
            assert caught.value.field == "target"


# ------------------------------------------------------------------ refused


async def test_a_request_that_cannot_be_carried_out_says_why(pool: Pool) -> None:
    await pool.create("web", node="n1")
    with pytest.raises(NotFound) as missing:
        await migrate(pool, "nosuch", target="n2")
    assert missing.value.field == "evm"
    with pytest.raises(NotFound) as unknown:
        await migrate(pool, target="n9")
    assert unknown.value.field == "target"
    with pytest.raises(BadInput, match="already runs on n1") as same:
        await migrate(pool, target="n1")
    assert same.value.field == "target"
    with pytest.raises(BadInput) as bad:
        await migrate(pool, target="../x")
    assert bad.value.field == "target"
    with pytest.raises(BadInput) as zero:
        await migrate(pool, target="n2", policy={"max_blackout_ms": 0})
    assert zero.value.field == "policy.max_blackout_ms"
    await pool.post("/v1/nodes/n2/cordon")
    with pytest.raises(Refused, match="cordoned") as cordoned:
        await migrate(pool, target="n2")
    assert (cordoned.value.field, cordoned.value.hint) == ("target", "uncordon it")
    with pytest.raises(NoPlacement, match=r"n1: it runs there; n2: cordoned"):
        await migrate(pool)
    assert (await pool.get("/v1/migrations"))["items"] == []
    assert pool.agents["n2"].orders == []


async def test_a_target_that_is_down_says_since_when(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.lose("n2")
    await pool.until("/v1/nodes/n2", lambda node: not node["ready"])
    with pytest.raises(NodeDown, match="node n2 is down: its agent has not answered since 20") as caught:
        await migrate(pool, target="n2")
    assert caught.value.field == "target"
    with pytest.raises(NoPlacement, match="n2: down"):
        await migrate(pool)


async def test_a_source_that_is_down_says_since_when(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.lose("n1")
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "unknown")
    with pytest.raises(NodeDown, match="node n1 is down") as caught:
        await migrate(pool, target="n2")
    assert caught.value.field == "evm"


async def test_an_evm_that_does_not_run_is_not_migrated(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    with pytest.raises(Conflict, match="EVM web is stopped, not running") as caught:
        await migrate(pool, target="n2")
    assert (caught.value.field, caught.value.hint) == ("evm", "emp evm start web")


async def test_a_second_migration_of_the_same_evm_is_refused_with_the_id_of_the_first(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    for again in (migrate(pool, target="n2"), pool.post("/v1/evms/web/stop"), pool.post("/v1/evms/web/start")):
        with pytest.raises(Conflict) as caught:
            await again
        assert caught.value.details["migration"] == begun["id"]
        assert caught.value.hint
    await pool.post(f"/v1/migrations/{begun['id']}/abort")
    await closed(pool, begun)


async def test_pre_flight_refuses_what_does_not_fit(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n2"].versions = versions(qemu="9.2.0", machines=("pc-i440fx-9.2",))
    await pool.agents["n2"].beat()
    with pytest.raises(Refused) as caught:
        await migrate(pool, target="n2")
    assert "machine: n2 does not know pc-i440fx-10.0" in caught.value.message
    assert "qemu: 9.2.0 on n2 is older than 10.0.2 on n1" in caught.value.message
    assert {check["name"]: check["ok"] for check in caught.value.details["checks"]}["memory"]
    with pytest.raises(NoPlacement, match="n2: n2 does not know"):
        await migrate(pool)


async def test_a_dry_run_shows_the_plan_and_does_nothing(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.agents["n2"].stop_beating()  # so that its change is told once
    revision = (await pool.get("/healthz"))["revision"]
    plan = await migrate(pool, dry_run=True)
    assert (plan["dry_run"], plan["target"]) == (True, "n2")
    assert plan["placement"].startswith("the only node that fits")
    assert len(plan["checks"]) >= 10
    assert all(check["ok"] for check in plan["checks"])
    pool.agents["n2"].versions = versions(accelerator="kvm")
    await pool.agents["n2"].beat()
    bad = await migrate(pool, target="n2", dry_run=True)
    assert [check["name"] for check in bad["checks"] if not check["ok"]] == ["accelerator"]
    assert pool.agents["n2"].orders == []
    assert (await pool.get("/healthz"))["revision"] == revision + 1  # the node's new version, nothing else


# ------------------------------------------------------------------ back


async def test_an_abort_before_the_commit_returns_the_evm(pool: Pool) -> None:
    made = await pool.create("web", volumes=["io2:16MiB"], node="n1")
    (volume,) = made["spec"]["volumes"]
    pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    asked = await pool.post(f"/v1/migrations/{begun['id']}/abort", {"reason": "changed my mind"})
    assert (asked["abort_asked"], asked["outcome"]) == ("changed my mind", "aborted")
    done = await closed(pool, begun)
    assert (done["outcome"], done["committed"]) == ("aborted", False)
    evm = await pool.get("/v1/evms/web")
    assert (evm["owner"], evm["epoch"], evm["state"]) == ("n1", begun["epoch_source"], "running")
    assert pool.volumes.holders(volume) == {"n1": made["epoch"]}
    assert pool.agents["n2"].orders[-1][1].source_is_back
    pool.agents["n1"].script = Script.free()
    assert (await closed(pool, await migrate(pool, target="n2")))["outcome"] == "completed"
    again = await pool.post(f"/v1/migrations/{begun['id']}/abort")
    assert (again["outcome"], again["id"]) == ("aborted", begun["id"]), "a second abort gets the same answer"


async def test_a_cloud_hears_of_a_migration_at_the_commit_and_of_an_abort_never(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An abort must not wait for a cloud that refuses. What was ordered once is on record: it may have to be undone."""
    ordered: list[tuple[str, bool]] = []

    async def assign(_: Reach, spec: EvmSpec, node: str, *, insist: bool = False) -> Assigned:
        ordered.append((node, insist))
        return Assigned(took_s=0.0, calls=1)

    await pool.create("web", node="n1")
    monkeypatch.setattr(Reach, "is_routed", True)
    monkeypatch.setattr(Reach, "assign", assign)
    pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    await pool.post(f"/v1/migrations/{begun['id']}/abort")
    assert not (await closed(pool, begun))["addresses_ordered"]
    assert ordered == []
    pool.agents["n1"].script = Script.free()
    assert (await closed(pool, await migrate(pool, target="n2")))["addresses_ordered"]
    assert ordered == [("n2", False)]


async def test_an_abort_after_the_commit_is_refused(pool: Pool) -> None:
    await pool.create("web", node="n1")
    script = pool.agents["n1"].script = Script()
    script.precopy.set()
    script.blackout.set()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["committed"])
    with pytest.raises(Conflict, match="only goes forward"):
        await pool.post(f"/v1/migrations/{begun['id']}/abort")
    script.clearing.set()
    assert (await closed(pool, begun))["outcome"] == "completed"


async def test_a_target_that_fails_leaves_the_evm_on_its_source(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n1"].script.target_fails = True
    done = await closed(pool, await migrate(pool, target="n2"))
    assert (done["outcome"], done["cause"]) == ("aborted", "the target failed")
    assert (await pool.get("/v1/evms/web"))["owner"] == "n1"


@pytest.mark.parametrize("verb", ["prepare", "handover"])
@pytest.mark.parametrize("error", [HypervisorError("no"), Unreachable("no"), Conflict("no")])
async def test_an_order_that_is_refused_ends_in_an_abort(pool: Pool, verb: str, error: Exception) -> None:
    made = await pool.create("web", volumes=["io2:16MiB"], node="n1")
    agent = pool.agents["n2" if verb == "prepare" else "n1"]
    agent.refuse[verb] = error  # type: ignore[assignment]
    if verb == "prepare" and isinstance(error, Unreachable):
        agent.refuse_always.add(verb)
    done = await closed(pool, await migrate(pool, target="n2"))
    assert (done["outcome"], done["cause"]) == ("aborted", "no")
    evm = await pool.get("/v1/evms/web")
    assert (evm["owner"], evm["epoch"], evm["state"]) == ("n1", made["epoch"], "running")
    assert list(pool.volumes.holders(made["spec"]["volumes"][0])) == ["n1"]


@pytest.mark.parametrize("verb", ["prepare", "handover"])
async def test_a_lost_answer_does_not_stop_a_migration(pool: Pool, verb: str) -> None:
    await pool.create("web", node="n1")
    agent = pool.agents["n2" if verb == "prepare" else "n1"]
    agent.lose[verb] = OutcomeUnknown("lost")
    assert (await closed(pool, await migrate(pool, target="n2")))["outcome"] == "completed"


async def test_volumes_that_cannot_be_attached_end_in_an_abort(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:16MiB"], node="n1")
    pool.volumes.failing["attach"] = Refused("too many attachments")
    done = await closed(pool, await migrate(pool, target="n2"))
    assert (done["outcome"], done["cause"]) == ("aborted", "too many attachments")
    assert pool.agents["n2"].orders == []


async def test_a_target_that_dies_while_it_settles_does_not_hold_the_end_up(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    pool.agents["n2"].refuse["abort"] = Unreachable("no route")
    pool.agents["n2"].refuse_always.add("abort")
    await pool.lose("n2")
    await pool.post(f"/v1/migrations/{begun['id']}/abort")
    assert (await closed(pool, begun))["outcome"] == "aborted"


# ------------------------------------------------------------------ restart of the controller


async def test_a_migration_goes_on_while_the_controller_is_away(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:16MiB"], node="n1")
    script = pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    path = f"/v1/migrations/{begun['id']}"
    await pool.until(path, lambda m: m["stage"] == "source-brownout")
    await pool.stop()
    script.precopy.set()
    script.blackout.set()
    script.clearing.set()
    await pool.start()
    done = await closed(pool, begun)
    assert done["outcome"] == "completed"
    assert done["report"]["vcpu_pause_ms"] == pytest.approx(10.0)
    assert (await pool.get("/v1/evms/web"))["owner"] == "n2"
    assert list(pool.volumes.holders("vol-0001")) == ["n2"]


async def test_the_report_has_both_ends_whichever_is_heard_first_after_a_restart(pool: Pool) -> None:
    await pool.create("web", node="n1")
    script = pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    await pool.stop()
    for gate in (script.precopy, script.blackout, script.clearing):
        gate.set()
    pool.agents["n2"].telling.clear()
    asyncio.get_running_loop().call_later(0.3, pool.agents["n2"].telling.set)
    await pool.start()
    done = await closed(pool, begun)
    assert done["report"]["vcpu_pause_ms"] == pytest.approx(10.0)


async def test_a_restart_in_the_preparation_ends_in_an_abort(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:16MiB"], node="n1")
    pool.agents["n2"].hold.clear()
    begun = await migrate(pool, target="n2")
    await pool.agents["n2"].reached.wait()
    await pool.stop()
    pool.agents["n2"].hold.set()
    await pool.start()
    done = await closed(pool, begun)
    assert (done["outcome"], done["cause"]) == ("aborted", "the controller was restarted in the preparation")
    assert list(pool.volumes.holders("vol-0001")) == ["n1"]


async def test_history_survives_a_restart(pool: Pool) -> None:
    await pool.create("web", node="n1")
    done = await closed(pool, await migrate(pool, target="n2"))
    await pool.restart()
    assert (await pool.get(f"/v1/migrations/{done['id']}")) == done
    assert [stage for _, stage in await stages(pool, done)] == ["closed"]
    assert (await pool.get("/v1/evms/web"))["state"] in ("running", "unknown")


async def test_an_unknown_migration(pool: Pool) -> None:
    for path in ("/v1/migrations/m-0", "/v1/migrations/m-0/events"):
        with pytest.raises(NotFound, match="no migration is named 'm-0'"):
            await pool.get(path)
    with pytest.raises(NotFound):
        await pool.post("/v1/migrations/m-0/abort")


async def test_an_evm_is_not_restarted_by_policy_while_it_migrates(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n1"].script = Script()
    begun = await migrate(pool, target="n2")
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    pool.agents["n1"].set_state("web", EvmState.PANICKED, "panic")
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "panicked")
    assert pool.agents["n1"].verbs().count("start") == 1
    await pool.post(f"/v1/migrations/{begun['id']}/abort")
    await closed(pool, begun)
