"""The two ends at which a switchover link begins: an agent's ``LinkServer``, and ``connect_link`` to it."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Self

from emp.model.errors import Unreachable
from emp.wire.duplex import GOODBYE_S, Link
from emp.wire.identity import Identity

__all__ = ["DEAD_AFTER_S", "Link", "LinkServer", "connect_link"]

DEAD_AFTER_S = 2.0


class LinkServer:
    """Accepts links: ``async with LinkServer(sock, tls=mutual_server(dir), pool="p", on_link=handler): ...``.

    ``on_link(link)`` is called for each agent of the pool that connects, before it is welcomed; it takes the link over,
    or raises the ``EmpError`` that the connecting side then sees. Leaving closes the listener and drops all links.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        tls: ssl.SSLContext,
        pool: str,
        on_link: Callable[[Link], None],
        dead_after_s: float = DEAD_AFTER_S,
    ) -> None:
        self.sock = sock
        self._tls = tls
        self._pool = pool
        self._on_link = on_link
        self._dead_after_s = dead_after_s
        self._links: set[Link] = set()

    async def start(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Link(pool=self._pool, admit=self._admit, dead_after_s=self._dead_after_s),
            sock=self.sock,
            ssl=self._tls,
            ssl_handshake_timeout=5.0,
            ssl_shutdown_timeout=GOODBYE_S,
        )

    async def stop(self) -> None:
        self._server.close()
        links = list(self._links)
        for link in links:
            link.abort()
        await asyncio.gather(*(link.closed for link in links))

    def _admit(self, link: Link) -> None:
        self._on_link(link)
        self._links.add(link)
        link.closed.add_done_callback(lambda _: self._links.discard(link))
        link.welcome()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


async def connect_link(
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext,
    pool: str,
    peer: Identity,
    timeout_s: float = 3.0,
    dead_after_s: float = DEAD_AFTER_S,
) -> Link:
    """Return a link to the agent ``peer``, verified by both sides.

    ``Unreachable``: no connection, another daemon answers there, or it refuses our certificate. Else the error with
    which the peer's ``on_link`` refused.
    """
    where = f"{peer} at {host} port {port}"

    def admit(link: Link) -> None:
        if link.peer != peer:
            raise Unreachable(f"{where} cannot be reached: {link.peer} answers there")

    link: Link | None = None
    try:
        async with asyncio.timeout(timeout_s):
            _, link = await asyncio.get_running_loop().create_connection(
                lambda: Link(pool=pool, admit=admit, dead_after_s=dead_after_s),
                host, port, ssl=tls, server_hostname=peer.cn, ssl_shutdown_timeout=GOODBYE_S,
            )  # fmt: skip
            await link.welcome_or_closed()
    except BaseException as error:
        if link is not None:
            link.abort()
        if not isinstance(error, OSError):
            raise
        late = isinstance(error, TimeoutError)
        raise Unreachable(f"{where} cannot be reached: {'no answer in time' if late else error}") from error
    if link.closed.done():
        raise link.closed.result() or Unreachable(f"{where} closed the link at once")
    return link
