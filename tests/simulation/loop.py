"""Virtual time, and processes that can be killed, in one event loop.

Time jumps to the next timer when nothing is ready. What a thread would do is done in the loop, some random moments
later. Nothing depends on the order of a set: tasks and futures hash by the order in which they were made.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any

from tests.simulation.errors import Stuck

EPOCH_S = 1_800_000_000.0
"""the wall clock at virtual time 0"""

MOST_TURNS = 40_000
"""of the loop in one run, of which an ordinary one takes two or three thousand"""

current: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Process:
    """A daemon as the kernel sees it: its tasks, and whether it still exists."""

    def __init__(self, name: str, host: str) -> None:
        self.name = name
        self.host = host
        self.alive = True
        self.tasks: dict[SimTask, None] = {}
        self.on_death: list[Callable[[], None]] = []

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        context = contextvars.copy_context()
        context.run(current.set, self)
        return asyncio.get_running_loop().create_task(work, name=name, context=context)

    def call(self, function: Callable[[], Any]) -> Any:
        """Do something synchronous as this process."""
        context = contextvars.copy_context()
        context.run(current.set, self)
        return context.run(function)

    def kill(self) -> None:
        """SIGKILL: whatever its tasks do from now on reaches nobody (``here``)."""
        if self.alive:
            self.alive = False
            for call in self.on_death:
                call()
            for task in tuple(self.tasks):
                task.cancel()


def here() -> Process | None:
    """Return the process whose code runs now; code of one that was killed goes no further."""
    process = current.get()
    if process is not None and not process.alive:
        raise asyncio.CancelledError
    return process


class SimTask(asyncio.Task):  # type: ignore[type-arg]  # generic in stubs alone
    def __init__(self, *args: Any, number: int, **kwargs: Any) -> None:
        self._number = number
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimFuture(asyncio.Future):  # type: ignore[type-arg]  # generic in stubs alone
    def __init__(self, *, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self._number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class _Jump(selectors.BaseSelector):
    """Waits for nothing: moves the clock instead."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Stuck("everybody waits for ever")
        if timeout > 0:
            self._loop.pass_time(timeout)
        return []

    def register(self, *_: Any) -> Any:
        raise NotImplementedError("there are no sockets here")

    def unregister(self, *_: Any) -> Any:
        raise NotImplementedError("there are no sockets here")

    def get_map(self) -> Any:
        return {}


class VirtualLoop(asyncio.BaseEventLoop):
    def __init__(self, rng: random.Random, *, limit_s: float) -> None:
        super().__init__()
        self.now = 0.0
        self.rng = rng
        self.fatal: BaseException | None = None
        """ends the run at once, in whichever task or callback it was met"""
        self.turns = 0
        self._limit_s = limit_s
        self._numbers = itertools.count(1)
        self._selector = _Jump(self)
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        super()._run_once()  # type: ignore[misc]  # not in the stubs
        self.turns += 1
        if self.turns > MOST_TURNS:
            self.fatal = self.fatal or Stuck(f"somebody spins: {MOST_TURNS} turns of the loop are too many")
        if self.fatal is not None:
            raise self.fatal

    def pass_time(self, by_s: float) -> None:
        self.now += by_s
        if self.now > self._limit_s:
            raise Stuck(f"not over after {self._limit_s:g} virtual seconds")

    def create_future(self) -> asyncio.Future[Any]:
        return SimFuture(number=next(self._numbers), loop=self)

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, work: Any, context: contextvars.Context | None = None
    ) -> SimTask:
        task = SimTask(work, number=next(self._numbers), loop=loop, context=context)
        process = context.get(current) if context is not None else current.get()
        if process is not None:
            process.tasks[task] = None
            task.add_done_callback(lambda done: process.tasks.pop(done, None))
            if not process.alive:
                task.cancel()
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Do it here, a moment later: a disk's latency. A process that dies before that does nothing."""
        future = self.create_future()
        process = here()

        def work() -> None:
            if process is not None and not process.alive:
                return
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 - it is the caller's, as with a thread
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self.call_later(self.rng.uniform(0.0005, 0.004), work)
        return future

    async def create_unix_connection(self, *_: Any, **__: Any) -> Any:
        raise FileNotFoundError("no console here")

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass
