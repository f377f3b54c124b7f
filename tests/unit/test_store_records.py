"""Records and counters, as the controller uses them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.model.base import Model
from emp.model.errors import AlreadyExists, BadInput, Conflict, NotFound
from emp.store.base import Compare, Delete, Op, Put, TxnResult, absent, unchanged
from emp.store.records import BadRecord, Counter, Records
from emp.store.sqlite import SqliteStore


class Box(Model):
    owner: str
    size_bytes: int = 0


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    async with await SqliteStore.open(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def boxes(store: SqliteStore) -> Records[Box]:
    return Records(store, "/boxes/", Box)


async def test_what_is_created_is_found(boxes: Records[Box]) -> None:
    created = await boxes.create("a", Box(owner="ann", size_bytes=1))
    assert await boxes.get("a") == await boxes.find("a") == created
    assert created.kv.version == 1
    await boxes.create("b", Box(owner="bob"))
    listing = await boxes.list()
    assert [(record.name, record.model.owner) for record in listing.records] == [("a", "ann"), ("b", "bob")]
    assert listing.revision == listing.records[-1].kv.mod_revision


async def test_mistakes_are_named(boxes: Records[Box], store: SqliteStore) -> None:
    await boxes.create("a", Box(owner="ann"))
    with pytest.raises(AlreadyExists, match="box a exists already"):
        await boxes.create("a", Box(owner="bob"))
    assert (await boxes.get("a")).model.owner == "ann"
    assert await boxes.find("b") is None
    for call in (boxes.get("b"), boxes.delete("b"), boxes.update("b", lambda box: box)):
        with pytest.raises(NotFound, match="no box is named b"):
            await call
    for name in ("", "x y", "é", "x/"):
        with pytest.raises(BadInput) as caught:
            await boxes.get(name)
        assert caught.value.field == "name"
    with pytest.raises(BadInput):
        Records(store, "/boxes", Box)


async def test_updates_at_the_same_time_all_count(boxes: Records[Box]) -> None:
    await boxes.create("a", Box(owner="ann"))

    def grow(box: Box) -> Box:
        return box.model_copy(update={"size_bytes": box.size_bytes + 1})

    await asyncio.gather(*(boxes.update("a", grow) for _ in range(150)))
    record = await boxes.get("a")
    assert record.model.size_bytes == 150
    assert record.kv.version == 151
    assert await boxes.update("a", grow) == await boxes.get("a")


async def test_an_update_that_changes_nothing_or_refuses_writes_nothing(boxes: Records[Box]) -> None:
    created = await boxes.create("a", Box(owner="ann"))
    assert await boxes.update("a", lambda box: Box(owner=box.owner)) == created

    def refuse(box: Box) -> Box:
        raise Conflict("not now")

    with pytest.raises(Conflict, match="not now"):
        await boxes.update("a", refuse)
    assert (await boxes.list()).revision == created.kv.mod_revision


async def test_an_update_does_not_bring_back_what_was_deleted(
    boxes: Records[Box], store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await boxes.create("a", Box(owner="ann"))
    txn = store.txn

    async def after_a_deletion(compares: list[Compare], then: list[Op], otherwise: list[Op]) -> TxnResult:
        await txn([], [Delete("/boxes/a")])
        return await txn(compares, then, otherwise)

    monkeypatch.setattr(store, "txn", after_a_deletion)
    with pytest.raises(NotFound):
        await boxes.update("a", lambda _: Box(owner="bob"))
    assert await boxes.find("a") is None


async def test_delete_can_insist_on_what_was_seen(boxes: Records[Box]) -> None:
    seen = await boxes.create("a", Box(owner="ann"))
    now = await boxes.update("a", lambda _: Box(owner="bob"))
    with pytest.raises(Conflict, match="changed in the meantime"):
        await boxes.delete("a", seen=seen)
    assert await boxes.get("a") == now
    await boxes.delete("a", seen=now)
    with pytest.raises(NotFound):
        await boxes.delete("a", seen=now)


async def test_records_keep_their_lease(boxes: Records[Box], store: SqliteStore) -> None:
    lease = await store.grant(60)
    created = await boxes.create("a", Box(owner="ann"), lease=lease.id)
    assert created == await boxes.get("a")
    await boxes.update("a", lambda _: Box(owner="bob"))
    await store.revoke(lease.id)
    assert await boxes.find("a") is None


async def test_a_watch_gives_models(boxes: Records[Box], store: SqliteStore) -> None:
    start = (await boxes.list()).revision
    a = await boxes.create("a", Box(owner="ann"))
    await store.txn([], [Put("/other/a", b"")])
    b = await boxes.update("a", lambda _: Box(owner="bob"))
    await boxes.delete("a")
    async with boxes.watch(start) as watch, asyncio.timeout(10):
        changes = [await anext(watch) for _ in range(3)]
        await watch.aclose()
        assert [change async for change in watch] == []
    assert [change.record for change in changes] == [a, b, None]
    assert [(change.name, change.last) for change in changes] == [("a", True)] * 3


async def test_one_transaction_may_span_records(boxes: Records[Box], store: SqliteStore) -> None:
    a = await boxes.create("a", Box(owner="ann"))
    move = [boxes.put("a", Box(owner="bob")), boxes.put("b", a.model)]
    assert (await store.txn([unchanged(a.kv), absent(boxes.key("b"))], move)).succeeded
    assert not (await store.txn([unchanged(a.kv)], move)).succeeded
    assert [(await boxes.get(name)).model.owner for name in "ab"] == ["bob", "ann"]


@pytest.mark.parametrize("value", [b"", b"{", b'{"owner": "ann", "colour": "red"}', b'{"size_bytes": 1}', b"\xff"])
async def test_a_value_that_is_no_model_is_named(boxes: Records[Box], store: SqliteStore, value: bytes) -> None:
    await store.txn([], [Put("/boxes/a", value)])
    for call in (boxes.get("a"), boxes.list(), boxes.update("a", lambda box: box)):
        with pytest.raises(BadRecord, match="/boxes/a is not a valid box"):
            await call


async def test_numbers_are_never_issued_twice(store: SqliteStore) -> None:
    counter = Counter(store, "/epochs/web")
    assert await counter.last() == 0
    tasks = [asyncio.create_task(counter.issue()) for _ in range(40)]
    await store.get("/x")
    for task in tasks[::3]:
        task.cancel()
    numbers = [n for n in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(n, int)]
    assert len(numbers) >= 20
    assert len(set(numbers)) == len(numbers)
    last = await counter.last()
    assert max(numbers) <= last <= 40
    await store.close()
    async with await SqliteStore.open(store.path) as again:
        counter = Counter(again, "/epochs/web")
        assert await counter.issue() == last + 1
        assert await counter.issue(above=1000) == 1001
        assert await counter.issue(above=5) == 1002
        assert await Counter(again, "/epochs/db").issue() == 1
        await again.txn([], [Put("/epochs/web", b"-3")])
        with pytest.raises(BadRecord):
            await counter.issue()
