"""Lists, history and watches of the pool's records outlive a restart of the controller."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.model.api import WatchEvent
from emp.model.errors import BadInput
from emp.wire.exchange import Event
from tests.fakes.pool import Pool, a_pool


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


async def read(
    pool: Pool, query: dict[str, Any], count: int, last_event_id: str = ""
) -> list[tuple[Event, WatchEvent]]:
    """Return the first ``count`` events of a watch."""
    found: list[tuple[Event, WatchEvent]] = []
    async with asyncio.timeout(5):
        events = pool.api.events("/v1/watch", query=query, last_event_id=last_event_id)
        async with contextlib.aclosing(events):
            async for event in events:
                found.append((event, WatchEvent.model_validate_json(event.data)))
                if len(found) == count:
                    break
    return found


async def test_a_watch_from_a_lists_revision_misses_nothing(pool: Pool) -> None:
    listed = await pool.get("/v1/evms")
    await pool.create("web", node="n1")
    await pool.delete("/v1/evms/web")
    seen = await read(pool, {"prefix": "/evms/", "from": listed["revision"]}, 4)
    assert [event.key for _, event in seen] == ["/evms/web"] * 4
    assert [event.value["state"] if event.value else None for _, event in seen][:2] == ["creating", "running"]
    whole = await read(pool, {"prefix": "/evms/web", "from": listed["revision"]}, 4)
    assert whole == seen
    assert (await pool.get("/v1/evms"))["items"] == []


async def test_a_watch_goes_on_over_a_restart_of_the_controller(pool: Pool) -> None:
    first = (await read_one_created(pool))[0]
    await pool.restart()
    await pool.create("db", node="n2")
    seen = await read(pool, {"prefix": "/evms/"}, 2, last_event_id=first.id)
    names = [event.value["spec"]["name"] for _, event in seen if event.value]
    states = [event.value["state"] for _, event in seen if event.value]
    assert names[0] == "web"
    assert states[0] == "running"


async def read_one_created(pool: Pool) -> tuple[Event, WatchEvent]:
    revision = (await pool.get("/v1/evms"))["revision"]
    await pool.create("web", node="n1")
    (created,) = await read(pool, {"prefix": "/evms/", "from": revision}, 1)
    assert created[0].id
    assert created[0].event == "put"
    return created


async def test_without_a_revision_a_watch_begins_now(pool: Pool) -> None:
    await pool.create("web", node="n1")
    watching = asyncio.create_task(read(pool, {"prefix": "/nodes/"}, 1))
    cordoned = 0
    while not watching.done():  # the watch is open once it has seen one of these
        cordoned += 1
        await pool.post(f"/v1/nodes/n1/{'cordon' if cordoned % 2 else 'uncordon'}")
        await asyncio.wait([watching], timeout=0.05)
    ((_, event),) = watching.result()
    assert event.key == "/nodes/n1"
    assert event.value is not None


@pytest.mark.parametrize("prefix", ["/", "/upkeep/", "/counters/", "evms", "/evm", "x" * 300])
async def test_what_is_not_for_people_cannot_be_watched(pool: Pool, prefix: str) -> None:
    with pytest.raises(BadInput) as caught:
        await read(pool, {"prefix": prefix}, 1)
    assert caught.value.field == "prefix"


@pytest.mark.parametrize("start", ["-1", "abc"])
async def test_a_revision_that_is_none(pool: Pool, start: str) -> None:
    with pytest.raises(BadInput) as caught:
        await read(pool, {"prefix": "/evms/", "from": start}, 1)
    assert caught.value.field == "from"
    with pytest.raises(BadInput) as caught:
        await read(pool, {"prefix": "/evms/"}, 1, last_event_id="abc")
    assert caught.value.field == "Last-Event-ID"


async def test_a_revision_that_never_was_is_told_in_the_stream(pool: Pool) -> None:
    events = pool.api.events("/v1/watch", query={"prefix": "/evms/", "from": 10**9})
    async with contextlib.aclosing(events):
        told = [event async for event in events]
    assert [event.event for event in told] == ["error"]
    assert json.loads(told[0].data)["code"] == "future_revision"


async def test_a_volumes_attachments_are_watched_too(pool: Pool) -> None:
    revision = (await pool.get("/v1/volumes"))["revision"]
    made = await pool.create("web", node="n1", volumes=["io2:16MiB"])
    seen = await read(pool, {"prefix": "/volumes/", "from": revision}, 2)
    assert seen[-1][1].value is not None
    assert [a["node"] for a in seen[-1][1].value["attachments"]] == ["n1"]
    assert (await pool.get("/v1/volumes"))["items"][0]["id"] == made["spec"]["volumes"][0]


async def test_lists_survive_a_restart(pool: Pool) -> None:
    await pool.create("web", node="n1", pods=["a"], volumes=["io2:16MiB"])
    before = {path: (await pool.get(path))["items"] for path in ("/v1/evms", "/v1/volumes")}
    await pool.restart()
    assert {path: (await pool.get(path))["items"] for path in before} == before
