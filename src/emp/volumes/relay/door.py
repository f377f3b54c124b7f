"""Where clients come in: greeted, under TLS if they are another node's, and served if they are the right ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from pathlib import Path

from emp.model.errors import EmpError
from emp.volumes.nbd_wire import SocketWire, Stream, keep_alive
from emp.volumes.relay.config import RelayConfig, TlsListen
from emp.volumes.relay.greeting import READ_S, Unwelcome, agree, greet, until_tls
from emp.volumes.relay.relay import Relay
from emp.volumes.relay.session import AGAIN_S, LOOK_S
from emp.wire.tls import mutual_server

log = logging.getLogger(__name__)

MOST_STRANGERS = 64
"""connections that have not yet shown who they are"""
MOST_CLIENTS = 8
"""the other relay, its agent, and connections of theirs that died unnoticed"""


class Door:
    """Accepts on ``listening``, which it does not close, until it is closed."""

    def __init__(self, relay: Relay, listening: socket.socket, config: RelayConfig) -> None:
        self._relay = relay
        self._listening = listening
        self._listen = config.listen
        self._tls_dir = Path(config.tls_dir)
        self._strangers = 0
        self._clients = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Accept until cancelled; then every connection is closed."""
        self._listening.setblocking(False)
        try:
            while True:
                try:
                    connection, _ = await asyncio.get_running_loop().sock_accept(self._listening)
                except OSError as error:  # too many descriptors, or a client that has gone already
                    log.warning("cannot accept a client: %s", error)
                    await asyncio.sleep(AGAIN_S)
                    continue
                if self._strangers >= MOST_STRANGERS:
                    connection.close()
                    continue
                task = asyncio.create_task(self._admit(connection), name="client")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(set(self._tasks))

    async def _admit(self, connection: socket.socket) -> None:
        stream: Stream | None = None
        try:
            self._strangers += 1
            try:
                stream, client_flags = await self._receive(connection)
            finally:
                self._strangers -= 1
            if self._clients >= MOST_CLIENTS:
                raise Unwelcome("there are too many clients")
            self._clients += 1
            try:
                await self._serve(stream, client_flags)
            finally:
                self._clients -= 1
        except (Unwelcome, EmpError) as error:
            log.warning("a client is sent away: %s", error)
        except (OSError, EOFError) as error:
            log.info("a client is gone: %s", error or "it said nothing")
        finally:
            if stream is not None:
                stream.abort()

    async def _receive(self, connection: socket.socket) -> tuple[Stream, int]:
        """Return the stream and the client's flags; under TLS where that is asked for."""
        wire, tls = SocketWire(connection), None
        try:
            connection.setblocking(False)
            keep_alive(connection)
            async with asyncio.timeout(3 * READ_S):
                flags = await greet(wire)
                if isinstance(self._listen, TlsListen):
                    await until_tls(wire)
                    tls = mutual_server(self._tls_dir)  # read anew each time: certificates are renewed in place
        except BaseException:
            connection.close()
            raise
        return await Stream.over(connection, tls=tls, is_server=True), flags

    async def _serve(self, stream: Stream, client_flags: int) -> None:
        export, refusal = "", None
        if isinstance(self._listen, TlsListen):
            export, name = self._listen.export, stream.common_name
            if name != self._listen.peer:
                refusal = f"{name} may not use this export"

        async def facts() -> tuple[int, int]:
            return await self._facts(stream)

        await agree(stream, export=export, refusal=refusal, client_flags=client_flags, facts=facts)
        await self._relay.serve(stream)

    async def _facts(self, stream: Stream) -> tuple[int, int]:
        """Wait for what there is to be said, for as long as the client does."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    return await self._relay.facts()
            if stream.is_hung_up:
                raise EOFError("it did not wait for the volume")
