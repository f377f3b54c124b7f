"""A monitor connection to one QEMU, kept up for as long as QEMU lives: qemu.qmp with what it leaves to its user.

- Every connect and command has a timeout. A monitor serves one client; a second waits for a greeting that never comes.
- A command has one of three fates: answered; never sent (``HypervisorError``); sent and not answered
  (``OutcomeUnknown``: QEMU may still carry it out, because a command that timed out stays in its queue).
- A monitor may give the reply of a command that a dead client had sent to its successor. Ids are therefore unique to a
  connection, and a connection counts only once it has answered a query of its own.
- It is made again when it breaks, and ``on_connect`` then reads the state, because events are not replayed.
- QEMU's death is no news for the log: whoever watches the process tells of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, Runstate
from qemu.qmp.protocol import StateError
from qemu.qmp.util import flush

from emp.model.errors import HypervisorError, OutcomeUnknown

RETRY_S = 0.1
_silent = logging.Logger("qemu.qmp, unheard", level=logging.CRITICAL + 1)
_log = logging.getLogger(__name__)

OnEvent = Callable[[Mapping[str, Any]], None]


class _Client(QMPClient):
    """qemu.qmp's client with ids that no earlier client had, events handed on in order with the replies, and no log."""

    def __init__(self, on_event: OnEvent) -> None:
        super().__init__()
        self.logger = _silent
        self._on_event = on_event
        self._prefix = secrets.token_hex(8)

    async def _establish_session(self) -> None:
        await super()._establish_session()
        if self._bh_tasks is not None:  # why it ended is seen from its state; unread, the error would be reported
            self._bh_tasks.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    def _get_exec_id(self) -> str:
        self._execute_id += 1
        return f"{self._prefix}-{self._execute_id}"

    def _cb_inbound(self, msg: Message) -> Message:
        return msg  # the library's own would render every message for its log

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    async def pass_descriptor(self, descriptor: int) -> None:
        """Send it ahead of the next command; nothing unsent may be before it, or it would land inside that."""
        assert self._writer is not None
        while self._writer.transport.get_write_buffer_size():
            await flush(self._writer)
        self.send_fd_scm(descriptor)

    async def _on_message(self, msg: Message) -> None:
        if "event" not in msg:
            await super()._on_message(msg)
            return
        try:
            self._on_event(msg)
        except Exception:  # noqa: BLE001 - an event that we misread must not cost the connection
            _log.exception("QMP event not understood: %r", msg)


