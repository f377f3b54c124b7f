"""A watch is a cursor on the history.

Every event is read from the database, old ones and those of this moment alike: there is no hand-over from replay to
live that could lose one, no queue that a slow reader could fill, and a cancelled read is simply read again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from types import TracebackType
from typing import Self

from emp.store.base import Event, StoreClosed
from emp.store.rules import bounds, check_revision
from emp.store.sqlite_tables import Page


class SqliteWatch:
    """``read(low, high, after)`` returns a page of history; the store calls ``on_commit`` for each revision."""

    def __init__(self, prefix: str, from_revision: int, read: Callable[[str, str, int], Awaitable[Page]]) -> None:
        self._low, self._high = bounds(prefix)
        self._read = read
        self._ready: deque[Event] = deque()
        self._position = check_revision(from_revision)  # every event up to here is delivered or in _ready
        self._newest = self._matching = 0  # newest revision heard of, and newest that touched the selection
        self._behind = asyncio.Event()  # there may be events beyond the position
        self._behind.set()
        self._closed = False

    def on_commit(self, revision: int, keys: Collection[str]) -> None:
        self._newest = revision
        if any(self._low <= key < self._high for key in keys):
            self._matching = revision
            self._behind.set()
        elif not self._behind.is_set():
            self._position = revision  # keeps an idle watch ahead of any compaction

    async def __anext__(self) -> Event:
        while not self._ready and not self._closed:
            await self._behind.wait()
            if not self._closed:
                await self._fill()
        if self._closed:
            raise StopAsyncIteration
        return self._ready.popleft()

    async def _fill(self) -> None:
        try:
            page = await self._read(self._low, self._high, self._position)
        except StoreClosed:
            self.end()
            return
        self._ready.extend(page.events)
        self._position = page.upto
        if not page.more and self._matching <= page.upto and not self._closed:
            self._position = max(page.upto, self._newest)
            self._behind.clear()

    def end(self) -> None:
        """End the iteration, also for a reader that is waiting now."""
        self._closed = True
        self._behind.set()

    def __aiter__(self) -> Self:
        return self

    async def aclose(self) -> None:
        self.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
