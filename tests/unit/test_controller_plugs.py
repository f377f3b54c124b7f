"""Volumes of EVMs through the REST API: attached, detached and resized, running and stopped; each bad moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.model.errors import (
    BadInput,
    Conflict,
    EmpError,
    HypervisorError,
    NodeDown,
    NotFound,
    OutcomeUnknown,
    Refused,
)
from emp.model.evm import EvmState
from tests.fakes.pool import Pool, a_pool
from tests.fakes.values import MIB


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


async def volume(pool: Pool, size: str = "64MiB") -> str:
    return str((await pool.post("/v1/volumes", {"type": "io2", "size_bytes": size}))["id"])


async def attach(pool: Pool, evm: str, volume: str) -> Any:
    return await pool.post(f"/v1/evms/{evm}/volumes", {"volume": volume})


def where(evm: Any) -> dict[str, int]:
    """Return volume -> slot, by the record."""
    spec = evm["spec"]
    return dict(zip(spec["volumes"], spec["volume_slots"] or range(len(spec["volumes"])), strict=True))


async def test_a_volume_is_plugged_into_an_evm_that_runs(pool: Pool) -> None:
    evm = await pool.create("web", volumes=["io2:64MiB"])
    (first,) = evm["spec"]["volumes"]
    second = await volume(pool)
    evm = await attach(pool, "web", second)
    assert where(evm) == {first: 0, second: 1}
    verb, order = pool.agents["n1"].orders[-1]
    assert (verb, order.epoch) == ("volumes", evm["epoch"])
    (grant,) = order.grants
    assert grant.volume.id == second
    record = await pool.get(f"/v1/volumes/{second}")
    assert record["evm"] == "web"
    assert [a["node"] for a in record["attachments"]] == ["n1"]
    assert await attach(pool, "web", second) == evm, "the same again changes nothing"


async def test_one_that_another_evm_had_is_attached_above_its_fence(pool: Pool) -> None:
    """The EVM is older than the volume's last owner; its own epoch would be refused."""
    await pool.create("old")
    await pool.create("young", volumes=["io2:64MiB"])
    (moving,) = (await pool.get("/v1/evms/young"))["spec"]["volumes"]
    await pool.delete(f"/v1/evms/young/volumes/{moving}")
    evm = await attach(pool, "old", moving)
    (held,) = (await pool.get(f"/v1/volumes/{moving}"))["attachments"]
    assert held["epoch"] > evm["epoch"]
    assert pool.volumes.fences[moving] == held["epoch"]


