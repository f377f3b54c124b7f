"""What a NIC has given its guest last, read off the ring in the guest's memory (virtio 1.2, 2.7.8)."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

from emp.hypervisor.base import Received

_RECEIVE_QUEUE = 0
_WORD = re.compile(r"0x[0-9a-f]{8}\b")


class Ask(Protocol):
    def __call__(self, command: str, arguments: Mapping[str, Any]) -> Awaitable[Any]: ...


class ReceiveRing:
    """The receive queue's used ring of one NIC; see ``Machine.received``."""

    def __init__(self, ask: Ask, nic: int) -> None:
        self._ask = ask
        self._path = f"/machine/peripheral/nic{nic}/virtio-backend"
        self._size = self._used = 0
        """entries, and where it is; 0: the guest's driver has not come so far"""

    async def count(self) -> int:
        """Return how many buffers have been used; this finds the ring."""
        found = await self._ask("x-query-virtio-queue-status", {"path": self._path, "queue": _RECEIVE_QUEUE})
        self._size, self._used = found["vring-num"], found["vring-used"]
        return int(found["used-idx"])

    async def read(self) -> Received:
        """Return what the ring says where it was found last."""
        if not self._used:
            return Received()
        command = f"xp /{1 + 2 * self._size}wx {self._used:#x}"
        shown = await self._ask("human-monitor-command", {"command-line": command})
        words = [int(word, 16) for word in _WORD.findall(shown)]  # flags and index, then (descriptor, length) of each
        newest = words[0] >> 16
        sizes = (words[2 + 2 * (number % self._size)] for number in range(newest - self._size, newest))
        return Received(newest, tuple(sizes))
