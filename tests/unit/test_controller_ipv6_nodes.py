"""Nodes that take no IPv6 get no EVM that has such addresses, and the reason says so, before anything is begun."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.model.errors import BadInput, NoPlacement, Refused
from tests.fakes.pool import Pool
from tests.fakes.values import versions

WHY = "eth0 has no IPv6 address"


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    """Give a pool of two nodes of which n1, which placement would take, has no IPv6."""
    made = Pool(tmp_path)
    made.subnet = {**made.subnet, "ipv6": {"subnet": "fd77::/64", "evms": "fd77::1:0:0:0/80"}}
    try:
        for name in ("n1", "n2"):
            await made.add_agent(name)
        made.agents["n1"].no_ipv6 = WHY
        await made.start()
        yield made
    finally:
        await made.close()


@pytest.mark.parametrize("wish", [{"ipv6": ["auto"]}, {"pods": ["a=auto"]}])
async def test_placement_takes_a_node_that_has_it(pool: Pool, wish: dict[str, list[str]]) -> None:
    assert (await pool.create("plain"))["owner"] == "n1"
    assert (await pool.create("web", node="n2", **wish))["owner"] == "n2"
    assert (await pool.create("db", **wish))["owner"] == "n2", "though n2 has no more memory than n1"
    with pytest.raises(Refused, match=f"node n1 does not fit: it takes no IPv6 addresses, as {WHY}"):
        await pool.create("x", node="n1", **wish)
    pool.agents["n2"].no_ipv6 = "the kernel lacks it"
    await pool.agents["n2"].beat()
    with pytest.raises(NoPlacement, match=f"n1: it takes no IPv6 addresses, as {WHY}; n2: .* the kernel lacks it"):
        await pool.create("x", **wish)


async def test_an_evm_is_started_again_where_it_has_it(pool: Pool) -> None:
    await pool.create("web", ipv6=["auto"])
    await pool.post("/v1/evms/web/stop", {})
    with pytest.raises(Refused, match="node n1 does not fit: it takes no IPv6"):
        await pool.post("/v1/evms/web/start", {"node": "n1"})
    pool.agents["n1"].no_ipv6, pool.agents["n2"].no_ipv6 = None, WHY
    for agent in pool.agents.values():
        await agent.beat()
    assert (await pool.post("/v1/evms/web/start", {}))["owner"] == "n1"


async def test_preflight_refuses_a_target_without_it(pool: Pool) -> None:
    await pool.create("web", ipv6=["auto"])
    plan = await pool.post("/v1/evms/web/migrations", {"target": "n1", "dry_run": True})
    assert [(check["name"], check["message"]) for check in plan["checks"] if not check["ok"]] == [
        ("ipv6", f"n1: {WHY}")
    ]
    with pytest.raises(Refused, match=f"EVM web cannot move to n1: ipv6: n1: {WHY}"):
        await pool.post("/v1/evms/web/migrations", {"target": "n1"})
    with pytest.raises(NoPlacement, match=WHY):
        await pool.post("/v1/evms/web/migrations", {})
    assert pool.agents["n1"].orders == []


async def test_pods_of_an_image_that_gives_them_none_get_none(pool: Pool) -> None:
    for agent in pool.agents.values():
        images = {"debian": "sha256:dddd"}
        agent.versions = versions(images=images, images_without_pod_ipv6=("debian",))
        await agent.beat()
    pods = ["a", "b=10.77.9.1,fd77::1:0:0:5"]
    with pytest.raises(Refused, match="pods of the image debian have IPv4 addresses alone") as caught:
        await pool.create("web", image="debian", pods=pods)
    assert (caught.value.field, caught.value.hint) == ("pods[1]", "leave the IPv6 address out")
    made = await pool.create("web", image="debian", ipv6=["auto"], pods=["a", "b=10.77.9.1"])
    assert made["spec"]["nics"][0]["ipv6"], "the EVM itself has one"


async def test_a_pool_without_ipv6_says_that_first(pool: Pool) -> None:
    await pool.stop()
    del pool.subnet["ipv6"]
    pool.agents["n2"].no_ipv6 = WHY
    await pool.start()
    with pytest.raises(BadInput, match="this pool hands out no IPv6 addresses"):
        await pool.create("web", ipv6=["auto"])
