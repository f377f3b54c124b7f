"""EVMs through the REST API: made, started, stopped, deleted; each bad input; and nothing left of what failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.model.errors import (
    AlreadyExists,
    BadInput,
    Conflict,
    EmpError,
    HypervisorError,
    NodeDown,
    NoPlacement,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from emp.model.evm import EvmState
from tests.fakes.pool import Pool, a_pool
from tests.fakes.values import GIB, MIB


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


# ------------------------------------------------------------------ create


async def test_create_boots_the_evm_under_a_fresh_epoch(pool: Pool) -> None:
    evm = await pool.create("web", pods=["app"], volumes=["io2:64MiB"], memory_bytes="256MiB", vcpus=2)
    assert (evm["state"], evm["owner"], evm["reason"]) == ("running", "n1", None)
    verb, order = pool.agents["n1"].orders[-1]
    assert verb == "start"
    assert order.epoch == evm["epoch"] >= 1
    assert order.spec.memory_bytes == 256 * MIB
    assert (order.spec.machine, order.spec.cpu_model) == ("pc-i440fx-10.0", "Westmere-v1")
    assert order.spec.image_digest == "sha256:aaaa"
    (grant,) = order.volumes
    assert grant.attachment is not None
    assert (grant.attachment.node, grant.attachment.epoch) == ("n1", evm["epoch"])
    assert order.spec.volumes == (grant.volume.id,)
    assert (await pool.get(f"/v1/volumes/{grant.volume.id}"))["evm"] == "web"


async def test_a_root_disk_is_made_from_the_image_and_comes_first(pool: Pool) -> None:
    evm = await pool.create("web", root="io2:64MiB", volumes=["io2:16MiB"], node="n1")
    root, data = [await pool.get(f"/v1/volumes/{volume}") for volume in evm["spec"]["volumes"]]
    assert (root["image"], root["size_bytes"]) == (evm["spec"]["image"], 64 * MIB)
    assert data["image"] is None
    _, order = pool.agents["n1"].orders[-1]
    assert order.spec.slots == (0, 1)


async def test_a_root_disk_that_is_there_is_taken_as_it_is(pool: Pool) -> None:
    made = await pool.post("/v1/volumes", {"type": "io2", "size_bytes": "64MiB", "image": "debian"})
    with pytest.raises(BadInput, match="named twice") as refused:
        await pool.create("web", root=made["id"], volumes=[made["id"]])
    assert refused.value.field == "root"
    evm = await pool.create("web", root=made["id"], volumes=["io2:16MiB"], node="n1")
    assert evm["spec"]["volumes"][0] == made["id"]
    with pytest.raises(Conflict) as taken:
        await pool.create("db", root=made["id"])
    assert taken.value.field == "root"


@pytest.mark.parametrize("root", ["floppy:1GiB", "io2:1", "shared:1GiB"])
async def test_a_root_disk_that_cannot_be(pool: Pool, root: str) -> None:
    with pytest.raises(BadInput) as refused:
        await pool.create("web", root=root)
    assert refused.value.field == "root"


async def test_every_card_and_pod_has_an_address_and_a_mac_of_its_own(pool: Pool) -> None:
    specs = [
        (await pool.create(name, nics=2, pods=["a", "b=10.77.9.9"] if name == "x" else ["a"]))["spec"] for name in "xy"
    ]
    held = [n for spec in specs for n in (*spec["nics"], *spec["pods"])]
    assert len({n["address"] for n in held}) == len({n["mac"] for n in held}) == len(held) == 7
    assert all(n["mac"].startswith("52:54:00") for spec in specs for n in spec["nics"])
    assert all(n["mac"].startswith("02:00") for spec in specs for n in spec["pods"])
    assert specs[0]["pods"][1]["address"] == "10.77.9.9"
    assert all(n["prefix_length"] == 16 for n in held)


async def test_placement_takes_the_node_with_the_most_free_memory(pool: Pool) -> None:
    assert [(await pool.create(name))["owner"] for name in "abcd"] == ["n1", "n2", "n1", "n2"]
    assert (await pool.create("e", node="n2"))["owner"] == "n2"


async def test_creates_at_the_same_moment_do_not_overcommit(tmp_path: Path) -> None:
    async with a_pool(tmp_path, "n1", "n2", memory_bytes=GIB) as pool:
        results = await asyncio.gather(*(pool.create(f"e{i}") for i in range(6)), return_exceptions=True)
        made = [r for r in results if isinstance(r, dict)]
        assert len(made) == 4
        assert all(isinstance(r, NoPlacement) for r in results if not isinstance(r, dict))
        addresses = [n["address"] for evm in made for n in evm["spec"]["nics"]]
        assert len(set(addresses)) == 4


async def test_an_existing_volume_is_used_and_outlives_the_evm(pool: Pool) -> None:
    volume = await pool.post("/v1/volumes", {"size_bytes": "32MiB"})
    await pool.create("web", volumes=[volume["id"], "io2:16MiB"])
    assert [len(pool.agents["n1"].orders[-1][1].volumes), len(pool.volumes.volumes)] == [2, 2]
    with pytest.raises(Conflict, match="belongs to EVM web"):
        await pool.delete(f"/v1/volumes/{volume['id']}")
    with pytest.raises(Conflict, match="belongs to EVM web"):
        await pool.create("db", volumes=[volume["id"]])
    await pool.delete("/v1/evms/web")
    assert pool.agents["n1"].verbs() == ["start", "stop", "retire"]  # the guest may flush what stays
    assert list(pool.volumes.volumes) == [volume["id"]]
    left = await pool.get(f"/v1/volumes/{volume['id']}")
    assert (left["evm"], left["attachments"]) == (None, [])
    again = await pool.create("db", volumes=[volume["id"]])  # a fence of the earlier EVM does not shut this one out
    assert again["state"] == "running"


BAD: list[tuple[dict[str, Any], type[EmpError], str]] = [
    ({"name": "../x"}, BadInput, "name"),
    ({"name": "a,b=c"}, BadInput, "name"),
    ({"name": "x" * 300}, BadInput, "name"),
    ({"name": ""}, BadInput, "name"),
    ({}, BadInput, "name"),
    ({"name": "w", "memory_bytes": "12Q"}, BadInput, "memory_bytes"),
    ({"name": "w", "memory_bytes": "-1"}, BadInput, "memory_bytes"),
    ({"name": "w", "memory_bytes": 0}, BadInput, "memory_bytes"),
    ({"name": "w", "memory_bytes": None}, BadInput, "memory_bytes"),
    ({"name": "w", "memory_bytes": 1.5}, BadInput, "memory_bytes"),
    ({"name": "w", "memory_bytes": "1MiB"}, BadInput, "memory_bytes"),
    ({"name": "w", "memory_bytes": (512 << 20) + 1}, BadInput, "memory_bytes"),
    ({"name": "w", "vcpus": 0}, BadInput, "vcpus"),
    ({"name": "w", "vcpus": 256}, BadInput, "vcpus"),
    ({"name": "w", "nics": 0}, BadInput, "nics"),
    ({"name": "w", "nics": 9}, BadInput, "nics"),
    ({"name": "w", "image": "nosuch"}, BadInput, "image"),
    ({"name": "w", "image": "a/b"}, BadInput, "image"),
    ({"name": "w", "cpu_model": "host"}, BadInput, "cpu_model"),
    ({"name": "w", "pods": ["A_B"]}, BadInput, "pods[0]"),
    ({"name": "w", "pods": ["a", "a"]}, BadInput, "pods[1]"),
    ({"name": "w", "pods": ["a="]}, BadInput, "pods[0]"),
    ({"name": "w", "pods": ["a=10.77.1"]}, BadInput, "pods[0]"),
    ({"name": "w", "pods": ["a=192.0.2.1"]}, BadInput, "pods[0]"),
    ({"name": "w", "pods": ["a=10.77.0.1"]}, BadInput, "pods[0]"),
    ({"name": "w", "pods": ["a=10.77.5.5", "b=10.77.5.5"]}, AlreadyExists, "pods[1]"),
    ({"name": "w", "volumes": ["gp9:1GiB"]}, BadInput, "volumes[0]"),
    ({"name": "w", "volumes": ["io2:12Q"]}, BadInput, "volumes[0]"),
    ({"name": "w", "volumes": ["io2:1000"]}, BadInput, "volumes[0]"),
    ({"name": "w", "volumes": ["vol-nosuch"]}, NotFound, "volumes[0]"),
    ({"name": "w", "node": "n9"}, NotFound, "node"),
    ({"name": "w", "node": "n1", "memory_bytes": "5GiB"}, Refused, "node"),
    ({"name": "w", "memory_bytes": "5GiB"}, NoPlacement, "node"),
    ({"name": "w", "vcpus": 5}, NoPlacement, "node"),
    ({"name": "w", "surprise": 1}, BadInput, "surprise"),
    ({"name": "w", "restart": "sometimes"}, BadInput, "restart"),
]


async def test_bad_input_names_the_field_and_leaves_nothing(pool: Pool) -> None:
    for body, error, field in BAD:
        with pytest.raises(error) as caught:
            await pool.post("/v1/evms", body)
        assert (type(caught.value), caught.value.field) == (error, field), body
        assert caught.value.message
    assert (await pool.get("/v1/evms"))["items"] == []
    assert pool.volumes.volumes == {}
    assert [verb for agent in pool.agents.values() for verb in agent.verbs()] == []


async def test_a_name_or_address_that_is_taken(pool: Pool) -> None:
    await pool.create("web", pods=["a=10.77.5.5"])
    with pytest.raises(AlreadyExists) as caught:
        await pool.create("web")
    assert caught.value.field == "name"
    with pytest.raises(AlreadyExists) as caught:
        await pool.create("db", pods=["a=10.77.5.5"])
    assert caught.value.field == "pods[0]"


async def test_a_cordoned_node_takes_nothing_new(pool: Pool) -> None:
    await pool.post("/v1/nodes/n1/cordon")
    assert (await pool.create("a"))["owner"] == "n2"
    with pytest.raises(Refused, match="cordoned") as caught:
        await pool.create("b", node="n1")
    assert caught.value.hint == "uncordon it"
    await pool.post("/v1/nodes/n1/uncordon")
    assert (await pool.create("b", node="n1"))["owner"] == "n1"


async def test_a_create_that_its_node_refuses_is_undone(pool: Pool) -> None:
    pool.agents["n1"].refuse["start"] = HypervisorError("QEMU did not start")
    with pytest.raises(HypervisorError, match="QEMU did not start"):
        await pool.create("web", volumes=["io2:16MiB"], pods=["a=10.77.5.5"], node="n1")
    assert (await pool.get("/v1/evms"))["items"] == []
    assert pool.volumes.volumes == {}
    assert pool.agents["n1"].verbs() == ["start", "retire"]
    again = await pool.create("web", pods=["a=10.77.5.5"], node="n1")
    assert again["state"] == "running"


async def test_a_create_whose_answer_is_lost_is_asked_again(pool: Pool) -> None:
    pool.agents["n1"].lose["start"] = OutcomeUnknown("lost")
    assert (await pool.create("web", node="n1"))["state"] == "running"
    assert pool.agents["n1"].verbs() == ["start", "start"]
    first, second = (order for _, order in pool.agents["n1"].orders)
    assert first == second


async def test_a_volume_service_that_fails_undoes_the_create(pool: Pool) -> None:
    pool.volumes.failing["create"] = Refused("no space left")
    with pytest.raises(Refused, match="no space left"):
        await pool.create("web", volumes=["io2:16MiB"])
    assert (await pool.get("/v1/evms"))["items"] == []


async def test_a_client_that_goes_away_changes_nothing(pool: Pool) -> None:
    pool.volumes.failing["attach"] = Unavailable("busy")
    asking = asyncio.create_task(pool.create("web", volumes=["io2:16MiB"]))
    await pool.until("/v1/evms", lambda listed: any("busy" in (evm["reason"] or "") for evm in listed["items"]))
    asking.cancel()
    await asyncio.wait([asking])
    pool.volumes.failing.clear()
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "running")


# ------------------------------------------------------------------ stop, start, delete


async def test_stop_and_start_again_under_a_newer_epoch(pool: Pool) -> None:
    made = await pool.create("web", volumes=["io2:16MiB"], node="n1")
    (volume,) = made["spec"]["volumes"]
    stopped = await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    assert (stopped["state"], stopped["reason"], stopped["want_running"]) == ("stopped", "shut down on request", False)
    assert pool.volumes.holders(volume) == {}
    assert (await pool.post("/v1/evms/web/stop"))["state"] == "stopped"
    started = await pool.post("/v1/evms/web/start")
    assert (started["state"], started["owner"], started["want_running"]) == ("running", "n1", True)
    assert started["epoch"] > made["epoch"]
    assert pool.volumes.holders(volume) == {"n1": started["epoch"]}
    assert started["spec"]["nics"] == made["spec"]["nics"]


async def test_a_start_elsewhere_retires_the_old_owner_first(pool: Pool) -> None:
    await pool.create("web", volumes=["io2:16MiB"], node="n1")
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    started = await pool.post("/v1/evms/web/start", {"node": "n2"})
    assert started["owner"] == "n2"
    assert pool.agents["n1"].verbs() == ["start", "stop", "retire"]
    retired = pool.agents["n1"].orders[-1][1].epoch
    assert retired < pool.agents["n2"].orders[-1][1].epoch == started["epoch"]


async def test_a_running_evm_is_not_started_again(pool: Pool) -> None:
    await pool.create("web")
    with pytest.raises(Conflict, match="EVM web is running"):
        await pool.post("/v1/evms/web/start")


async def test_a_start_that_fails_says_why_and_can_be_tried_again(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    pool.agents["n1"].refuse["start"] = HypervisorError("no tap")
    with pytest.raises(HypervisorError, match="no tap"):
        await pool.post("/v1/evms/web/start")
    shown = await pool.get("/v1/evms/web")
    assert (shown["state"], shown["reason"]) == ("stopped", "not started: no tap")
    assert (await pool.post("/v1/evms/web/start"))["state"] == "running"


async def test_delete_retires_the_evm_and_frees_everything(pool: Pool) -> None:
    made = await pool.create("web", volumes=["io2:16MiB"], pods=["a"], node="n1")
    await pool.delete("/v1/evms/web")
    assert pool.agents["n1"].verbs() == ["start", "retire"]  # nothing outlives it that a shutdown could save
    assert (pool.agents["n1"].evms, pool.volumes.volumes) == ({}, {})
    with pytest.raises(NotFound) as caught:
        await pool.get("/v1/evms/web")
    assert caught.value.field == "evm"
    again = await pool.create("web", pods=["a"])
    assert again["spec"]["nics"] == made["spec"]["nics"]
    assert again["epoch"] > made["epoch"]


async def test_delete_takes_over_a_create_that_hangs(pool: Pool) -> None:
    asking = asyncio.create_task(pool.create("web", node="n1", volumes=["io2:16MiB"]))
    pool.agents["n1"].lose["start"] = OutcomeUnknown("lost")
    pool.agents["n1"].refuse["start"] = OutcomeUnknown("lost")
    await pool.until("/v1/evms", lambda listed: any("waiting" in (e["reason"] or "") for e in listed["items"]))
    await pool.delete("/v1/evms/web")
    with pytest.raises(Conflict, match="overtaken"):
        await asking
    assert (await pool.get("/v1/evms"))["items"] == []
    assert pool.agents["n1"].evms == {}


@pytest.mark.parametrize("verb", ["start", "stop", "console", "migrations"])
async def test_an_unknown_evm(pool: Pool, verb: str) -> None:
    with pytest.raises(NotFound, match="no evm is named 'nosuch'") as caught:
        await pool.post(f"/v1/evms/nosuch/{verb}")
    assert caught.value.field == "evm"


async def test_a_node_that_is_down_may_still_hold_the_evm(pool: Pool) -> None:
    """Neither stop, delete nor a start elsewhere goes round the one node that could be running it (rule R8)."""
    await pool.create("web", node="n1")
    await pool.lose("n1")
    down = await pool.until("/v1/evms/web", lambda evm: evm["state"] == "unknown")
    assert "node n1 is down: its agent has not answered since" in down["reason"]
    for call in (pool.post("/v1/evms/web/stop"), pool.delete("/v1/evms/web")):
        with pytest.raises(NodeDown, match="since") as caught:
            await call
        assert caught.value.hint
    with pytest.raises(Conflict, match="unknown"):
        await pool.post("/v1/evms/web/start", {"node": "n2"})
    with pytest.raises(NodeDown) as caught:
        await pool.create("db", node="n1")
    assert caught.value.field == "node"
    pool.agents["n1"].start_beating()
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "running" and evm["reason"] is None)


async def test_a_crashed_evm_of_a_lost_node_is_not_started_elsewhere(pool: Pool) -> None:
    await pool.create("web", node="n1", restart="never")
    pool.agents["n1"].set_state("web", EvmState.CRASHED, "its QEMU process ended")
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "crashed")
    await pool.lose("n1")
    await pool.until("/v1/nodes/n1", lambda node: not node["ready"])
    with pytest.raises((NodeDown, Conflict)):
        await pool.post("/v1/evms/web/start", {"node": "n2"})
    assert pool.agents["n2"].orders == []


# ------------------------------------------------------------------ restart of the controller


async def test_a_create_is_carried_on_after_a_restart(pool: Pool) -> None:
    pool.agents["n1"].refuse["start"] = OutcomeUnknown("lost")
    asking = asyncio.create_task(pool.create("web", node="n1", volumes=["io2:16MiB"]))
    await pool.until("/v1/evms", lambda listed: any("waiting" in (e["reason"] or "") for e in listed["items"]))
    await pool.stop()
    with pytest.raises(OutcomeUnknown, match="goes on when it is back"):
        await asking
    await pool.start()
    evm = await pool.until("/v1/evms/web", lambda evm: evm["state"] == "running")
    assert evm["owner"] == "n1"
    assert pool.volumes.holders(evm["spec"]["volumes"][0]) == {"n1": evm["epoch"]}


async def test_a_delete_is_carried_on_after_a_restart(pool: Pool) -> None:
    await pool.create("web", node="n1", volumes=["io2:16MiB"])
    pool.volumes.failing["describe"] = Unavailable("the volume service is away")
    asking = asyncio.create_task(pool.delete("/v1/evms/web"))
    await pool.until("/v1/evms/web", lambda evm: "volume service is away" in (evm["reason"] or ""))
    await pool.stop()
    with pytest.raises(OutcomeUnknown, match="goes on when it is back"):
        await asking
    pool.volumes.failing.clear()
    await pool.start()
    await pool.until("/v1/evms", lambda listed: listed["items"] == [])
    assert pool.volumes.volumes == {}
