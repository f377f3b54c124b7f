"""What the node tells the controller: once a second, and at once when an EVM of the node changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from emp.agent.signal import Signal
from emp.model.errors import EmpError
from emp.model.node import NodeReport
from emp.model.orders import HeartbeatReply
from emp.wire.http import WireClient

log = logging.getLogger(__name__)

_FIRST_S = 0.2


class Heartbeat:
    """The controller may be away for as long as it likes: the node goes on, and tells again."""

    def __init__(
        self,
        client: WireClient,
        node: str,
        report: Callable[[], NodeReport],
        changed: Signal,
        on_reply: Callable[[HeartbeatReply], None],
    ) -> None:
        self._client = client
        self._path = f"/v1/agents/{node}/heartbeat"
        self._report = report
        self._changed = changed
        self._on_reply = on_reply

    async def run(self) -> None:
        """Beat for ever."""
        interval_s, silent = _FIRST_S, False
        while True:
            seen = self._changed.version
            try:
                reply = await self._client.request(
                    "POST", self._path, self._report(), response_model=HeartbeatReply, idempotent=True
                )
            except EmpError as error:
                if not silent:
                    log.warning("the controller does not hear this node: %s", error)
                silent, interval_s = True, _FIRST_S
            else:
                if silent:
                    log.info("the controller hears this node again")
                silent, interval_s = False, reply.interval_s
                self._on_reply(reply)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._changed.beyond(seen)
