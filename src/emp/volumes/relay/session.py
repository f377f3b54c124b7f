"""One client, its requests, and its own connection to the volume.

A request is *waiting* until it may be sent, then *outstanding* until the volume has answered; only then is the client
answered. A lost connection to the volume is made again and what is outstanding is sent again, in order: an NBD request
says where it reads or writes, so doing it twice is doing it once. The client sees nothing but time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import Protocol

from emp.model.errors import EmpError
from emp.volumes.nbd_wire import (
    LONGEST_BYTES,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Export,
    Kind,
    Stream,
    pack_request,
    say_goodbye,
)
from emp.volumes.relay.figures import Figures

log = logging.getLogger(__name__)

MOST_REQUESTS = 128
MOST_BYTES = 32 << 20
"""of payload that is kept for one client, or one request's; then its connection is not read. QEMU sends 16 requests"""
AGAIN_S = 0.2
"""pause before the volume is tried again: always the same, so that nobody waits longer than it takes"""
LOOK_S = 1.0
"""how often a client that is not read is looked at, whether it is still there"""
WRITES = frozenset({Kind.WRITE, Kind.TRIM, Kind.WRITE_ZEROES})
_KINDS = WRITES | {Kind.READ, Kind.FLUSH, Kind.CACHE}
_COMMAND_FLAGS = 0b10011
"""FUA, no hole, fast zero: all that there are without structured replies"""
_EINVAL, _ESHUTDOWN = 22, 108
_SMALL_BYTES = 64 << 10


class Hub(Protocol):
    """What a session needs of the relay that it is part of (``relay.Relay``)."""

    figures: Figures

    @property
    def takes_requests(self) -> bool:
        """New requests may be sent to the volume."""
        ...

    @property
    def takes_writes(self) -> bool:
        """Those that change the volume, too."""
        ...

    async def until_connectable(self) -> None:
        """Wait while the volume must not be connected to."""
        ...

    async def connect(self) -> Export:
        """Open a connection to the volume, which can do all that the clients were told."""
        ...

    def failed(self, error: Exception) -> None:
        """It could not."""
        ...

    def about_to_write(self, session: Session) -> None:
        """A session asks for a change of the volume for the first time."""
        ...

    def settled(self) -> None:
        """A session has nothing outstanding any more."""
        ...


class Request:
    __slots__ = ("cookie", "data", "flags", "kind", "length", "offset", "result", "sent_s")

    def __init__(self, kind: int, flags: int, cookie: int, offset: int, length: int, data: bytes) -> None:
        self.kind, self.flags, self.cookie = kind, flags, cookie
        self.offset, self.length, self.data = offset, length, data
        self.sent_s: float | None = None
        self.result: asyncio.Future[int] | None = None
        """set: the relay's own request, not a client's"""


