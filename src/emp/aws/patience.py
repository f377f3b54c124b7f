"""How long to wait for something outside, and how often to look whether it is there."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from emp.model.errors import EmpError


@dataclass(frozen=True)
class Pace:
    """A pause is a share of the time that has been waited already, so one is late by no more than that share."""

    first_s: float
    share: float
    longest_s: float = 5.0
    jitter: float = 0.3
    """a pause is longer or shorter by up to this part of it, so that many do not ask at the same moment"""


class Time:
    """The clock and the pauses of a driver; tests hand in their own. ``clock`` gives seconds that only rise."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        chance: random.Random | None = None,
    ) -> None:
        self.clock = clock
        self.sleep = sleep
        self.chance = chance or random.Random()

    def patience(self, limit_s: float, pace: Pace) -> Patience:
        return Patience(self, limit_s, pace)


class Patience:
    """Waits between the turns of one loop, until ``limit_s`` are over."""

    def __init__(self, times: Time, limit_s: float, pace: Pace) -> None:
        self._times = times
        self._limit_s = limit_s
        self._pace = pace
        self._began_s = times.clock()

    @property
    def spent_s(self) -> float:
        return self._times.clock() - self._began_s

    async def pause(self, failure: EmpError) -> None:
        """Sleep; raise ``failure`` instead when patience is at its end."""
        pace, spent_s = self._pace, self.spent_s
        if spent_s >= self._limit_s:
            raise failure
        pause_s = min(max(pace.first_s, pace.share * spent_s), pace.longest_s)
        await self._times.sleep(pause_s * self._times.chance.uniform(1 - pace.jitter, 1 + pace.jitter))
