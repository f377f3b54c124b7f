"""What is done beside everything else: not begun twice, and ended with the agent."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Chores:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do ``work`` beside; what is being done under that name already is not begun twice."""
        if any(task.get_name() == name and not task.done() for task in self._tasks):
            work.close()
        else:
            self.add(work, name)

    def add(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Do ``work`` beside, whatever else is being done."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