class Session:
    def __init__(self, hub: Hub, client: Stream) -> None:
        self._hub = hub
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._export: Export | None = None
        self._last_cookie = 0
        self._bytes = 0
        self._room = asyncio.Event()
        self.waiting: deque[Request] = deque()
        self.outstanding: dict[int, Request] = {}
        """by the cookie that the volume knows it under, in the order of sending"""
        self.wrote = False
        self.gone = False
        """the client is: nobody wants an answer any more"""

    @property
    def has_writes_outstanding(self) -> bool:
        return any(request.kind in WRITES for request in self.outstanding.values())

    async def run(self) -> None:
        """Serve the client until it goes; return when nothing that it wrote is on its way any more."""
        upstream = asyncio.create_task(self._keep_connected(), name="upstream")
        client = asyncio.create_task(self._listen(), name="requests")
        try:
            await asyncio.wait({upstream, client}, return_when=asyncio.FIRST_COMPLETED)
            self.leave()
            # What has been sent cannot be called back: nobody else may write before it is known to be over. What was
            # on a connection that is lost is over, as far as anybody here can know.
            if self.has_writes_outstanding and self._export is not None:
                await asyncio.wait({upstream})
        finally:
            self.leave()
            upstream.cancel()
            client.cancel()
            await asyncio.wait({upstream, client})
            for request in self.outstanding.values():
                if request.result is not None and not request.result.done():
                    request.result.set_result(_ESHUTDOWN)
            self.outstanding.clear()
            self._hub.settled()
        for task in (upstream, client):
            if not task.cancelled():
                with contextlib.suppress(OSError, EOFError):  # the client went without a word
                    task.result()

    def leave(self) -> None:
        """The client is gone, or sent away: what it had waiting is never done."""
        if not self.gone:
            self.gone = True
            self.waiting.clear()
            self._room.set()
            self._client.abort()
            if not self.has_writes_outstanding:
                self.cut()

    def leave_if_hung_up(self) -> None:
        """A client that is not read, because too much of it waits already, may be gone unseen."""
        if self._client.is_hung_up:
            self.leave()

    def cut(self) -> None:
        """Drop the connection to the volume."""
        if self._export is not None:
            self._export.stream.abort()

    def push(self) -> None:
        """Send what may be sent: in order, but reads pass writes that wait; a flush passes none."""
        if self._export is None or not self.waiting or not self._hub.takes_requests:
            return
        if self._hub.takes_writes:
            while self.waiting:
                self._send(self.waiting.popleft())
            return
        staying: deque[Request] = deque()
        for request in self.waiting:
            if request.kind in WRITES or (staying and request.kind == Kind.FLUSH):
                staying.append(request)
            else:
                self._send(request)
        self.waiting = staying

    async def flush(self) -> int:
        """Send a flush of the relay's own; return the volume's answer, 0 if done. It is sent again as any other."""
        request = Request(Kind.FLUSH, 0, 0, 0, 0, b"")
        request.result = self._loop.create_future()
        self._send(request)
        return await request.result

    # ------------------------------------------------------------------ the client's side

    async def _listen(self) -> None:
        while True:
            while len(self.waiting) + len(self.outstanding) >= MOST_REQUESTS or self._bytes >= MOST_BYTES:
                self._room.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._room.wait()
                if self._client.is_hung_up:
                    return
            head = await self._client.readexactly(REQUEST.size)
            magic, flags, kind, cookie, offset, length = REQUEST.unpack(head)
            if magic != REQUEST_MAGIC or (kind == Kind.WRITE and length > LONGEST_BYTES):
                log.warning("a client does not keep to the protocol, and is sent away")
                return
            if kind == Kind.DISCONNECT:
                return
            data = await self._client.readexactly(length) if kind == Kind.WRITE else b""
            if kind not in _KINDS or flags & ~_COMMAND_FLAGS or (kind == Kind.READ and length > LONGEST_BYTES):
                await self._client.write(REPLY.pack(REPLY_MAGIC, _EINVAL, cookie))
                continue
            if self.gone:
                return
            if kind in WRITES and not self.wrote:
                self.wrote = True
                self._hub.about_to_write(self)
            self._bytes += len(data)
            self.waiting.append(Request(kind, flags, cookie, offset, length, data))
            self.push()

    # ------------------------------------------------------------------ the volume's side

    async def _keep_connected(self) -> None:
        is_first = True
        while True:
            await self._hub.until_connectable()
            try:
                export = await self._hub.connect()
            except (OSError, EOFError, EmpError) as error:  # a timeout is an OSError
                self._hub.failed(error)
                await asyncio.sleep(AGAIN_S)
                continue
            if self.gone:
                say_goodbye(export.stream)
                return
            self._hub.figures.reconnects += not is_first
            is_first = False
            self._export = export
            try:
                for cookie, request in self.outstanding.items():
                    self._put(cookie, request)
                self.push()
                await self._hear(export.stream)
            except (OSError, EOFError) as error:
                log.info("the connection to the volume is lost: %s", error)
            finally:
                self._export = None
                say_goodbye(export.stream)
            if self.gone:  # what it wrote is over, or as lost as its client
                return
            await asyncio.sleep(AGAIN_S)

    def _send(self, request: Request) -> None:
        self._last_cookie += 1
        request.sent_s = self._loop.time()
        self.outstanding[self._last_cookie] = request
        self._put(self._last_cookie, request)

    def _put(self, cookie: int, request: Request) -> None:
        """Give it to the connection, if there is one now. What that buffers is bounded by what is kept here."""
        if self._export is not None:
            head = pack_request(request.kind, cookie, flags=request.flags, offset=request.offset, length=request.length)
            _send_two(self._export.stream, head, request.data)

    async def _hear(self, volume: Stream) -> None:
        while not (self.gone and not self.has_writes_outstanding):
            magic, code, cookie = REPLY.unpack(await volume.readexactly(REPLY.size))
            request = self.outstanding.get(cookie)
            if magic != REPLY_MAGIC or request is None:
                raise OSError("the volume's server does not speak NBD")
            if code == _ESHUTDOWN:
                raise OSError("the volume's server is shutting down")
            data = b""
            if request.kind == Kind.READ and not code:
                data = await volume.readexactly(request.length)
            del self.outstanding[cookie]
            self._count(request, code)
            if not self.outstanding:
                self._hub.settled()
            if request.result is not None:
                if not request.result.done():
                    request.result.set_result(code)
            elif not self.gone:
                self._bytes -= len(request.data)
                self._room.set()
                _send_two(self._client, REPLY.pack(REPLY_MAGIC, code, request.cookie), data)
                with contextlib.suppress(OSError):  # the client is gone, which _listen sees
                    await self._client.drain()

    def _count(self, request: Request, code: int) -> None:
        figures = self._hub.figures
        if request.sent_s is not None:
            figures.round_trip.add(self._loop.time() - request.sent_s)
        if code:
            figures.errors += 1
        elif request.kind == Kind.READ:
            figures.read_ops += 1
            figures.read_bytes += request.length
        elif request.kind in WRITES:
            figures.write_ops += 1
            figures.write_bytes += request.length
        elif request.kind == Kind.FLUSH:
            figures.flushes += 1


def _send_two(stream: Stream, head: bytes, data: bytes) -> None:
    """Send both, in one segment where copying is cheaper than sending twice."""
    if len(data) <= _SMALL_BYTES:
        stream.send(head + data)
    else:
        stream.send(head)
        stream.send(data)
