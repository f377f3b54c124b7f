"""The default store: one SQLite file, no set-up, one controller.

All SQL runs on one thread in the order of the calls; that is what makes transactions isolated and reads see every
acknowledged write. A call that is cancelled while it waits for its turn is not begun; once begun it is finished.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, TypeVarTuple
from weakref import WeakSet

from emp.store.base import Compare, KeyValue, Lease, Op, Range, StoreClosed, TxnResult
from emp.store.leases import Leases
from emp.store.rules import bounds, check_key, check_limit, check_revision, check_ttl, check_txn
from emp.store.sqlite_tables import Tables, lease_gone
from emp.store.sqlite_watch import SqliteWatch

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class SqliteStore:
    """A ``Store``; made by ``open``, usable in ``async with``. Belongs to the event loop in which it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._watches: WeakSet[SqliteWatch] = WeakSet()
        self._closing: asyncio.Task[None] | None = None
        self._tables: Tables
        self._leases: Leases
        self._reaper: asyncio.Task[None]

    @classmethod
    async def open(cls, path: Path | str) -> Self:
        """Open the database, creating it and its directory where they are missing.

        Raises ``StoreLocked``, ``StoreMismatch``, ``StoreCorrupt`` or ``StoreUnavailable``.
        """
        store = cls(Path(path))
        opening = store._thread.submit(Tables, store.path, store._on_commit)
        try:
            store._tables = await asyncio.shield(asyncio.wrap_future(opening))
            store._leases = Leases(await store._run(store._tables.leases), store._expire)
        except BaseException:
            store._thread.submit(lambda: opening.result().close())  # a cancelled caller leaves no file open
            store._thread.shutdown(wait=False)
            raise
        store._reaper = asyncio.create_task(store._leases.run(), name="store leases")
        return store

    async def get(self, key: str) -> KeyValue | None:
        return await self._run(self._tables.get, check_key(key))

    async def range(self, prefix: str, *, limit: int | None = None, after: str | None = None) -> Range:
        low, high = bounds(prefix)
        beyond = "" if after is None else check_key(after, field="after")
        return await self._run(self._tables.range, low, high, check_limit(limit), beyond)

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        check_txn(compares, then, otherwise)
        return await self._run(self._tables.txn, tuple(compares), tuple(then), tuple(otherwise))

    def watch(self, prefix: str, from_revision: int) -> SqliteWatch:
        self._check_open()
        watch = SqliteWatch(prefix, from_revision, lambda *page: self._run(self._tables.events, *page))
        self._watches.add(watch)
        return watch

    async def grant(self, ttl_s: float) -> Lease:
        return await self._run(self._grant, check_ttl(ttl_s))

    def _grant(self, ttl_s: float) -> Lease:
        lease = self._tables.grant(ttl_s)
        self._loop.call_soon_threadsafe(self._leases.add, lease)  # also when the caller is gone by now
        return lease

    async def keep_alive(self, lease_id: int) -> None:
        self._check_open()
        if lease_id not in self._leases:
            raise lease_gone(lease_id)
        self._leases.renew(lease_id)

    async def revoke(self, lease_id: int) -> None:
        self._check_open()
        if lease_id not in self._leases:
            raise lease_gone(lease_id)
        await self._expire(lease_id)

    async def _expire(self, lease_id: int) -> None:
        await self._run(self._revoke, lease_id)

    def _revoke(self, lease_id: int) -> None:
        self._tables.revoke(lease_id)
        self._loop.call_soon_threadsafe(self._leases.remove, lease_id)

    async def compact(self, revision: int) -> None:
        await self._run(self._tables.begin_compaction, check_revision(revision))
        while await self._run(self._tables.compact_some):
            pass

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="store close")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for watch in self._watches:
            watch.end()
        self._reaper.cancel()
        await asyncio.wait([self._reaper])
        try:
            await self._loop.run_in_executor(self._thread, self._tables.close)
        finally:
            self._thread.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise StoreClosed(f"the store {self.path} is closed")

    async def _run(self, function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
        self._check_open()
        return await self._loop.run_in_executor(self._thread, function, *args)

    def _on_commit(self, revision: int, keys: Collection[str]) -> None:
        self._loop.call_soon_threadsafe(self._tell_watches, revision, keys)

    def _tell_watches(self, revision: int, keys: Collection[str]) -> None:
        for watch in self._watches:
            watch.on_commit(revision, keys)
