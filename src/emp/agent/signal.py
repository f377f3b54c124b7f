"""Tells any number of waiting tasks that something has changed; a change that nobody waited for is not lost."""

from __future__ import annotations

import asyncio


class Signal:
    """``seen = signal.version``, look at the state, then ``await signal.beyond(seen)``."""

    def __init__(self) -> None:
        self.version = 0
        self._next = asyncio.Event()

    def notify(self) -> None:
        self.version += 1
        woken, self._next = self._next, asyncio.Event()
        woken.set()

    async def beyond(self, version: int) -> None:
        """Return at once if something has changed since ``version``, else with the next change."""
        if self.version == version:
            await self._next.wait()