class QmpSession:
    """One QMP socket. ``open`` it, ``execute`` from any number of tasks, ``close`` it."""

    def __init__(
        self,
        path: Path,
        *,
        timeout_s: float,
        on_event: OnEvent | None = None,
        on_connect: Callable[[QmpSession], Awaitable[None]] | None = None,
    ) -> None:
        """``timeout_s`` is for connecting and, unless told otherwise, for each command.

        ``on_connect`` runs on each new connection before anybody else may use it; it asks with ``barrier``.
        """
        self.path = path
        self._timeout_s = self._connect_timeout_s = timeout_s
        self._on_event: OnEvent = on_event or (lambda event: None)
        self._on_connect = on_connect
        self._client: _Client | None = None
        self._changed = asyncio.Event()
        self._failure: str = "not connected yet"
        self._closed = False
        self._passing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.idle = asyncio.Event()
        """set while there is no connection: after QEMU's death, everything that it had sent has then been read"""
        self.idle.set()

    async def open(self, *, timeout_s: float | None = None) -> None:
        """Connect; raise ``HypervisorError`` if that takes longer than the timeout. It is then tried no more.

        A QEMU that was just started may need more than the usual time.
        """
        self._connect_timeout_s = timeout_s or self._timeout_s
        self._task = asyncio.create_task(self._keep_connected(), name=f"qmp {self.path}")
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._ready()
        except TimeoutError:
            await self.close()
            raise HypervisorError(f"no QMP connection at {self.path}: {self._failure}") from None
        except BaseException:
            await self.close()
            raise

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        oob: bool = False,
        timeout_s: float | None = None,
        descriptor: int | None = None,
    ) -> Any:
        """Return the command's answer. ``descriptor``, which stays the caller's, goes with the command (``add-fd``).

        Raises ``HypervisorError`` when QEMU refused (``details``: ``qmp_class``, ``command``) or when nothing was
        sent (``sent=False``); ``OutcomeUnknown`` when it was sent and not answered (``connection_lost`` says why).
        """
        client: _Client | None = None
        try:
            async with asyncio.timeout(timeout_s or self._timeout_s):
                client = await self._ready()
                if descriptor is None:
                    return await self._ask(client, command, arguments, oob)
                async with self._passing:  # a monitor keeps the descriptor that came last
                    await self._pass(client, command, descriptor)
                    return await self._ask(client, command, arguments, oob)
        except TimeoutError:
            if client is None:
                raise HypervisorError(
                    f"{command} was not sent: no QMP connection: {self._failure}", command=command, sent=False
                ) from None
            raise OutcomeUnknown(
                f"QEMU did not answer {command} in {timeout_s or self._timeout_s:g} s",
                command=command,
                connection_lost=False,
            ) from None

    async def barrier(self, command: str) -> Any:
        """``execute`` for ``on_connect``: on the connection that is being made."""
        assert self._client is not None
        return await self._ask(self._client, command, None, oob=False)

    async def close(self) -> None:
        """Disconnect for good. Idempotent; leaves no task."""
        self._closed = True
        self._changed.set()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _pass(self, client: _Client, command: str, descriptor: int) -> None:
        try:
            await client.pass_descriptor(descriptor)
        except (OSError, StateError, QMPError) as error:
            raise HypervisorError(
                f"{command} was not sent: its descriptor could not be passed: {error}", command=command, sent=False
            ) from None

    async def _ask(self, client: _Client, command: str, arguments: Mapping[str, Any] | None, oob: bool) -> Any:
        try:
            return await client.execute(command, arguments, oob=oob)
        except ExecuteError as error:
            raise HypervisorError(
                f"{command}: {error}", qmp_class=error.error_class, command=command, sent=True
            ) from None
        except StateError:
            raise HypervisorError(
                f"{command} was not sent: the QMP connection has just ended", command=command, sent=False
            ) from None
        except (ExecInterruptedError, QMPError) as error:
            raise OutcomeUnknown(
                f"the QMP connection broke before {command} was answered: {error}",
                command=command,
                connection_lost=True,
            ) from None

    async def _ready(self) -> _Client:
        """Return the usable connection, waiting for one; the caller sets the timeout."""
        while True:
            if self._closed:
                raise HypervisorError(f"the QMP session at {self.path} is closed", sent=False)
            if self._client is not None and not self.idle.is_set() and self._client.runstate is Runstate.RUNNING:
                return self._client
            self._changed.clear()
            await self._changed.wait()

    async def _keep_connected(self) -> None:
        while True:
            try:
                await self._one_connection()
            except Exception as error:  # noqa: BLE001 - qemu.qmp also asserts, if the peer hangs up at a bad moment
                self._failure = str(error) or self._failure
            await asyncio.sleep(RETRY_S)

    async def _one_connection(self) -> None:
        """Connect, and stay until the connection ends."""
        client = _Client(self._on_event)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            self._failure = "nobody listens"
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    await asyncio.get_running_loop().sock_connect(connection, str(self.path))
                    self._failure = "no greeting; another client may hold this monitor"
                    await client.connect(connection)
                    self._client = client
                    if self._on_connect is not None:
                        self._failure = "the first query was not answered"
                        await self._on_connect(self)
                self._failure = "the connection has ended"
                self.idle.clear()
                self._changed.set()
                while client.runstate is Runstate.RUNNING:
                    await client.runstate_changed()
            finally:
                self._client = None
                ending = asyncio.create_task(_disconnect(client, connection), name=f"end of qmp {self.path}")
                try:
                    await asyncio.wait({ending})
                except asyncio.CancelledError:
                    await asyncio.wait({ending})  # or qemu.qmp would leave tasks behind
                    raise
                finally:
                    self.idle.set()


async def _disconnect(client: _Client, connection: socket.socket) -> None:
    # EOF for the reader, so that qemu.qmp ends without waiting for QEMU to read what is unsent
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(Exception):  # says why it ended, which is no news
        await client.disconnect()
