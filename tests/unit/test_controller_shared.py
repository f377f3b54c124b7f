"""Shared storage through the REST API: named, given to EVMs, moved, and never said to be fenced."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.model.errors import AlreadyExists, BadInput, Conflict, HypervisorError, NodeDown, NotFound, Unreachable
from emp.model.evm import EvmState
from emp.model.volume import RbdImage
from tests.fakes.pool import Pool, a_pool

URL = "rbd:vms/web:id=emp"
BODY = {"type": "shared", "url": URL, "size_bytes": "64MiB"}


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


async def named(pool: Pool, **body: Any) -> str:
    return str((await pool.post("/v1/volumes", BODY | body))["id"])


async def nodes_of(pool: Pool, volume: str) -> list[str]:
    return [a["node"] for a in (await pool.get(f"/v1/volumes/{volume}"))["attachments"]]


async def test_an_evm_gets_it_beside_others_and_it_outlives_the_evm(pool: Pool) -> None:
    volume = await named(pool)
    shown = await pool.get(f"/v1/volumes/{volume}")
    assert (shown["type"], shown["url"], shown["size_bytes"], shown["evm"]) == ("shared", URL, 64 << 20, None)
    await pool.create("web", node="n1", volumes=["io2:16MiB", volume])
    _, order = pool.agents["n1"].orders[-1]
    assert order.volumes[1].endpoint == RbdImage(pool="vms", image="web", user="emp")
    assert order.volumes[1].attachment.claim is None
    assert await nodes_of(pool, volume) == ["n1"]
    assert (await pool.get(f"/v1/volumes/{volume}"))["evm"] == "web"
    with pytest.raises(Conflict, match="belongs to EVM web"):
        await pool.delete(f"/v1/volumes/{volume}")
    await pool.delete("/v1/evms/web")
    assert (await pool.get(f"/v1/volumes/{volume}"))["evm"] is None
    assert await nodes_of(pool, volume) == []
    await pool.delete(f"/v1/volumes/{volume}")
    with pytest.raises(NotFound):
        await pool.get(f"/v1/volumes/{volume}")


async def test_it_is_remembered_over_a_restart(pool: Pool) -> None:
    volume = await named(pool)
    await pool.create("web", node="n1", volumes=[volume])
    await pool.restart()
    assert await nodes_of(pool, volume) == ["n1"]
    with pytest.raises(AlreadyExists, match=volume):
        await named(pool, url="rbd:vms/web")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"url": None}, "url"),
        ({"url": "nbd://10.77.0.9/disk"}, "url"),
        ({"url": URL + "@before"}, "url"),
        ({"url": "rbd:" + "x" * 600}, "url"),
        ({"size_bytes": None}, "size"),
        ({"type": "io2"}, "url"),
        ({"type": "io2", "url": None, "size_bytes": None}, "size_bytes"),
    ],
)
async def test_bad_input_names_the_field(pool: Pool, body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadInput) as caught:
        await named(pool, **body)
    assert caught.value.field == field
    assert (await pool.get("/v1/volumes"))["items"] == []


async def test_a_server_that_is_not_there_is_said(pool: Pool) -> None:
    with pytest.raises(Unreachable) as caught:
        await named(pool, url="nbds://127.0.0.1:1/disk", size_bytes=None)
    assert caught.value.field == "url"


async def test_it_is_not_made_with_an_evm(pool: Pool) -> None:
    with pytest.raises(BadInput, match="'shared' is not a volume type") as caught:
        await pool.create("web", volumes=["shared:1GiB"])
    assert caught.value.field == "volumes[0]"


async def test_it_moves_with_the_evm_and_no_fence_is_claimed(pool: Pool) -> None:
    volume = await named(pool)
    await pool.create("web", node="n1", volumes=[volume, "io2:16MiB"])
    begun = await pool.post("/v1/evms/web/migrations", {"target": "n2"})
    done = await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "closed")
    assert (done["outcome"], done["cause"]) == ("completed", None)
    assert await nodes_of(pool, volume) == ["n2"]
    assert volume not in pool.volumes.fences and len(pool.volumes.fences) == 1


async def test_only_a_node_that_is_proven_off_gives_it_up(pool: Pool) -> None:
    volume = await named(pool)
    await pool.create("web", node="n1", volumes=[volume])
    await pool.lose("n1")
    with pytest.raises(NodeDown, match="EVM web may run on n1"):
        await pool.post("/v1/evms/web/recover")
    assert await nodes_of(pool, volume) == ["n1"]
    with pytest.raises(BadInput, match=f"nothing else keeps it from writing to {volume}"):
        await pool.post("/v1/nodes/n1/fence")
    await pool.post("/v1/nodes/n1/fence", {"confirm": True})
    assert await nodes_of(pool, volume) == ["n1"], "until it is started elsewhere"
    recovered = await pool.post("/v1/evms/web/recover")
    assert (recovered["owner"], recovered["state"]) == ("n2", "running")
    assert await nodes_of(pool, volume) == ["n2"]


async def test_a_fence_of_a_node_without_any_says_nothing_of_it(pool: Pool) -> None:
    volume = await named(pool)
    await pool.create("web", node="n1", volumes=[volume])
    with pytest.raises(BadInput) as said:
        await pool.post("/v1/nodes/n2/fence")
    assert "must be off for certain" not in said.value.message


async def test_a_boot_insists_that_nobody_else_can_write(pool: Pool) -> None:
    """Whatever has let the volume go without proof: it does not boot beside one that may still write."""
    volume = await named(pool)
    assert pool.controller is not None
    await pool.controller.services.volumes.attach([volume], node="n1", epoch=1)
    with pytest.raises(Conflict, match=f"n1 may still write to {volume}") as caught:
        await pool.create("web", node="n2", volumes=[volume])
    assert "emp node fence n1" in (caught.value.hint or "")
    assert "start" not in pool.agents["n2"].verbs()
    await pool.until("/v1/evms", lambda listed: listed["items"] == [])


async def test_a_start_that_failed_for_want_of_proof_leaves_it_with_who_may_hold_it(pool: Pool) -> None:
    volume = await named(pool)
    await pool.create("web", node="n1", volumes=[volume])
    pool.agents["n1"].refuse["retire"] = HypervisorError("its QEMU cannot be killed")
    pool.agents["n1"].set_state("web", EvmState.STOPPED)
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "stopped")
    with pytest.raises(HypervisorError):
        await pool.post("/v1/evms/web/start", {"node": "n2"})
    assert await nodes_of(pool, volume) == ["n1"]
    started = await pool.post("/v1/evms/web/start", {"node": "n2"})
    assert started["owner"] == "n2"
    assert await nodes_of(pool, volume) == ["n2"]
