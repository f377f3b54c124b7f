"""Named background tasks that are never lost: a failure is logged, and closing waits for each to end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from emp.model.errors import EmpError

log = logging.getLogger(__name__)

T = TypeVar("T")


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at once and return their results in order; the first failure ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


class Tasks:
    """At most one running task per key."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._tasks: dict[str, asyncio.Task[Any]] = {}

    def has(self, key: str) -> bool:
        return key in self._tasks

    def get(self, key: str) -> asyncio.Task[Any] | None:
        return self._tasks.get(key)

    def start(self, key: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run ``work``. The caller has seen that nothing runs under ``key``."""
        assert key not in self._tasks, f"{self._kind} {key} runs already"
        task = asyncio.create_task(work, name=f"{self._kind} {key}")
        self._tasks[key] = task
        task.add_done_callback(lambda done: self._ended(key, done))
        return task

    def _ended(self, key: str, task: asyncio.Task[Any]) -> None:
        if self._tasks.get(key) is task:
            del self._tasks[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            foreseen = isinstance(error, EmpError)
            log.error("%s of %s failed: %s", self._kind, key, error, exc_info=None if foreseen else error)

    async def cancel(self, key: str) -> None:
        """End the task under ``key``, if there is one, and wait for it."""
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
