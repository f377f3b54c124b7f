"""The controller's store in memory: what a committed transaction wrote survives every controller.

The contract is ``emp.store.base``'s, as far as the controller uses it: no leases, history for as long as the run lasts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from emp.model.errors import OutcomeUnknown, StoreUnavailable
from emp.store.base import Compare, Delete, Get, KeyValue, Op, Put, Range, TxnResult, Watch
from emp.store.rules import bounds, check_key, check_txn, holds
from tests.simulation.loop import VirtualLoop, here


class StoreDisk:
    """What outlives the controller. ``failing``: ``refuse`` (nothing is written) or ``unknown`` (it may be)."""

    def __init__(self) -> None:
        self.kvs: dict[str, KeyValue] = {}
        self.revision = 0
        self.failing: str | None = None


class SimStore:
    def __init__(self, disk: StoreDisk) -> None:
        self._disk = disk

    async def _latency(self) -> None:
        here()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        await asyncio.sleep(loop.rng.uniform(0.0005, 0.003))
        here()

    async def get(self, key: str) -> KeyValue | None:
        check_key(key)
        await self._latency()
        return self._disk.kvs.get(key)

    async def range(self, prefix: str, *, limit: int | None = None, after: str | None = None) -> Range:
        low, high = bounds(prefix)
        await self._latency()
        found = [self._disk.kvs[key] for key in sorted(self._disk.kvs) if low <= key < high and key > (after or "")]
        cut = found if limit is None else found[:limit]
        return Range(tuple(cut), self._disk.revision, more=len(found) > len(cut))

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        check_txn(compares, then, otherwise)
        await self._latency()
        disk = self._disk
        if disk.failing == "refuse":
            raise StoreUnavailable("no space left for the store", hint="free some")
        if disk.failing == "unknown":
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            if loop.rng.random() < 0.5:
                self._apply(compares, then, otherwise)
            raise OutcomeUnknown("the store failed while it was committing")
        return self._apply(compares, then, otherwise)

    def _apply(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op]) -> TxnResult:
        disk = self._disk
        succeeded = all(holds(compare, disk.kvs.get(compare.key)) for compare in compares)
        revision, changed = disk.revision + 1, False
        found: list[KeyValue | None] = []
        for op in then if succeeded else otherwise:
            old = disk.kvs.get(op.key)
            match op:
                case Get():
                    found.append(old)
                case Put(key, value, lease):
                    created, version = (old.create_revision, old.version) if old else (revision, 0)
                    disk.kvs[key] = KeyValue(key, value, created, revision, version + 1, lease)
                    changed = True
                case Delete(key):
                    changed = disk.kvs.pop(key, None) is not None or changed
        if changed:
            disk.revision = revision
        return TxnResult(succeeded, disk.revision, tuple(found))

    def watch(self, prefix: str, from_revision: int) -> Watch:
        raise NotImplementedError("nobody follows the store's history in the simulation")

    async def compact(self, revision: int) -> None:
        await self._latency()

    async def close(self) -> None:
        pass
