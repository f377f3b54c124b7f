"""Where a connection enters the app: puts the verified peer into the scope, bounds bodies, ends streams at shutdown.

Plain ASGI round the whole app, one instance per connection, so that nothing inside can run without it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emp.model.errors import EmpError, OutcomeUnknown
from emp.wire.faults import LOGGED, error_response
from emp.wire.guard import PEER
from emp.wire.identity import Identity

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20  # orders are a few KiB; this only keeps a stranger from filling the memory


class Edge:
    """The app as one connection meets it. ``refused`` answers every request in the app's stead.

    ``closing`` is set when the server stops; ``wake`` makes a pending ``receive()`` of this connection return.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        peer: Identity | None,
        refused: EmpError | None,
        closing: asyncio.Event,
        wake: Callable[[], None],
    ) -> None:
        self.app = app
        self.peer = peer
        self.refused = refused
        self.closing = closing
        self.wake = wake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[PEER] = self.peer
        if self.refused is not None:
            await error_response(self.refused)(scope, receive, send)
        else:
            await _Exchange(self, receive, send).run(scope)


class _Exchange:
    """One request and its answer."""

    def __init__(self, edge: Edge, receive: Receive, send: Send) -> None:
        self._edge = edge
        self._receive = receive
        self._send = send
        self._body_bytes = 0
        self._started = False
        self._complete = False
        self._is_stream = False

    async def run(self, scope: Scope) -> None:
        try:
            await self._edge.app(scope, self.receive, self.send)
        except asyncio.CancelledError:
            if not self._edge.closing.is_set():
                raise
            log.warning("%s %s was cut by the shutdown", scope["method"], scope["path"])
            if not self._started:
                unknown = OutcomeUnknown("the daemon stopped while it did this", hint="read the state, then decide")
                await error_response(unknown)(scope, self.receive, self._send)
        except Exception:
            if not scope.get(LOGGED):
                raise
        if self._is_stream and not self._complete and self._edge.closing.is_set():
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive(self) -> Message:
        if self._must_end:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._body_bytes += len(message.get("body", b""))
        if self._body_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
        return {"type": "http.disconnect"} if self._must_end else message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            self._is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            if self._must_end:
                self._edge.wake()
        elif message["type"] == "http.response.body":
            self._complete = not message.get("more_body", False)
        await self._send(message)

    @property
    def _must_end(self) -> bool:
        return self._is_stream and self._edge.closing.is_set()
