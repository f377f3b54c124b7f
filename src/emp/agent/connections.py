"""What the nodes' connection tracking knows of an EVM's connections goes with it.

Our own rules look at no state. A user's may: a node that lets in what belongs to an established connection, and nothing
new, would drop the packets of every connection that began on another node. So the source tells the target of them while
the EVM runs, and of what has changed once it has stopped; they are known there before the guest is. On nodes without
such rules the kernel tracks nothing, and this does nothing (docs/design/0017).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from emp.agent.addresses import Addresses
from emp.host import conntrack
from emp.host.conntrack import Connection
from emp.model.errors import EmpError

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""between two looks while the EVM runs here"""
_AT_ONCE = 200
"""connections in a message"""

Send = Callable[[dict[str, Any]], Awaitable[None]]


class Teller:
    """The source: tells the target of the EVM's connections. They are read in a thread; a big table takes a while."""

    def __init__(self, addresses: Addresses, send: Send) -> None:
        self._addresses = addresses
        self._send = send
        self._told: dict[bytes, tuple[Connection, float]] = {}
        """and when to tell again, as the target forgets a connection by its time limit"""
        self._lock = asyncio.Lock()

    @property
    def count(self) -> int:
        return len(self._told)

    async def tell(self) -> None:
        """Tell what the target does not know yet. What cannot be read is logged: the guest moves in any case."""
        async with self._lock:
            try:
                found = await asyncio.to_thread(conntrack.read, self._addresses.usable)
            except (EmpError, OSError) as error:
                log.warning("connection tracking cannot be read, and does not move: %s", error)
                return
            now_s = asyncio.get_running_loop().time()
            new = [one for one in found if not self._is_known(one, now_s)]
            for at in range(0, len(new), _AT_ONCE):
                tracked = [base64.b64encode(one.wire).decode() for one in new[at : at + _AT_ONCE]]
                await self._send({"type": "tracked", "connections": tracked})
            still = {one.original: self._told[one.original] for one in found if one.original in self._told}
            self._told = still | {one.original: (one, now_s + one.timeout_s / 3) for one in new}

    def _is_known(self, found: Connection, now_s: float) -> bool:
        told, again_s = self._told.get(found.original, (None, 0.0))
        return told is not None and told.state == found.state and now_s < again_s

    async def keep_telling(self) -> None:
        """Until cancelled."""
        while True:
            await self.tell()
            await asyncio.sleep(LOOK_S)

    def again(self) -> None:
        """What was told may have been lost with its link."""
        self._told.clear()

    async def forget(self) -> None:
        """The EVM is elsewhere: an address of it that another EVM gets here has none of its connections."""
        await _forget([told for told, _ in self._told.values()])


class Taker:
    """The target: makes the EVM's connections known to the kernel here, those that are the EVM's and no others."""

    def __init__(self, addresses: Addresses) -> None:
        self._addresses = addresses
        self._taken: dict[bytes, Connection] = {}

    async def take(self, tracked: Sequence[object]) -> None:
        """Take one message's ``connections``; what makes no sense is left out."""
        addresses = self._addresses.usable
        parsed = [conntrack.parse(_decoded(one), addresses) for one in tracked]
        connections = [one for one in parsed if one is not None]
        self._taken |= {one.original: one for one in connections}
        try:
            taken = await asyncio.to_thread(conntrack.add, connections)
        except OSError as error:
            log.warning("connection tracking was not taken over: %s", error)
        else:
            if taken < len(tracked):
                log.info("%d of %d tracked connections were taken over", taken, len(tracked))

    async def forget(self) -> None:
        """The EVM stays where it was."""
        await _forget(list(self._taken.values()))


async def _forget(connections: Sequence[Connection]) -> None:
    if connections:
        try:
            await asyncio.to_thread(conntrack.remove, connections)
        except OSError as error:
            log.warning("connections of an EVM that is elsewhere are still tracked here: %s", error)


def _decoded(said: object) -> bytes:
    try:
        return base64.b64decode(said, validate=True) if isinstance(said, str) else b""
    except binascii.Error:
        return b""
