"""When leases run out: deadlines on the event loop's monotonic clock, kept in memory.

A keep-alive therefore costs no write and does not wait for a slow disk. After a restart, and after the loop itself
stood still (a stopped process, a suspended machine), every lease starts anew with its full TTL: nobody could have
reached the store to keep it alive.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

from emp.model.errors import OutcomeUnknown, StoreUnavailable
from emp.store.base import Lease, LeaseGone

_STALL_S = 1.0
_RETRY_S = 1.0


class Leases:
    """``expire(lease_id)`` removes a lease and its keys; it is tried again while the store is unavailable."""

    def __init__(self, leases: Iterable[Lease], expire: Callable[[int], Awaitable[None]]) -> None:
        self._expire = expire
        self._ttl_s: dict[int, float] = {}
        self._deadline: dict[int, float] = {}
        self._added = asyncio.Event()
        for lease in leases:
            self.add(lease)

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._deadline

    def add(self, lease: Lease) -> None:
        self._ttl_s[lease.id] = lease.ttl_s
        self.renew(lease.id)
        self._added.set()

    def renew(self, lease_id: int) -> None:
        self._deadline[lease_id] = asyncio.get_running_loop().time() + self._ttl_s[lease_id]

    def remove(self, lease_id: int) -> None:
        self._ttl_s.pop(lease_id, None)
        self._deadline.pop(lease_id, None)

    async def run(self) -> None:
        """Expire leases as they fall due, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            planned = max(min(self._deadline.values(), default=math.inf), loop.time())
            self._added.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(planned if planned < math.inf else None):
                    await self._added.wait()
            now = loop.time()
            if now - planned > _STALL_S:
                for lease_id in self._deadline:
                    self.renew(lease_id)
                continue
            for lease_id in [lease_id for lease_id, deadline in self._deadline.items() if deadline <= now]:
                self.remove(lease_id)
                await self._expire_for_certain(lease_id)

    async def _expire_for_certain(self, lease_id: int) -> None:
        while True:
            try:
                with suppress(LeaseGone):
                    await self._expire(lease_id)
                return
            except (StoreUnavailable, OutcomeUnknown):
                await asyncio.sleep(_RETRY_S)
