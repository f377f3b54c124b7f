"""Runs a FastAPI app on several listeners with different TLS contexts, in the daemon's own event loop.

uvicorn does the HTTP. It is not asked to run itself, because its server takes the process's signals, knows one TLS
context, wakes ten times a second and waits for event streams that never end; and it does not tell who the peer is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from emp.model.errors import BadInput, Unauthenticated
from emp.wire.edge import Edge
from emp.wire.identity import Identity
from emp.wire.sockets import BACKLOG

log = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
FIRST_REQUEST_S = 10.0
KEEP_ALIVE_S = 75  # longer than a client keeps an idle connection, so that it is the client who closes
FLUSH_S = 1.0


@dataclass(frozen=True)
class Listener:
    """A listening socket and how it is secured. Only a unix socket may go without TLS: its file's mode guards it."""

    sock: socket.socket
    tls: ssl.SSLContext | None

    def __post_init__(self) -> None:
        if self.tls is None and self.sock.family != socket.AF_UNIX:
            raise BadInput("a network socket needs TLS", field="tls")

    @property
    def port(self) -> int:
        return int(self.sock.getsockname()[1])


class Server:
    """``async with Server(app, [Listener(...), ...], pool="p"): ...`` serves until the block ends.

    ``start`` runs the app's lifespan; ``stop`` closes the listeners, ends event streams at once, gives other requests
    ``drain_s`` seconds, cuts the rest and leaves no task. Signals stay the daemon's. Routes find the caller with
    ``emp.wire.guard.peer``.
    """

    def __init__(self, app: FastAPI, listeners: Sequence[Listener], *, pool: str, drain_s: float = 5.0) -> None:
        self.app = app
        self.listeners = tuple(listeners)
        self.pool = pool
        self.drain_s = drain_s
        self.closing = asyncio.Event()
        self.state = ServerState()
        self.app_state: dict[str, Any] = {}
        self.config = uvicorn.Config(
            app, http=_Protocol, ws="none", lifespan="off", interface="asgi3", log_config=None, access_log=False,
            proxy_headers=False, server_header=False, date_header=False, timeout_keep_alive=KEEP_ALIVE_S,
        )  # fmt: skip
        self._servers: list[asyncio.Server] = []
        self._lifespan = contextlib.AsyncExitStack()
        self._idle = asyncio.Event()

    async def start(self) -> None:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        self.config.load()
        context: contextlib.AbstractAsyncContextManager[Any] = self.app.router.lifespan_context(self.app)
        self.app_state.update(await self._lifespan.enter_async_context(context) or ())
        loop = asyncio.get_running_loop()
        for listener in self.listeners:
            timeouts: dict[str, Any] = {}
            if listener.tls is not None:
                timeouts = {"ssl_handshake_timeout": HANDSHAKE_S, "ssl_shutdown_timeout": FLUSH_S}
            self._servers.append(
                await loop.create_server(
                    lambda: _Protocol(self), sock=listener.sock, ssl=listener.tls, backlog=BACKLOG, **timeouts
                )
            )

    async def stop(self) -> None:
        if self.closing.is_set():
            return
        self.closing.set()
        for server in self._servers:
            server.close()
        for connection in self._connections():
            connection.finish()
        if left := set(self.state.tasks):
            _, left = await asyncio.wait(left, timeout=self.drain_s)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=FLUSH_S)
        await self._close_connections()
        await self._lifespan.aclose()

    async def _close_connections(self) -> None:
        for connection in self._connections():
            connection.finish()
        if self.state.connections:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await self._idle.wait()
        for connection in self._connections():
            connection.transport.abort()

    def _connections(self) -> list[_Protocol]:
        return [connection for connection in self.state.connections if isinstance(connection, _Protocol)]

    def connection_gone(self) -> None:
        if self.closing.is_set() and not self.state.connections:
            self._idle.set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class _Protocol(H11Protocol):
    """One connection: knows its peer, and can be ended at shutdown."""

    def __init__(self, server: Server) -> None:
        super().__init__(config=server.config, server_state=server.state, app_state=server.app_state)
        self._server = server

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._server.closing.is_set():
            transport.abort()
            return
        peer, refused = None, None
        try:
            peer = Identity.from_peercert(transport.get_extra_info("peercert"), pool=self._server.pool)
        except Unauthenticated as error:
            log.warning("%s refused: %s", self.client, error)
            refused = error
        closing = self._server.closing
        self.app = Edge(self._server.app, peer=peer, refused=refused, closing=closing, wake=self.wake)
        self.timeout_keep_alive_task = self.loop.call_later(FIRST_REQUEST_S, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._server.connection_gone()

    def wake(self) -> None:
        if self.cycle is not None:
            self.cycle.message_event.set()

    def finish(self) -> None:
        """End the connection as soon as its answer is out; a client that holds it idle need not be asked."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            self.wake()
        elif self.transport.get_write_buffer_size():
            self.transport.close()
        else:
            self.transport.abort()
