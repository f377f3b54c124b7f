"""A console stays attached across a migration, and ends with the EVM."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from emp.model.errors import BadInput, Conflict, NodeDown, NotFound
from emp.wire.exchange import Exchange
from tests.fakes.agent import Script
from tests.fakes.pool import Pool, a_pool


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


class Reader:
    """One client's view of a console, from one connection."""

    def __init__(self, pool: Pool, evm: str) -> None:
        self.text = b""
        self._grown = asyncio.Condition()
        self._task = asyncio.create_task(self._read(pool, evm), name="console reader")

    async def _read(self, pool: Pool, evm: str) -> None:
        target = pool.api._target
        exchange = Exchange(target, "GET", f"/v1/evms/{evm}/console", idempotent=True, timeout_s=None)
        async with httpx2.AsyncClient(**target.options) as client:
            parameters = exchange.parameters(None, None, trace=exchange.atrace, read_s=None)
            async with client.stream(**parameters) as response:
                assert response.status_code == 200
                async for data in response.aiter_raw():
                    async with self._grown:
                        self.text += data
                        self._grown.notify_all()

    async def until(self, text: bytes) -> None:
        async with asyncio.timeout(30), self._grown:
            await self._grown.wait_for(lambda: text in self.text)

    async def ended(self) -> None:
        async with asyncio.timeout(30):
            await self._task

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


async def type_at(pool: Pool, evm: str, data: bytes) -> Any:
    response = await pool.api._client.post(f"/v1/evms/{evm}/console", content=data)
    assert response.status_code == 204, response.text


async def test_the_console_follows_a_migration_on_one_connection(pool: Pool) -> None:
    await pool.create("web", node="n1")
    reader = Reader(pool, "web")
    await reader.until(b"web on n1\n")
    begun = await pool.post("/v1/evms/web/migrations", {"target": "n2"})
    await reader.until(b"web on n2\n")
    assert reader.text == b"web on n1\nweb on n2\n"
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "closed")
    pool.agents["n2"].consoles["web"].put_nowait(b"still here\n")
    await reader.until(b"still here\n")
    await reader.close()


async def test_the_console_ends_when_the_evm_is_stopped_and_when_it_is_deleted(pool: Pool) -> None:
    await pool.create("web", node="n1")
    reader = Reader(pool, "web")
    await reader.until(b"web on n1\n")
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    await reader.ended()
    await pool.post("/v1/evms/web/start")
    reader = Reader(pool, "web")
    await reader.until(b"web on n1\n")
    await pool.delete("/v1/evms/web")
    await reader.ended()


async def test_the_console_ends_when_the_controller_stops(pool: Pool) -> None:
    await pool.create("web", node="n1")
    reader = Reader(pool, "web")
    await reader.until(b"web on n1\n")
    async with asyncio.timeout(3):  # it does not wait for its readers
        await pool.stop()
    await reader.ended()


async def test_input_goes_to_where_the_evm_runs(pool: Pool) -> None:
    await pool.create("web", node="n1")
    await type_at(pool, "web", b"ls\n")
    assert pool.agents["n1"].typed == [b"ls\n"]
    script = pool.agents["n1"].script = Script()
    script.precopy.set()
    begun = await pool.post("/v1/evms/web/migrations", {"target": "n2"})
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "blackout")
    typing = asyncio.create_task(type_at(pool, "web", b"\x03"))
    await asyncio.wait([typing], timeout=0.2)
    assert not typing.done()  # a paused guest reads nothing: it waits for the end of the blackout
    script.blackout.set()
    await typing
    assert (pool.agents["n1"].typed, pool.agents["n2"].typed) == ([b"ls\n"], [b"\x03"])
    script.clearing.set()
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "closed")


async def test_a_console_that_is_not_there_says_why(pool: Pool) -> None:
    with pytest.raises(NotFound) as missing:
        await pool.get("/v1/evms/nosuch/console")
    assert missing.value.field == "evm"
    await pool.create("web", node="n1")
    with pytest.raises(BadInput):
        await pool.api.request("POST", "/v1/evms/web/console", "x" * 70_000)
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    with pytest.raises(Conflict, match="it has no console"):
        await pool.get("/v1/evms/web/console")
    await pool.post("/v1/evms/web/start")
    await pool.lose("n1")
    await pool.until("/v1/evms/web", lambda evm: evm["state"] == "unknown")
    with pytest.raises(NodeDown, match="since"):
        await pool.get("/v1/evms/web/console")
