"""What a NIC has given its guest last, read off the ring in the guest's memory (virtio 1.2, 2.7.8)."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

_RECEIVE_QUEUE = 0
_WORD = re.compile(r"0x[0-9a-f]{8}\b")


class Ask(Protocol):
    def __call__(self, command: str, arguments: Mapping[str, Any]) -> Awaitable[Any]: ...


async def received_bytes(ask: Ask, nic: int) -> list[int]:
    """Return the lengths in the receive queue's used ring, oldest first: see ``Machine.received_bytes``."""
    path = f"/machine/peripheral/nic{nic}/virtio-backend"
    queue = await ask("x-query-virtio-queue-status", {"path": path, "queue": _RECEIVE_QUEUE})
    size, used, newest = queue["vring-num"], queue["vring-used"], queue["used-idx"]
    if not used:
        return []  # the guest's driver has not come so far
    shown = await ask("human-monitor-command", {"command-line": f"xp /{1 + 2 * size}wx {used:#x}"})
    words = [int(word, 16) for word in _WORD.findall(shown)]  # flags and index, then (descriptor, length) of each entry
    return [words[2 + 2 * (number % size)] for number in range(newest - size, newest)]
