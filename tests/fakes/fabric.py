"""What lies beneath fake QEMUs: which node reaches which, how fast, the volumes, and who watches over the guests.

The defaults are a quiet machine room in real time; the simulation overrides what it wants to disturb.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import random
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from emp.hypervisor.base import BlockDevice

if TYPE_CHECKING:
    from tests.fakes.qemu import FakeQemu

LOOK_S = 0.05
"""how often something that is blocked looks whether it still is"""


class Fabric:
    """One pool's ground. Its tasks belong to nobody: they outlive the daemon that asked for them."""

    bandwidth_bytes_per_s = 1.25e9

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.listeners: dict[int, FakeQemu] = {}
        self.qemus: list[FakeQemu] = []
        self._pids = itertools.count(1000)
        self._ports = itertools.count(20000)
        self._tasks: set[asyncio.Task[None]] = set()

    # -- what a simulation overrides

    def now(self) -> float:
        """Monotonic, in seconds."""
        return asyncio.get_running_loop().time()

    def wall_clock(self, node: str) -> float:
        return time.time()

    def reaches(self, one: str, other: str) -> bool:
        """Whether frames pass in both directions."""
        return True

    def rate(self, one: str, other: str) -> float:
        """bytes/s that a stream between the two gets"""
        return self.bandwidth_bytes_per_s

    def opens(self, node: str, device: BlockDevice) -> bool:
        """Whether a QEMU of ``node`` gets it open; a relay may hold what is written there yet."""
        return self.served(node, device)

    def served(self, node: str, device: BlockDevice) -> bool:
        """Whether I/O of a machine on ``node`` goes through."""
        return True

    async def moment(self, what: str, node: str) -> str | None:
        """Something of note is about to happen on behalf of ``node``: a place for faults. ``lose``: its answer."""
        return None

    def watch_run(self, qemu: FakeQemu) -> None:
        """Its vCPUs begin to execute."""

    def watch_advance(self, qemu: FakeQemu) -> None:
        """Its guest has been executing until now."""

    def watch_write(self, qemu: FakeQemu, volume: str) -> None:
        """Its guest has written to ``volume`` and the write was acknowledged."""

    def watch_stream(self, qemu: FakeQemu) -> None:
        """Its stream's status has changed."""

    def watch_clock(self, qemu: FakeQemu) -> None:
        """Its guest's clock is to be measured and set."""

    # -- tools

    def next_pid(self) -> int:
        return next(self._pids)

    def listen(self, qemu: FakeQemu) -> int:
        port = next(self._ports)
        self.listeners[port] = qemu
        return port

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def later(self, delay_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(delay_s, call, context=contextvars.Context())

    async def breath(self, least_s: float = 0.0001, most_s: float = 0.001) -> None:
        await asyncio.sleep(self.rng.uniform(least_s, most_s))

    async def look(self) -> None:
        """Between two looks at something that is blocked; nothing tells when it no longer is."""
        await asyncio.sleep(LOOK_S)

    async def lag(self) -> None:
        """Between a stream's status and the run state that follows from it."""

    async def close(self) -> None:
        for qemu in self.qemus:
            qemu.die()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
