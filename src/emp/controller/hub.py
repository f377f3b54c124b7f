"""Live snapshots of migrations for whoever looks on: the newest for one who asks, every stage for one who follows.

A follower that is slow gets the newest snapshot of each stage, never an ever longer queue.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from emp.model.migration import Migration, Stage


@dataclass(frozen=True)
class Snapshot:
    """``revision`` is the store's at the last change of the record that this snapshot goes with."""

    migration: Migration
    revision: int


class Follower(AsyncIterator[Snapshot]):
    """Snapshots since it was made; ends after the one that is closed."""

    def __init__(self) -> None:
        self._waiting: deque[Snapshot] = deque()
        self._more = asyncio.Event()
        self._over = False

    def take(self, snapshot: Snapshot) -> None:
        if self._waiting and self._waiting[-1].revision == snapshot.revision:
            self._waiting.pop()
        self._waiting.append(snapshot)
        self._more.set()

    async def __anext__(self) -> Snapshot:
        if self._over:
            raise StopAsyncIteration
        await self._more.wait()
        snapshot = self._waiting.popleft()
        if not self._waiting:
            self._more.clear()
        self._over = snapshot.migration.stage is Stage.CLOSED
        return snapshot


class Hub:
    def __init__(self) -> None:
        self._newest: dict[str, Snapshot] = {}
        self._followers: dict[str, set[Follower]] = {}

    def show(self, migration: Migration, revision: int) -> None:
        snapshot = Snapshot(migration, revision)
        if migration.stage is Stage.CLOSED:
            self._newest.pop(migration.id, None)  # the record says it all
        else:
            self._newest[migration.id] = snapshot
        for follower in self._followers.get(migration.id, ()):
            follower.take(snapshot)

    def newest(self, migration: str) -> Snapshot | None:
        """Return the live snapshot of a migration that is open."""
        return self._newest.get(migration)

    @contextmanager
    def follow(self, migration: str) -> Iterator[Follower]:
        """Collect snapshots from this moment on."""
        follower = Follower()
        followers = self._followers.setdefault(migration, set())
        followers.add(follower)
        try:
            yield follower
        finally:
            followers.discard(follower)
            if not followers:
                self._followers.pop(migration, None)
