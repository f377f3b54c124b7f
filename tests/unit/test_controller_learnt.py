"""Who may use an address that nobody declared: heard by a node, asked for with its heartbeat, given once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.model.errors import AlreadyExists
from emp.model.evm import EvmState
from emp.model.network import LearntAddress, Traffic
from tests.fakes.pool import Pool, a_pool

SIX = "fd00:77::1:9"


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        made.subnet["learn_ipv6"] = ["fd00:77::/64"]
        await made.restart()
        await made.create("web", node="n1")
        await made.create("db", node="n2")
        yield made


async def test_an_evm_may_have_as_many_pods_as_is_said_with_two_addresses_each(tmp_path: Path) -> None:
    async with a_pool(tmp_path, "n1") as made:
        made.subnet["ipv6"] = {"subnet": "fd77::/64", "evms": "fd77::1:0:0:0/80"}
        await made.restart()
        cards = {"nics": 4, "ipv6": ["auto"] * 4}
        evm = await made.create("many", node="n1", **cards, pods=[f"p{n}=auto" for n in range(128)])
        assert len({pod["ipv6"]["address"] for pod in evm["spec"]["pods"]}) == 128
        await made.delete("/v1/evms/many")
        assert (await made.create("again", node="n1", **cards, pods=["p=auto"]))["spec"]["nics"][0]["ipv6"]


def report(pool: Pool, node: str, evm: str, **what: Any) -> None:
    agent = pool.agents[node]
    agent.evms[evm] = agent.evms[evm].model_copy(update=what)


async def asks(pool: Pool, node: str, evm: str, *addresses: str) -> tuple[str, ...]:
    """The node has heard these of the EVM, and nothing else; return which of them it may use."""
    wishes = tuple(LearntAddress(mac="02:00:0a:4d:01:01", address=address) for address in addresses)
    report(pool, node, evm, asked=wishes)
    return (await pool.agents[node].beat()).allowed[evm]


@pytest.mark.parametrize("address", ["10.77.9.9", SIX, "fe80::5054:ff:fe4d:101"])
async def test_an_address_that_nobody_has_is_given(pool: Pool, address: str) -> None:
    assert await asks(pool, "n1", "web", address) == (address,)
    assert await asks(pool, "n1", "web", address) == (address,)


@pytest.mark.parametrize("address", ["10.77.0.9", "10.77.255.1", "192.0.2.1", "fd00:78::1", "2001:db8::1"])
async def test_an_address_that_the_pool_does_not_hand_out_is_not(pool: Pool, address: str) -> None:
    assert await asks(pool, "n1", "web", address) == ()


async def test_a_declared_address_of_another_evm_is_not(pool: Pool) -> None:
    address = (await pool.get("/v1/evms/db"))["spec"]["nics"][0]["address"]
    assert await asks(pool, "n1", "web", address) == ()


async def test_of_two_guests_that_take_one_address_the_first_has_it(pool: Pool) -> None:
    assert await asks(pool, "n1", "web", "10.77.9.9") == ("10.77.9.9",)
    assert await asks(pool, "n2", "db", "10.77.9.9") == ()
    assert await asks(pool, "n1", "web") == ()
    assert await asks(pool, "n2", "db", "10.77.9.9") == ("10.77.9.9",), "the first uses it no more"


async def test_what_a_guest_took_is_not_handed_out(pool: Pool) -> None:
    assert await asks(pool, "n1", "web", "10.77.1.3", "10.77.9.9") == ("10.77.1.3", "10.77.9.9")
    with pytest.raises(AlreadyExists, match=r"10\.77\.9\.9 is taken"):
        await pool.create("third", pods=["shop=10.77.9.9"])
    third = await pool.create("third")
    assert third["spec"]["nics"][0]["address"] == "10.77.1.4"


async def test_leave_outlives_the_controller(pool: Pool) -> None:
    await asks(pool, "n1", "web", "10.77.9.9")
    await pool.restart()
    assert (await pool.agents["n1"].beat()).allowed == {"web": ("10.77.9.9",)}
    assert await asks(pool, "n2", "db", "10.77.9.9") == ()


async def test_leave_moves_with_the_evm_and_ends_with_it(pool: Pool) -> None:
    await asks(pool, "n1", "web", "10.77.9.9")
    await pool.post("/v1/evms/web/migrations", {"target": "n2"})
    await pool.until("/v1/evms/web", lambda evm: evm["owner"] == "n2" and evm["migration"] is None)
    report(pool, "n2", "web", learnt=(LearntAddress(mac="02:00:0a:4d:01:01", address="10.77.9.9"),))
    assert (await pool.agents["n2"].beat()).allowed == {"db": (), "web": ("10.77.9.9",)}
    await pool.api.request("DELETE", "/v1/evms/web")
    assert await asks(pool, "n2", "db", "10.77.9.9") == ("10.77.9.9",)


async def test_only_the_owner_asks(pool: Pool) -> None:
    agent = pool.agents["n2"]
    stale = agent.evms["db"].model_copy(update={"name": "web", "epoch": 0, "state": EvmState.PAUSED})
    agent.evms["web"] = stale.model_copy(update={"asked": (LearntAddress(mac="02:00:0a:4d:01:01", address=SIX),)})
    assert (await agent.beat()).allowed["web"] == ()
    del agent.evms["web"]


async def test_people_see_what_was_learnt_refused_and_counted(pool: Pool) -> None:
    mine = LearntAddress(mac="02:00:0a:4d:01:01", address="10.77.9.9")
    others = LearntAddress(mac="02:00:0a:4d:01:01", address="10.77.0.3")
    traffic = Traffic(received_frames=7, sent_bytes=99, spoofed_frames=2)
    report(pool, "n1", "web", learnt=(mine,), asked=(others,), traffic=traffic)
    await pool.agents["n1"].beat()
    shown = await pool.get("/v1/evms/web/network")
    assert [one["address"] for one in shown["learnt"]] == ["10.77.9.9"]
    assert [one["address"] for one in shown["refused"]] == ["10.77.0.3"]
    assert shown["traffic"] == traffic.model_dump()
    text = (await pool.api._client.get("/metrics")).text
    assert 'emp_evm_frames_total{direction="received",evm="web"} 7.0' in text
    assert 'emp_evm_bytes_total{direction="sent",evm="web"} 99.0' in text
    assert 'emp_evm_dropped_frames_total{evm="web",why="spoofed"} 2.0' in text
