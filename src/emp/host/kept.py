"""Keeps one process running: adopts or starts it, watches it, and starts it again when it ends by itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from emp.host.processes import Process
from emp.model.errors import HostError

log = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 2.0
_STABLE_S = 10.0


class Kept:
    """``adopt_or_start`` returns the running process, or raises ``HostError``; it is asked again after a pause."""

    def __init__(self, name: str, adopt_or_start: Callable[[], Awaitable[Process]]) -> None:
        self.restarts = 0
        self._name = name
        self._adopt_or_start = adopt_or_start
        self._process: Process | None = None
        self._turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeper: asyncio.Task[None] | None = None
        self._failure: HostError | None = None

    async def open(self) -> None:
        """Return when the process runs. Raise ``HostError`` when it does not come to that; it goes on trying."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=self._name)
        while self._process is None or not self._process.alive:
            await asyncio.shield(self._turn)
            if self._failure is not None:
                raise self._failure

    async def let_go(self) -> None:
        """Watch it no longer; it is not ended."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
            self._keeper = None

    async def _keep(self) -> None:
        delay_s = _FIRST_DELAY_S
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            try:
                self._process, self._failure = await self._adopt_or_start(), None
                self._next_turn()
                await self._process.ended()
                log.warning("%s has ended by itself; it is started again", self._name)
                self.restarts += 1
            except HostError as error:
                log.error("%s does not start: %s", self._name, error)
                self._failure = error
                self._next_turn()
            delay_s = _FIRST_DELAY_S if loop.time() - began_s > _STABLE_S else min(2 * delay_s, _LONGEST_DELAY_S)
            await asyncio.sleep(delay_s)

    def _next_turn(self) -> None:
        turn, self._turn = self._turn, asyncio.get_running_loop().create_future()
        turn.set_result(None)
