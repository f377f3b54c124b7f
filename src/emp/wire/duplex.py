"""The switchover's link: one TLS connection between two agents, opened before the blackout and kept warm for it.

An order over HTTP costs a request, a router and a response; inside the blackout a message is one write and one wake-up.
The link says when it is gone, and makes no claim about what the other side did with the last messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Self

import pydantic_core

from emp.model.errors import (
    BadInput,
    EmpError,
    Forbidden,
    OutcomeUnknown,
    Unauthenticated,
    Unavailable,
    Unreachable,
    error_from_dict,
)
from emp.wire.frames import Decoder, Kind, encode
from emp.wire.identity import Identity, Role
from emp.wire.tls import refusal

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.25
GOODBYE_S = 1.0
MAX_PENDING = 256
"""received messages that nobody has taken, before reading pauses"""


class Link(asyncio.Protocol):
    """A duplex message link to a verified peer: ``await link.send({...})``, ``async for message in link``.

    ``closed`` is done when the connection is gone: with None after a goodbye of either side, else with the error that
    says why (``Unavailable`` for a peer that fell silent or vanished, the peer's own error if it sent one). The
    iteration hands out everything received and then ends, for whatever cause.
    """

    peer: Identity

    def __init__(self, *, pool: str, admit: Callable[[Link], None], dead_after_s: float) -> None:
        if dead_after_s < 2 * HEARTBEAT_S:
            raise BadInput(f"two heartbeats take {2 * HEARTBEAT_S:g} s", field="dead_after_s")
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[EmpError | None] = self._loop.create_future()
        self._welcomed = asyncio.Event()
        self._pool = pool
        self._admit = admit
        self.dead_after_s = dead_after_s
        """silence of the peer after which the link counts as broken"""
        self._decoder = Decoder()
        self._received: deque[dict[str, Any]] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._reading = True
        self._cause: EmpError | None = None
        self._goodbye = False
        self.on_data: Callable[[bytes], None] | None = None
        """takes each piece of data as it arrives; without it one is a breach of the protocol"""

    # what an agent uses

    async def send(self, message: Mapping[str, Any]) -> None:
        """Write one message out at once; wait only when the peer is too slow to take what was written before.

        ``Unreachable``: the link was closed already. ``OutcomeUnknown``: it closed while waiting. ``BadInput``: beyond
        1 MiB. No error does not mean that it has arrived: that is for the peer to say.
        """
        self._send(Kind.MESSAGE, pydantic_core.to_json(message))
        if not self._writable.is_set():
            await self._writable.wait()
            if self.closed.done():
                raise OutcomeUnknown(f"the link to {self.peer} closed before the message was out")

    def send_data(self, data: bytes) -> bool:
        """Write at once; False when the peer is behind: then ``await writable()`` before more. Raise as ``send``."""
        self._send(Kind.DATA, data)
        return self._writable.is_set()

    async def writable(self) -> None:
        """Return when more can be sent, or the link is closed."""
        await self._writable.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        while not self._received:
            if self.closed.done():
                raise StopAsyncIteration
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        message = self._received.popleft()
        if not self._reading and len(self._received) < MAX_PENDING // 2 and not self.closed.done():
            self._reading = True
            self._transport.resume_reading()
        return message

    async def close(self, error: EmpError | None = None) -> None:
        """Say goodbye, with the reason if there is one, and wait until the connection is gone (at most a second)."""
        self._say_bye(error)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.closed), GOODBYE_S)
        self.abort()
        await self.closed

    def abort(self) -> None:
        """Drop the connection without a word; ``closed`` follows in the next turn of the loop."""
        self._transport.abort()

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._transport.set_write_buffer_limits(high=1 << 20)
        self._heard_at = self._sent_at = self._loop.time()
        self._tick_at = self._heard_at + HEARTBEAT_S
        self._timer = self._loop.call_at(self._tick_at, self._tick)
        try:
            peer = Identity.from_peercert(transport.get_extra_info("peercert"), pool=self._pool)
            if peer is None:
                raise Unauthenticated("the switchover link needs a certificate of the pool")
            self.peer = peer
            if peer.role is not Role.AGENT:
                raise Forbidden(f"{peer} may not open a switchover link", hint="only agents may")
            self._admit(self)
        except EmpError as error:
            log.warning("link from %s refused: %s", transport.get_extra_info("peername"), error)
            self._say_bye(error)

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._heard_at = self._loop.time()
        try:
            for kind, payload in self._decoder.feed(data):
                self._take(kind, payload)
        except (EmpError, ValueError, TypeError) as error:
            self._fail(Unavailable(f"{self.peer} does not speak this protocol: {error}"))

    def _take(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.MESSAGE:
            message = pydantic_core.from_json(payload)
            if not isinstance(message, dict):
                raise BadInput("a message is a JSON object")
            self._received.append(message)
            self._wake_reader()
            if len(self._received) >= MAX_PENDING and self._reading:
                self._reading = False
                self._transport.pause_reading()
        elif kind is Kind.DATA:
            if self.on_data is None:
                raise BadInput("data that nobody expects")
            self.on_data(payload)
        elif kind is Kind.WELCOME:
            self._welcomed.set()
        elif kind is Kind.BYE:
            body = pydantic_core.from_json(payload) if payload else None
            self._goodbye, self._cause = True, error_from_dict(body) if isinstance(body, dict) else None
            self._transport.close()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        if refused := refusal(exc):
            self._cause = Unreachable(f"{self.peer} refuses our certificate: {refused}")
        elif self._cause is None and not self._goodbye:
            self._cause = Unavailable(f"the link to {self.peer} broke: {exc or 'it vanished without a goodbye'}")
        self.closed.set_result(self._cause)
        self._welcomed.set()
        self._wake_reader()
        self._writable.set()

    # how it works

    def welcome(self) -> None:
        """Tell the connecting side that it was verified and admitted."""
        self._write(encode(Kind.WELCOME))

    async def welcome_or_closed(self) -> None:
        """Wait until the accepting side has answered, one way or the other."""
        await self._welcomed.wait()

    def _send(self, kind: Kind, payload: bytes) -> None:
        if self._goodbye or self.closed.done() or self._transport.is_closing():
            raise Unreachable(f"the link to {self.peer} is closed", hint=str(self._cause) if self._cause else None)
        self._write(encode(kind, payload))

    def _write(self, frame: bytes) -> None:
        self._sent_at = self._loop.time()
        self._transport.write(frame)

    def _say_bye(self, error: EmpError | None) -> None:
        if self._goodbye or self._transport.is_closing():
            return
        self._goodbye, self._cause = True, error
        self._write(encode(Kind.BYE, pydantic_core.to_json(error.as_dict()) if error else b""))
        self._transport.close()

    def _fail(self, cause: EmpError) -> None:
        self._cause = cause
        self._transport.abort()

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _tick(self) -> None:
        now = self._loop.time()
        # time in which this process did not run, or did not read, says nothing against the peer
        self._heard_at = now if not self._reading else min(now, self._heard_at + (now - self._tick_at))
        if now - self._heard_at >= self.dead_after_s:
            self._fail(Unavailable(f"{self.peer} has been silent for {self.dead_after_s:g} s"))
            return
        if now - self._sent_at >= HEARTBEAT_S and not self._transport.is_closing():
            self._write(encode(Kind.HEARTBEAT))
        self._tick_at = now + HEARTBEAT_S
        self._timer = self._loop.call_at(self._tick_at, self._tick)
