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


async def received(ask: Ask, nic: int, *, sizes: bool) -> Received:
    """Return what the receive queue's used ring says: see ``Machine.received``."""
    path = f"/machine/peripheral/nic{nic}/virtio-backend"
    queue = await ask("x-query-virtio-queue-status", {"path": path, "queue": _RECEIVE_QUEUE})
    size, used = queue["vring-num"], queue["vring-used"]
    if not sizes or not used:  # without a ring the guest's driver has not come so far
        return Received(queue["used-idx"])
    shown = await ask("human-monitor-command", {"command-line": f"xp /{1 + 2 * size}wx {used:#x}"})
    words = [int(word, 16) for word in _WORD.findall(shown)]  # flags and index, then (descriptor, length) of each entry
    newest = words[0] >> 16
    return Received(newest, tuple(words[2 + 2 * (number % size)] for number in range(newest - size, newest)))
