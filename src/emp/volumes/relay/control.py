"""Orders to a relay: one JSON object a line, each answered by one, on a unix socket that only its user can open.

``{"order": "hold", "within_s": 3}`` is answered by ``{"status": {...}}``, or by ``{"error": {...}}`` as
``EmpError.as_dict`` has it. An order is carried out to its end even if whoever gave it does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from typing import Any

from emp.model.errors import BadInput, EmpError
from emp.volumes.relay.config import parse_upstream
from emp.volumes.relay.relay import Relay


class Control:
    """Carries out orders. ``end``: called when the relay shall end. ``port``: where it listens, if that is a port."""

    def __init__(self, relay: Relay, *, end: Callable[[], None], port: int | None) -> None:
        self._relay = relay
        self._end = end
        self._port = port

    async def hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        try:
            with contextlib.suppress(OSError, ValueError):  # whoever it was is gone, or said too much at once
                while line := await reader.readline():
                    writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                    await writer.drain()
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            await self._obey(line)
        except EmpError as error:
            return {"error": error.as_dict()}
        return {"status": self._relay.status() | {"port": self._port}}

    async def _obey(self, line: bytes) -> None:
        relay = self._relay
        try:
            said = json.loads(line)
            match said.pop("order"):
                case "status":
                    return
                case "reach":
                    await relay.reach(float(said["within_s"]))
                case "open":
                    await relay.open()
                case "hold":
                    await relay.hold(float(said["within_s"]))
                case "switch":
                    if (upstream := parse_upstream(said["upstream"])) is None:
                        raise BadInput("it says no volume", field="upstream")
                    await relay.switch(upstream)
                case "end":
                    self._end()
                case other:
                    raise BadInput(f"there is no order {other!r}", field="order")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(f"{line[:200]!r} is no order: {error!r}", field="order") from error