async def test_a_slot_that_is_freed_is_the_next_one_taken_and_the_others_stay(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:64MiB", "io2:64MiB", "io2:64MiB"])
    one, two, three = (await pool.get("/v1/evms/web"))["spec"]["volumes"]
    evm = await pool.delete(f"/v1/evms/web/volumes/{two}")
    assert where(evm) == {one: 0, three: 2}
    assert (await pool.get(f"/v1/volumes/{two}"))["evm"] is None
    assert pool.volumes.holders(two) == {}
    new = await volume(pool)
    assert where(await attach(pool, "web", new)) == {one: 0, three: 2, new: 1}
    assert pool.agents["n1"].disks["web"] == {one: 0, three: 2, new: 1}


async def test_what_was_made_with_the_evm_and_then_detached_outlives_it(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:64MiB"])
    (made,) = (await pool.get("/v1/evms/web"))["spec"]["volumes"]
    await pool.delete(f"/v1/evms/web/volumes/{made}")
    await pool.delete("/v1/evms/web")
    assert (await pool.get(f"/v1/volumes/{made}"))["evm"] is None


async def test_a_stopped_evm_has_it_at_its_next_start(pool: Pool) -> None:
    await pool.create("web")
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    new = await volume(pool)
    assert where(await attach(pool, "web", new)) == {new: 0}
    assert "volumes" not in pool.agents["n1"].verbs()
    await pool.post("/v1/evms/web/start")
    assert pool.agents["n1"].orders[-1][1].spec.volumes == (new,)
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    assert where(await pool.delete(f"/v1/evms/web/volumes/{new}")) == {}
    assert (await pool.get(f"/v1/volumes/{new}"))["evm"] is None


async def test_the_same_volume_goes_to_one_of_two_evms(pool: Pool) -> None:
    await pool.create("a")
    await pool.create("b")
    one = await volume(pool)
    results = await asyncio.gather(attach(pool, "a", one), attach(pool, "b", one), return_exceptions=True)
    (refused,) = (result for result in results if isinstance(result, EmpError))
    assert isinstance(refused, Conflict)
    assert "belongs to EVM" in refused.message
    (owner,) = [name for name in "ab" if where(await pool.get(f"/v1/evms/{name}"))]
    assert (await pool.get(f"/v1/volumes/{one}"))["evm"] == owner


async def test_the_twenty_fifth_volume_is_refused(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:1MiB"] * 16)
    for _ in range(8):
        await attach(pool, "web", await volume(pool))
    last = await volume(pool)
    with pytest.raises(Conflict) as refused:
        await attach(pool, "web", last)
    assert "24 volumes" in refused.value.message
    assert (await pool.get(f"/v1/volumes/{last}"))["evm"] is None


async def test_nothing_of_it_while_the_evm_is_migrating(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:64MiB"])
    (first,) = (await pool.get("/v1/evms/web"))["spec"]["volumes"]
    other = await volume(pool)
    pool.agents["n1"].script.precopy.clear()
    migration = await pool.post("/v1/evms/web/migrations", {})
    for order in (
        attach(pool, "web", other),
        pool.delete(f"/v1/evms/web/volumes/{first}"),
        pool.post(f"/v1/volumes/{first}/resize", {"size_bytes": 128 * MIB}),
    ):
        with pytest.raises(Conflict) as refused:
            await order
        assert "migrating" in refused.value.message
    pool.agents["n1"].script.precopy.set()
    await pool.until(f"/v1/migrations/{migration['id']}", lambda m: m["stage"] == "closed")
    assert where(await attach(pool, "web", other)) == {first: 0, other: 1}


async def test_no_migration_while_a_volume_is_on_its_way(pool: Pool) -> None:
    await pool.create("web")
    one = await volume(pool)
    agent = pool.agents["n1"]
    agent.hold.clear()
    agent.reached.clear()
    attaching = asyncio.create_task(attach(pool, "web", one))
    await agent.reached.wait()
    with pytest.raises(Conflict) as refused:
        await pool.post("/v1/evms/web/migrations", {})
    assert "attach" in refused.value.message
    agent.hold.set()
    assert where(await attaching) == {one: 0}


async def test_a_lost_answer_is_asked_for_again(pool: Pool) -> None:
    await pool.create("web")
    pool.agents["n1"].lose["volumes"] = OutcomeUnknown("no answer")
    one = await volume(pool)
    assert where(await attach(pool, "web", one)) == {one: 0}
    pool.agents["n1"].lose["volumes"] = OutcomeUnknown("no answer")
    assert where(await pool.delete(f"/v1/evms/web/volumes/{one}")) == {}
    assert pool.volumes.holders(one) == {}


@pytest.mark.parametrize("verb", ["attach", "detach", "resize"])
async def test_a_controller_that_comes_back_finishes_what_it_had_begun(pool: Pool, verb: str) -> None:
    await pool.create("web")
    one = await volume(pool)
    if verb != "attach":
        await attach(pool, "web", one)
    orders = {
        "attach": lambda: attach(pool, "web", one),
        "detach": lambda: pool.delete(f"/v1/evms/web/volumes/{one}"),
        "resize": lambda: pool.post(f"/v1/volumes/{one}/resize", {"size_bytes": 128 * MIB}),
    }
    agent = pool.agents["n1"]
    agent.hold.clear()
    agent.reached.clear()
    ordering = asyncio.create_task(orders[verb]())
    await agent.reached.wait()
    await pool.stop()
    with pytest.raises(EmpError):
        await ordering
    agent.hold.set()
    await pool.start()
    if verb == "attach":
        evm = await pool.until("/v1/evms/web", lambda evm: evm["spec"]["volumes"])
        assert where(evm) == {one: 0}
    elif verb == "detach":
        await pool.until(f"/v1/volumes/{one}", lambda v: v["evm"] is None)
        assert where(await pool.get("/v1/evms/web")) == {}
    else:
        await pool.until(f"/v1/volumes/{one}", lambda v: v["size_bytes"] == 128 * MIB and len(v["attachments"]) == 1)
    assert where(await attach(pool, "web", await volume(pool)))  # nothing is under way any more


async def test_a_refused_attach_leaves_nothing(pool: Pool) -> None:
    await pool.create("web")
    one = await volume(pool)
    pool.agents["n1"].refuse["volumes"] = HypervisorError("blockdev-add: Connection refused")
    with pytest.raises(HypervisorError):
        await attach(pool, "web", one)
    assert where(await pool.get("/v1/evms/web")) == {}
    assert pool.volumes.holders(one) == {}
    assert (await pool.get(f"/v1/volumes/{one}"))["evm"] is None
    pool.volumes.failing["attach"] = Refused("the node has as many volumes as it takes")
    with pytest.raises(Refused):
        await attach(pool, "web", one)
    del pool.volumes.failing["attach"]
    assert where(await attach(pool, "web", one)) == {one: 0}


async def test_a_volume_in_use_stays_unless_one_insists(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:64MiB"])
    (one,) = (await pool.get("/v1/evms/web"))["spec"]["volumes"]
    pool.agents["n1"].refuse["volumes"] = Conflict("the guest is using the volume")
    with pytest.raises(Conflict):
        await pool.delete(f"/v1/evms/web/volumes/{one}")
    assert where(await pool.get("/v1/evms/web")) == {one: 0}
    assert pool.volumes.holders(one) != {}
    await pool.delete(f"/v1/evms/web/volumes/{one}?in_use=true")
    assert pool.agents["n1"].orders[-1][1].in_use is True


async def test_a_delete_takes_over_from_an_attach(pool: Pool) -> None:
    await pool.create("web")
    one = await volume(pool)
    agent = pool.agents["n1"]
    agent.lose["volumes"] = OutcomeUnknown("no answer")
    agent.hold.clear()
    agent.reached.clear()
    attaching = asyncio.create_task(attach(pool, "web", one))
    await agent.reached.wait()
    deleting = asyncio.create_task(pool.delete("/v1/evms/web"))
    with pytest.raises(EmpError):
        await attaching
    agent.hold.set()
    await deleting
    assert (await pool.get(f"/v1/volumes/{one}"))["evm"] is None
    assert pool.volumes.holders(one) == {}


async def test_a_resize_attaches_the_bigger_one_beside_the_smaller_and_closes_that(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:64MiB"])
    (one,) = (await pool.get("/v1/evms/web"))["spec"]["volumes"]
    ((_, before),) = pool.volumes.holders(one).items()
    resized = await pool.post(f"/v1/volumes/{one}/resize", {"size_bytes": "128MiB"})
    assert resized["size_bytes"] == 128 * MIB
    (held,) = resized["attachments"]
    assert held["epoch"] > before
    (grant,) = pool.agents["n1"].orders[-1][1].grants
    assert (grant.volume.size_bytes, grant.attachment.epoch) == (128 * MIB, held["epoch"])


async def test_a_volume_of_nobody_is_resized_where_it_lies(pool: Pool) -> None:
    one = await volume(pool)
    assert (await pool.post(f"/v1/volumes/{one}/resize", {"size_bytes": "1GiB"}))["size_bytes"] == 1024 * MIB
    assert pool.agents["n1"].orders == []


@pytest.mark.parametrize("size", ["32MiB", 0, 64 * MIB + 512, "much"])
async def test_a_size_that_cannot_be(pool: Pool, size: object) -> None:
    one = await volume(pool)
    with pytest.raises(BadInput) as error:
        await pool.post(f"/v1/volumes/{one}/resize", {"size_bytes": size})
    assert error.value.field == "size_bytes"


async def test_what_is_not_there(pool: Pool) -> None:
    await pool.create("web")
    one = await volume(pool)
    for order, field in (
        (attach(pool, "nobody", one), "evm"),
        (attach(pool, "web", "vol-0"), "volume"),
        (pool.delete(f"/v1/evms/web/volumes/{one}"), "volume"),
        (pool.post("/v1/volumes/vol-0/resize", {"size_bytes": MIB}), "volume"),
    ):
        with pytest.raises(NotFound) as error:
            await order
        assert error.value.field == field


async def test_not_while_its_node_is_down_or_it_is_neither_up_nor_down(pool: Pool) -> None:
    await pool.create("web", node="n1")
    one = await volume(pool)
    pool.agents["n1"].set_state("web", EvmState.PAUSED, "a volume does not answer")
    await pool.agents["n1"].beat()
    with pytest.raises(Conflict) as error:
        await attach(pool, "web", one)
    assert "paused" in error.value.message
    await pool.lose("n1")
    with pytest.raises(NodeDown):
        await attach(pool, "web", one)
