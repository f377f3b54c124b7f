"""What the faces of the simulated cloud have in common: harm and limits that requests meet, work that is due."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from emp.lab.cloud.knobs import Bucket, Fault, Faults, Harm, Knobs

log = logging.getLogger(__name__)

LAST_CALLS = 10_000
TICK_S = 0.5
"""how long a change that is due may wait where the clock is not the machine's"""


class Toll:
    """The faults that are left of the knobs, and the token bucket of each action."""

    def __init__(self, knobs: Knobs, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.turn(knobs)

    def turn(self, knobs: Knobs) -> None:
        """Begin anew: with full buckets, and all the faults of ``knobs``."""
        self._limits = knobs.limits
        self._faults = Faults(knobs.faults)
        self._buckets: dict[str, Bucket] = {}

    def fault(self, action: str) -> Fault | None:
        """Return what comes to this request, and count it."""
        return self._faults.take(action)

    def is_throttled(self, action: str, fault: Fault | None) -> bool:
        """Whether the request is turned away; if not, it has taken a token."""
        return (fault is not None and fault.harm is Harm.THROTTLED) or not self._has_token(action)

    def _has_token(self, action: str) -> bool:
        """EFS publishes no sizes of its buckets; those of EC2 stand for them (``docs/cloud.md``)."""
        limits = self._limits
        if limits is None:
            return True
        if action not in self._buckets:
            size, per_s = (
                (limits.describe_bucket, limits.describe_per_s)
                if action.startswith("Describe")
                else (limits.change_bucket, limits.change_per_s)
            )
            self._buckets[action] = Bucket(size, per_s, self._clock)
        return self._buckets[action].take()


class Chores:
    """What the data plane has to do: begun when it is due, beside the requests.

    ``settle`` returns what is due now; none of it raises, and what failed becomes due again. ``keep`` puts on disk what
    came of each, or raises ``OSError``: a later process then asks the data plane again, which has it done already.
    """

    def __init__(
        self,
        settle: Callable[[], Iterable[Coroutine[Any, Any, None]]],
        due_s: Callable[[], float | None],
        clock: Callable[[], float],
        keep: Callable[[], None],
    ) -> None:
        self._settle = settle
        self._due_s = due_s
        self._clock = clock
        self._keep = keep
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Carry out what becomes due by itself."""
        ticking = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            for task in (ticking, *self._tasks):
                task.cancel()
            await asyncio.gather(ticking, *self._tasks, return_exceptions=True)

    def look(self) -> None:
        """Something has changed: see soon what is due."""
        self._news.set()

    async def begin(self) -> None:
        """Begin what is due. A data plane that has nothing to wait for is done when this returns."""
        begun = {asyncio.create_task(self._do(work)) for work in self._settle()}
        for task in begun:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if begun:
            await asyncio.wait(begun, timeout=0)

    async def _do(self, work: Coroutine[Any, Any, None]) -> None:
        await work
        try:
            self._keep()
        except OSError as error:
            log.error("what the cloud remembers is not on disk: %s", error)
        self.look()

    async def _tick(self) -> None:
        while True:
            self._news.clear()
            await self.begin()
            due_s = self._due_s()
            wait_s = None if due_s is None else min(TICK_S, max(0.0, due_s - self._clock()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._news.wait()


def answered(response: Response, fault: Fault | None) -> Response:
    """Return what the caller gets of an answer."""
    match fault:
        case Fault(harm=Harm.LOST_REPLY):
            return Lost()
        case Fault(harm=Harm.SILENT):
            return Silent()
    return response


class Lost(Response):
    """Begins and never ends: the server closes the connection, and the caller cannot know what came of its order."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Without a length it is sent in chunks, of which the last never comes: nobody takes that for an empty answer.
        headers = [(b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


class Silent(Response):
    """No answer at all, until the caller hangs up."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
