"""Nodes report with their own certificate, are down when they fall silent, and what is known outlives a restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.model.errors import BadInput, Forbidden, NotFound, Unauthenticated, Unreachable
from emp.model.evm import EvmState
from emp.model.node import EvmReport
from emp.wire.http import WireClient
from emp.wire.identity import Identity, Role
from emp.wire.secret import Secret
from emp.wire.tls import public_client
from tests.fakes.pool import Pool, a_pool
from tests.fakes.values import GIB, a_report
from tests.fakes.volumes import HOST


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


async def test_ready_nodes_are_listed_with_what_they_report(pool: Pool) -> None:
    listed = await pool.get("/v1/nodes")
    assert [(n["report"]["name"], n["ready"], n["cordoned"]) for n in listed["items"]] == [
        ("n1", True, False),
        ("n2", True, False),
    ]
    assert listed["items"][0]["report"]["memory_bytes"] == 4 * GIB
    assert listed["revision"] > 0


async def test_heartbeats_that_say_nothing_new_write_nothing(pool: Pool) -> None:
    before = (await pool.get("/healthz"))["revision"]
    for _ in range(5):
        assert (await pool.agents["n1"].beat()).interval_s == pool.heartbeat_s
    assert (await pool.get("/healthz"))["revision"] == before


async def test_a_silent_node_is_down_and_comes_back(tmp_path: Path) -> None:
    async with a_pool(tmp_path, "n1", "n2", node_down_s=0.5) as pool:
        await check_silence(pool)


async def check_silence(pool: Pool) -> None:
    await pool.agents["n1"].stop_beating()
    down = await pool.until("/v1/nodes/n1", lambda node: not node["ready"])
    assert down["last_seen_at"] > 0
    pool.agents["n1"].start_beating()
    await pool.until("/v1/nodes/n1", lambda node: node["ready"])


async def test_after_a_restart_a_silent_node_is_found_down_and_cordons_hold(pool: Pool) -> None:
    await pool.post("/v1/nodes/n2/cordon")
    await pool.stop()
    silent = pool.agents.pop("n1")
    await pool.start()
    assert (await pool.get("/v1/nodes/n1"))["report"]["name"] == "n1"
    pool.agents["n1"] = silent
    assert (await pool.get("/v1/nodes/n1"))["ready"]  # it has the usual time to report
    await pool.lose("n1")
    assert not (await pool.get("/v1/nodes/n1"))["ready"]
    assert (await pool.get("/v1/nodes/n2"))["cordoned"]


@pytest.mark.parametrize("verb", ["", "/cordon", "/uncordon"])
async def test_an_unknown_node(pool: Pool, verb: str) -> None:
    with pytest.raises(NotFound, match="no node is named 'n9'") as caught:
        await pool.api.request("POST" if verb else "GET", f"/v1/nodes/n9{verb}")
    assert caught.value.field == "node"


# ------------------------------------------------------------------ who may say what


async def test_an_agent_speaks_only_for_its_own_node(pool: Pool) -> None:
    async with pool.client_of("n2") as n2:
        with pytest.raises(Forbidden, match="agent-n2 does not speak for node n1"):
            await n2.request("POST", "/v1/agents/n1/heartbeat", a_report("n1"))
        with pytest.raises(BadInput, match="the report is of n1"):
            await n2.request("POST", "/v1/agents/n2/heartbeat", a_report("n1"))
    async with pool.client_of("controller") as not_an_agent:
        with pytest.raises(Forbidden):
            await not_an_agent.request("POST", "/v1/agents/main/heartbeat", a_report("main"))


async def test_the_agents_port_takes_no_one_without_a_certificate(pool: Pool) -> None:
    assert pool.controller is not None
    tls = public_client(pool.credentials / "controller" / "ca-cert.pem")
    url = f"https://{HOST}:{pool.controller.agents_port}"
    async with WireClient(url, tls=tls, server=Identity(Role.CONTROLLER, "main"), token=pool.token) as person:
        with pytest.raises(Unreachable, match="certificate"):
            await person.request("POST", "/v1/agents/n1/heartbeat", a_report("n1"))


@pytest.mark.parametrize(
    "path", ["/v1/nodes", "/v1/evms", "/v1/migrations", "/v1/volumes", "/metrics", "/openapi.json"]
)
async def test_people_need_the_token(pool: Pool, path: str) -> None:
    for token in (None, Secret.new()):
        async with pool.person(token) as stranger:
            with pytest.raises(Unauthenticated):
                await stranger.request("GET", path)
            assert (await stranger.request("GET", "/healthz"))["status"] == "ok"


async def test_an_agents_certificate_is_no_token(pool: Pool) -> None:
    with pytest.raises(NotFound):  # the people's API is not on the agents' port at all
        async with pool.client_of("n1") as agent:
            await agent.request("GET", "/v1/evms")


async def test_openapi_names_every_verb(pool: Pool) -> None:
    paths = (await pool.get("/openapi.json"))["paths"]
    assert {"/healthz", "/v1/nodes/{name}/cordon", "/v1/evms/{name}/migrations", "/v1/watch"} <= set(paths)
    assert not any("agents" in path for path in paths)


async def test_metrics_count_nodes_and_evms(pool: Pool) -> None:
    await pool.create("web")
    lines = (await _text(pool, "/metrics")).splitlines()
    assert 'emp_nodes{state="ready"} 2.0' in lines
    assert 'emp_evms{state="running"} 1.0' in lines
    assert 'emp_migrations_total{outcome="completed"} 0.0' in lines


async def _text(pool: Pool, path: str) -> str:
    """The client of the pool reads JSON; Prometheus's text is read with the bare HTTP client below it."""
    response = await pool.api._client.get(path)
    assert response.headers["content-type"].startswith("text/plain")
    return response.text


# ------------------------------------------------------------------ what agents say of EVMs


async def test_an_evm_that_its_owner_does_not_know_is_unknown(pool: Pool) -> None:
    await pool.create("web", node="n1")
    lost = pool.agents["n1"].evms.pop("web")
    shown = await pool.until("/v1/evms/web", lambda evm: evm["state"] == "unknown")
    assert shown["reason"] == "n1 does not know this EVM"
    pool.agents["n1"].evms["web"] = lost
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "running")


async def test_a_newer_epoch_elsewhere_makes_its_node_the_owner(pool: Pool) -> None:
    """The controller had missed a hand-over; an older word of another node changes nothing."""
    made = await pool.create("web", node="n1")
    stale = EvmReport(name="web", state=EvmState.RUNNING, epoch=made["epoch"] - 1)
    pool.agents["n2"].evms["web"] = stale
    await pool.agents["n2"].beat()
    assert (await pool.get("/v1/evms/web"))["owner"] == "n1"
    pool.agents["n1"].evms.clear()
    pool.agents["n2"].evms["web"] = stale.model_copy(update={"epoch": made["epoch"] + 9})
    await pool.agents["n2"].beat()
    shown = await pool.get("/v1/evms/web")
    assert (shown["owner"], shown["epoch"], shown["state"]) == ("n2", made["epoch"] + 9, "running")


async def test_a_paused_guest_is_shown_with_the_reason(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.agents["n1"].set_state("web", EvmState.PAUSED, "storage error: EIO")
    shown: Any = await pool.until("/v1/evms/web", lambda evm: evm["state"] == "paused")
    assert shown["reason"] == "storage error: EIO"


async def test_a_node_of_an_overlay_is_told_where_other_nodes_evms_are(pool: Pool) -> None:
    places = {"web": "n1", "db": "n2"}
    macs = {name: (await pool.create(name, node=node))["spec"]["nics"][0]["mac"] for name, node in places.items()}
    agent = pool.agents["n1"]
    assert (await agent.beat()).elsewhere is None, "its driver need not know"
    agent.is_overlay = True
    assert (await agent.beat()).elsewhere == {macs["db"]: "n2"}
    await pool.post("/v1/evms/db/migrations", {"target": "n1"})
    await pool.until("/v1/evms/db", lambda evm: evm["owner"] == "n1" and evm["migration"] is None)
    assert (await agent.beat()).elsewhere == {}
