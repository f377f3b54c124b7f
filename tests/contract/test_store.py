"""The contract of ``emp.store.base``, run on every implementation.

Nothing here may lean on how an implementation works: what is particular to one belongs to its unit tests. Two more
parts of the suite run on the same ``IMPLEMENTATIONS``: ``tests/unit/test_store_model.py`` (any sequence of calls) and
``tests/unit/test_store_killed.py`` (death of the process).
"""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from emp.model.errors import BadInput, StoreUnavailable
from emp.store.base import (
    Compacted,
    Compare,
    Delete,
    Event,
    EventKind,
    FutureRevision,
    Get,
    KeyValue,
    LeaseGone,
    Op,
    Put,
    Store,
    Watch,
    absent,
    present,
    unchanged,
    value_is,
)
from emp.store.sqlite import SqliteStore

WAIT_S = 60.0  # hundreds of commits on a disk that others use
RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class Implementation:
    """How the suite gets a store: ``locate`` names an empty one, ``open`` opens it, again and again."""

    locate: Callable[[Path], str]
    open: Callable[[str], Awaitable[Store]]


IMPLEMENTATIONS = {"sqlite": Implementation(lambda directory: str(directory / "store.db"), SqliteStore.open)}


@pytest.fixture(params=IMPLEMENTATIONS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def location(name: str, tmp_path: Path) -> str:
    return IMPLEMENTATIONS[name].locate(tmp_path)


@pytest.fixture
def reopen(name: str, location: str) -> Callable[[], Awaitable[Store]]:
    return lambda: IMPLEMENTATIONS[name].open(location)


@pytest.fixture
async def store(reopen: Callable[[], Awaitable[Store]]) -> AsyncIterator[Store]:
    async with closing(await reopen()) as opened:
        yield opened


@asynccontextmanager
async def closing(store: Store) -> AsyncIterator[Store]:
    try:
        yield store
    finally:
        await store.close()


async def take(watch: Watch, count: int) -> list[Event]:
    async with asyncio.timeout(WAIT_S):
        return [await anext(watch) for _ in range(count)]


async def put(store: Store, key: str, value: bytes = b"{}", lease: int = 0) -> int:
    return (await store.txn([], [Put(key, value, lease)])).revision


async def revision_of(store: Store) -> int:
    return (await store.range("/")).revision


async def keys(store: Store, prefix: str) -> list[str]:
    return [kv.key for kv in (await store.range(prefix)).kvs]


# --- keys, ranges, transactions


async def test_a_key_carries_its_revisions(store: Store) -> None:
    assert await store.get("/a/x") is None
    first = await put(store, "/a/x", b"1")
    await put(store, "/a/other")
    second = await put(store, "/a/x", b"2")
    assert await store.get("/a/x") == KeyValue("/a/x", b"2", first, second, version=2)
    await store.txn([], [Delete("/a/x")])
    assert await store.get("/a/x") is None
    third = await put(store, "/a/x", b"3")
    assert await store.get("/a/x") == KeyValue("/a/x", b"3", third, third, version=1)


async def test_the_revision_grows_by_one_per_change_and_only_then(store: Store) -> None:
    start = await revision_of(store)
    assert await put(store, "/a/x") == start + 1
    assert (await store.txn([], [Put("/a/y", b""), Put("/a/z", b""), Delete("/a/x")])).revision == start + 2
    assert (await store.txn([], [Delete("/a/absent"), Get("/a/y")])).revision == start + 2
    assert (await store.txn([absent("/a/y")], [Put("/a/y", b"")])).revision == start + 2
    assert (await store.txn([], [])).revision == start + 2
    assert await put(store, "/a/y") == start + 3, "an equal value is a change"


async def test_range_is_ordered_paged_and_exact(store: Store) -> None:
    for key in ("/evms/web2", "/evms/web", "/evms-x/web", "/evms/db", "/evm", "/evms/web/nics", "/evms0"):
        await put(store, key)
    below = ["/evms/db", "/evms/web", "/evms/web/nics", "/evms/web2"]
    assert await keys(store, "/evms/") == below
    assert await keys(store, "/evms/web") == ["/evms/web"], "a key selects itself, not its namesakes"
    assert len(await keys(store, "/")) == 7
    page = await store.range("/evms/", limit=2)
    assert ([kv.key for kv in page.kvs], page.more) == (below[:2], True)
    rest = await store.range("/evms/", limit=2, after=page.kvs[-1].key)
    assert ([kv.key for kv in rest.kvs], rest.more) == (below[2:], False)
    assert (await store.range("/evms/", after="/evms/web2")).kvs == ()
    assert page.revision == rest.revision == await revision_of(store)


async def test_values_are_any_bytes(store: Store) -> None:
    for value in (b"", b"\0", bytes(range(256)), "é".encode(), b"x" * 1_000_000):
        await put(store, "/v/x", value)
        found = await store.get("/v/x")
        assert found is not None
        assert found.value == value


async def test_a_failed_compare_takes_the_other_branch(store: Store) -> None:
    await put(store, "/a/x", b"1")
    result = await store.txn(
        [value_is("/a/x", b"2")], [Put("/a/y", b"then")], [Get("/a/x"), Get("/a/absent"), Put("/a/z", b"else")]
    )
    assert not result.succeeded
    assert [kv and kv.value for kv in result.found] == [b"1", None]
    assert await keys(store, "/a/") == ["/a/x", "/a/z"]


async def test_a_get_sees_the_writes_before_it(store: Store) -> None:
    result = await store.txn([], [Get("/a/x"), Put("/a/x", b"1"), Get("/a/x")])
    before, after = result.found
    assert before is None
    assert after == KeyValue("/a/x", b"1", result.revision, result.revision, 1)


@pytest.mark.parametrize("target", ["value", "version", "create_revision", "mod_revision"])
@pytest.mark.parametrize("relation", ["=", "!=", "<", ">"])
async def test_every_compare(store: Store, target: str, relation: str) -> None:
    await put(store, "/a/x", b"m")
    await put(store, "/a/x", b"n")
    kv = await store.get("/a/x")
    assert kv is not None
    actual = getattr(kv, target)
    for operand in (b"a", b"n", b"z", b"na") if target == "value" else (0, actual - 1, actual, actual + 1):
        compare = Compare("/a/x", target, relation, operand)  # type: ignore[arg-type]
        expected = RELATIONS[relation](actual, operand)
        assert (await store.txn([compare], [])).succeeded == expected, (actual, relation, operand)
        of_absent = Compare("/a/absent", target, relation, operand)  # type: ignore[arg-type]
        expected = target != "value" and RELATIONS[relation](0, operand)
        assert (await store.txn([of_absent], [])).succeeded == expected, ("absent", relation, operand)


async def test_create_if_absent_has_one_winner(store: Store) -> None:
    attempts = [store.txn([absent("/a/x")], [Put("/a/x", b"%d" % n)]) for n in range(20)]
    results = await asyncio.gather(*attempts)
    assert sum(result.succeeded for result in results) == 1
    kv = await store.get("/a/x")
    assert kv is not None
    assert results[int(kv.value)].succeeded
    assert (await store.txn([present("/a/x"), unchanged(kv)], [])).succeeded


@pytest.mark.parametrize(
    ("field", "compares", "ops"),
    [
        ("key", [], [Put("no-slash", b"")]),
        ("key", [], [Put("/ends/", b"")]),
        ("key", [], [Get("/")]),
        ("key", [], [Delete("/a b")]),
        ("key", [], [Delete("/é")]),
        ("key", [], [Delete("/a\n")]),
        ("key", [], [Put("/" + "x" * 512, b"")]),
        ("key", [absent("")], []),
        ("ops", [], [Put("/a", b"1"), Put("/a", b"2")]),
        ("ops", [], [Put("/a", b"1"), Delete("/a")]),
        ("ops", [], [Get("/a")] * 513),
        ("compares", [absent("/a")] * 513, []),
        ("compares", [Compare("/a", "version", "=", b"1")], []),
        ("value", [], [Put("/a", "text")]),  # type: ignore[arg-type]
        ("value", [], [Put("/a", b"x" * 600_000), Put("/b", b"x" * 600_000)]),
        ("lease", [], [Put("/a", b"", lease=-1)]),
    ],
)
async def test_bad_transactions_are_refused_whole(
    store: Store, field: str, compares: Sequence[Compare], ops: Sequence[Op]
) -> None:
    start = await revision_of(store)
    with pytest.raises(BadInput) as caught:
        await store.txn(compares, [Put("/fine", b""), *ops][-513:])
    assert caught.value.field == field
    with pytest.raises(BadInput):
        await store.txn([absent("/a")], [], list(ops) or [Get("")])
    assert await revision_of(store) == start


async def test_other_bad_input(store: Store) -> None:
    for call in (
        lambda: store.get("/a/"),
        lambda: store.range("a"),
        lambda: store.range("/a/", limit=0),
        lambda: store.range("/a/", after="\ud800"),
        lambda: store.grant(0),
        lambda: store.grant(float("nan")),
        lambda: store.grant(1e9),
        lambda: store.compact(-1),
    ):
        with pytest.raises(BadInput):
            await call()
    with pytest.raises(BadInput):
        store.watch("a", 0)
    with pytest.raises(BadInput):
        store.watch("/", -1)


async def test_cancelled_callers_leave_whole_transactions(store: Store) -> None:
    start = await revision_of(store)

    async def write(n: int) -> None:
        await store.txn([], [Put(f"/left/{n}", b""), Put(f"/right/{n}", b"")])

    tasks = [asyncio.create_task(write(n)) for n in range(60)]
    for n, task in enumerate(tasks):
        if n % 10 == 0:  # let some of them be under way
            await store.get("/left/0")
        if n % 2:
            task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    left = {key.removeprefix("/left/") for key in await keys(store, "/left/")}
    right = {key.removeprefix("/right/") for key in await keys(store, "/right/")}
    assert left == right
    assert left >= {str(n) for n, outcome in enumerate(outcomes) if outcome is None}
    assert await revision_of(store) == start + len(left)


# --- watches


async def test_a_watch_replays_then_follows(store: Store) -> None:
    start = await revision_of(store)
    one = await put(store, "/a/x", b"1")
    await put(store, "/b/x")
    async with store.watch("/a/", start) as watch:
        two = (await store.txn([], [Put("/a/x", b"2"), Put("/b/y", b""), Put("/a/y", b"")])).revision
        replayed = await take(watch, 3)
        waiting = asyncio.create_task(take(watch, 1))
        await store.get("/a/x")
        three = (await store.txn([], [Delete("/a/x"), Put("/b/x", b"")])).revision
        live = await waiting
    assert replayed == [
        Event(EventKind.PUT, KeyValue("/a/x", b"1", one, one, 1), one, last=True),
        Event(EventKind.PUT, KeyValue("/a/x", b"2", one, two, 2), two, last=False),
        Event(EventKind.PUT, KeyValue("/a/y", b"", two, two, 1), two, last=True),
    ]
    assert live == [Event(EventKind.DELETE, KeyValue("/a/x", b"", 0, three, 0), three, last=True)]


async def test_a_watch_of_a_key_sees_that_key(store: Store) -> None:
    start = await revision_of(store)
    for key in ("/evms/web2", "/evms/web/x", "/evms/we", "/evms/web"):
        await put(store, key)
    async with store.watch("/evms/web", start) as watch:
        assert (await take(watch, 1))[0].kv.key == "/evms/web"


async def test_a_watch_goes_on_after_reopening(store: Store, reopen: Callable[[], Awaitable[Store]]) -> None:
    start = await revision_of(store)
    revisions = [await put(store, f"/a/{n:03}") for n in range(5)]
    seen = await take(store.watch("/a/", start), 2)
    await store.close()
    async with closing(await reopen()) as again:
        revisions.append(await put(again, "/a/new"))
        seen += await take(again.watch("/a/", seen[-1].revision), 4)
    assert [event.revision for event in seen] == revisions == list(range(start + 1, start + 7))


async def test_long_history_and_many_readers(store: Store) -> None:
    """More than a page of history, transactions of many keys, and readers that begin at different places."""
    start = await revision_of(store)
    for n in range(12):
        await store.txn([], [Put(f"/a/{k}", b"%d" % n) for k in range(100)])
    expected = [(start + 1 + n, b"%d" % n) for n in range(12) for _ in range(100)]

    async def read(begin: int) -> list[tuple[int, bytes]]:
        async with store.watch("/a/", start + begin) as watch:
            events = await take(watch, 100 * (12 - begin))
        assert [event.last for event in events] == ([False] * 99 + [True]) * (12 - begin)
        return [(event.revision, event.kv.value) for event in events]

    for begin, events in enumerate(await asyncio.gather(*(read(begin) for begin in range(12)))):
        assert events == expected[100 * begin :]


async def test_a_cancelled_reader_loses_no_event(store: Store) -> None:
    start = await revision_of(store)
    count = 150

    async def write() -> None:
        for n in range(count):
            await store.txn([], [Put("/a/x", b"%d" % n), Put("/b/x", b"")])
            await put(store, "/c/x")

    writer = asyncio.create_task(write())
    values: list[int] = []
    cancelled = 0
    async with store.watch("/a/", start) as watch, asyncio.timeout(WAIT_S):
        while len(values) < count:
            reader = asyncio.ensure_future(anext(watch))
            for _ in range(cancelled % 7):
                await asyncio.sleep(0)
            if not reader.done():
                reader.cancel()
            try:
                values.append(int((await reader).kv.value))
            except asyncio.CancelledError:
                cancelled += 1
            await store.get("/a/x")
    await writer
    assert values == list(range(count))
    assert cancelled


async def test_closing_ends_watches(store: Store) -> None:
    revision = await put(store, "/a/x")

    async def read(watch: Watch) -> int:
        return len([event async for event in watch])

    idle, own = store.watch("/a/", revision), store.watch("/a/", revision)
    readers = [asyncio.create_task(read(watch)) for watch in (idle, own)]
    await store.get("/a/x")
    await own.aclose()
    assert await asyncio.wait_for(readers[1], WAIT_S) == 0
    assert not readers[0].done()
    unread = store.watch("/a/", revision - 1)
    await asyncio.gather(store.close(), store.close())
    await store.close()
    assert await asyncio.wait_for(readers[0], WAIT_S) == 0
    assert await read(unread) == 0
    for call in (store.get("/a/x"), store.txn([], []), store.grant(5), store.keep_alive(1), store.compact(0)):
        with pytest.raises(StoreUnavailable):
            await call
    with pytest.raises(StoreUnavailable):
        store.watch("/a/", revision)


async def test_a_revision_that_never_was(store: Store) -> None:
    revision = await put(store, "/a/x")
    with pytest.raises(FutureRevision, match=str(revision + 5)):
        await take(store.watch("/a/", revision + 5), 1)
    with pytest.raises(FutureRevision):
        await store.compact(revision + 1)


# --- compaction


async def test_compaction_forgets_history_and_keeps_records(
    store: Store, reopen: Callable[[], Awaitable[Store]]
) -> None:
    start = await revision_of(store)
    for n in range(10):
        await put(store, "/a/x", b"%d" % n)
    await store.txn([], [Delete("/a/x")])
    kept = await put(store, "/a/y")
    middle = start + 6
    await store.compact(middle)
    await store.compact(middle)
    await store.compact(start)
    for _ in range(2):
        with pytest.raises(Compacted) as caught:
            await take(store.watch("/a/", start), 1)
        assert caught.value.oldest == middle
        assert caught.value.http_status == 410
        events = await take(store.watch("/a/", caught.value.oldest), 6)
        assert [event.revision for event in events] == list(range(middle + 1, kept + 1))
        await store.close()
        store = await reopen()
    await store.compact(kept)
    assert [(kv.key, kv.create_revision) for kv in (await store.range("/")).kvs] == [("/a/y", kept)]
    assert await put(store, "/a/z") == kept + 1, "the revision goes on, whatever was forgotten"
    await store.close()


async def test_an_idle_watch_survives_compaction_and_a_late_one_is_told(store: Store) -> None:
    start = await put(store, "/a/x", b"1")
    async with store.watch("/a/", start) as idle, store.watch("/", start) as late:
        reader = asyncio.create_task(take(idle, 1))
        for _ in range(10):
            newest = await put(store, "/b/x")
        await store.compact(newest)
        assert not reader.done()
        await put(store, "/a/x", b"2")
        assert [event.kv.value for event in await reader] == [b"2"]
        with pytest.raises(Compacted):
            await take(late, 1)


# --- leases


async def test_keys_vanish_together_when_their_lease_runs_out(store: Store) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    lease = await store.grant(0.5)
    other = await store.grant(60)
    assert lease.ttl_s >= 0.5
    assert lease.id != other.id
    await store.txn([], [Put("/l/a", b"", lease.id), Put("/l/b", b"", lease.id), Put("/l/c", b"", other.id)])
    await put(store, "/l/d", b"", lease.id)
    await put(store, "/l/d", b"freed")
    start = await put(store, "/l/e", b"")
    events = await take(store.watch("/l/", start), 2)
    assert loop.time() - begun >= lease.ttl_s
    assert [(event.kind, event.kv.key, event.last) for event in events] == [
        (EventKind.DELETE, "/l/a", False),
        (EventKind.DELETE, "/l/b", True),
    ]
    assert {event.revision for event in events} == {start + 1}
    assert await keys(store, "/l/") == ["/l/c", "/l/d", "/l/e"]
    with pytest.raises(LeaseGone):
        await store.keep_alive(lease.id)
    with pytest.raises(LeaseGone):
        await store.txn([], [Put("/l/whole", b""), Delete("/l/e"), Put("/l/a", b"", lease.id)])
    assert await keys(store, "/l/") == ["/l/c", "/l/d", "/l/e"]
    assert await revision_of(store) == start + 1


async def test_a_lease_that_is_kept_alive_stays(store: Store) -> None:
    loop = asyncio.get_running_loop()
    lease = await store.grant(1.0)
    start = await put(store, "/l/a", b"", lease.id)
    until = loop.time() + 2 * lease.ttl_s
    while loop.time() < until:
        await asyncio.sleep(lease.ttl_s / 5)
        await store.keep_alive(lease.id)
    kept = loop.time()
    found = await store.get("/l/a")
    assert found is not None
    assert found.lease == lease.id
    (event,) = await take(store.watch("/l/", start), 1)
    assert event.kind is EventKind.DELETE
    assert loop.time() - kept >= lease.ttl_s * 0.9


async def test_revoking_deletes_at_once(store: Store) -> None:
    lease = await store.grant(60)
    start = await put(store, "/l/a", b"", lease.id)
    await store.revoke(lease.id)
    assert await store.get("/l/a") is None
    assert await revision_of(store) == start + 1
    for gone in (lease.id, 1 << 70, 0):
        with pytest.raises(LeaseGone):
            await store.revoke(gone)
        with pytest.raises(LeaseGone):
            await store.keep_alive(gone)
    empty = await store.grant(60)
    await store.revoke(empty.id)
    assert await revision_of(store) == start + 1
    assert empty.id != lease.id


async def test_a_lease_survives_reopening(store: Store, reopen: Callable[[], Awaitable[Store]]) -> None:
    lease = await store.grant(60)
    await put(store, "/l/a", b"", lease.id)
    await store.close()
    async with closing(await reopen()) as again:
        await again.keep_alive(lease.id)
        assert await again.get("/l/a") is not None
        await again.revoke(lease.id)
        assert await again.get("/l/a") is None
