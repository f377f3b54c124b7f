"""How a target is while memory comes in: its QEMU, its volumes, its ports, its host's memory.

The source asks once a second over the link, in its brownout alone. What is slow is begun at one question and told at
the next: the answer is at once, and says how long ago all was last well. When everything has come in, the target reads
its volumes once more before it says so: a node that does not reach a disk does not take over its guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from emp.agent.assembly import Assembly
from emp.model.errors import EmpError
from emp.network.base import NetworkDriver
from emp.volumes.base import VolumeProbe

LAST_LOOK_S = 1.0
"""for the volumes to answer in the blackout: the guest stands paused meanwhile"""
AGAIN_S = 0.05
"""before a read that failed is tried again in that time"""


class Health:
    """Of one target. ``probes``: volume -> how it is read from this node."""

    def __init__(self, assembly: Assembly, network: NetworkDriver, probes: Mapping[str, VolumeProbe]) -> None:
        self._assembly = assembly
        self._network = network
        self._probes = probes
        now_s = time.monotonic()
        self._answered_at_s = now_s
        self._read_at_s = dict.fromkeys(probes, now_s)
        """volume -> when its last read that was answered began"""
        self._ports_gone = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    def asked(self) -> dict[str, Any]:
        """Return the answer, and look again meanwhile."""
        now_s = time.monotonic()
        message = {
            "type": "health",
            "qemu_silent_s": now_s - self._answered_at_s,
            "volumes_silent_s": {volume: now_s - at_s for volume, at_s in self._read_at_s.items()},
            "free_memory_bytes": available_memory_bytes(),
            "ports_gone": self._ports_gone,
        }
        self._begin("qemu", self._ask_qemu)
        self._begin("ports", self._look_for_ports)
        self.look_at_volumes()
        return message

    def look_at_volumes(self) -> float:
        """Begin to read each that is not being read; return the time (monotonic) from which on that counts."""
        since_s = time.monotonic()
        for volume in self._probes:
            self._begin(volume, lambda v=volume: self._read(v))  # type: ignore[misc]
        return since_s

    async def unread_volumes(self, since_s: float) -> list[str]:
        """Return those of which no read that began after ``since_s`` is answered within ``LAST_LOOK_S`` from now."""
        pause_s = 0.0  # the first read may have been one from before, or over a connection that had died
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_LOOK_S):
                while not self._closed and (left := self._unread(since_s)):
                    self.look_at_volumes()
                    await asyncio.wait([self._tasks[volume] for volume in left])
                    await asyncio.sleep(pause_s)
                    pause_s = AGAIN_S
        return self._unread(since_s)

    def _unread(self, since_s: float) -> list[str]:
        return [volume for volume, at_s in self._read_at_s.items() if at_s < since_s]

    def _begin(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """One question to each is on its way at a time."""
        if not self._closed and (name not in self._tasks or self._tasks[name].done()):
            self._tasks[name] = asyncio.create_task(work(), name=f"health of {name}")

    async def _ask_qemu(self) -> None:
        try:
            await self._assembly.machine.run_state()
        except EmpError:
            return  # the time since the last answer tells
        self._answered_at_s = time.monotonic()

    async def _look_for_ports(self) -> None:
        with contextlib.suppress(EmpError):
            self._ports_gone = self._assembly.spec.name not in await self._network.leftovers()

    async def _read(self, volume: str) -> None:
        began_s = time.monotonic()
        try:
            await self._probes[volume].read()
        except EmpError:
            return
        self._read_at_s[volume] = began_s

    async def close(self) -> None:
        self._closed = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for probe in self._probes.values():
            await probe.close()


def available_memory_bytes() -> int | None:
    """Return what the host's kernel would still give without swapping (proc(5), MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None
