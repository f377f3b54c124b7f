"""Both ends of a relay, in the test's own hands: a volume that answers when it is told to, and a client that asks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path

from emp.volumes.nbd_wire import (
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    Export,
    Flag,
    Kind,
    Stream,
    open_unix,
    pack_request,
)

ALL_FLAGS = int(Flag.HAS_FLAGS | Flag.FLUSH | Flag.FUA | Flag.TRIM | Flag.WRITE_ZEROES | Flag.CACHE)


@dataclass(frozen=True)
class Asked:
    """A request as the volume has got it."""

    kind: int
    offset: int
    length: int
    flags: int = 0


class FakeVolume:
    """A volume in memory, and the source by which a relay reaches it."""

    def __init__(self, size_bytes: int = 1 << 20, flags: int = ALL_FLAGS) -> None:
        self.size_bytes = size_bytes
        self.flags = flags
        self.content = bytearray(size_bytes)
        self.asked: list[Asked] = []
        self.connections = 0
        self.is_open = False
        self.reachable = True
        self.errors: dict[int, int] = {}
        """kind of request -> the error that it is answered with"""
        self.answering = asyncio.Event()
        self.answering.set()
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: set[Stream] = set()

    async def connect(self) -> Export:
        if not self.reachable:
            raise ConnectionRefusedError("it is not there")
        self.is_open = True
        self.connections += 1
        ours, theirs = socket.socketpair()
        task = asyncio.create_task(self._serve(ours))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        theirs.setblocking(False)
        return Export(await Stream.over(theirs, tls=None), self.size_bytes, self.flags)

    async def close(self) -> None:
        self.is_open = False

    async def stop(self) -> None:
        """End all connections, for good."""
        self.lose()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))

    def lose(self) -> None:
        """Every connection breaks."""
        for stream in list(self._streams):
            stream.abort()

    def of_kind(self, kind: int) -> list[Asked]:
        return [each for each in self.asked if each.kind == kind]

    async def until_asked(self, count: int, kind: int | None = None) -> None:
        """Wait until it has got so many requests."""
        async with asyncio.timeout(5):
            while len(self.asked if kind is None else self.of_kind(kind)) < count:
                self._news.clear()
                await self._news.wait()

    async def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        stream = await Stream.over(connection, tls=None, is_server=True)
        self._streams.add(stream)
        try:
            with contextlib.suppress(OSError, EOFError):
                while True:
                    _, flags, kind, cookie, offset, length = REQUEST.unpack(await stream.readexactly(REQUEST.size))
                    if kind == Kind.DISCONNECT:
                        return
                    data = await stream.readexactly(length) if kind == Kind.WRITE else b""
                    self.asked.append(Asked(kind, offset, length, flags))
                    self._news.set()
                    await self.answering.wait()
                    code = self.errors.get(kind, 0)
                    if kind == Kind.WRITE and not code:
                        self.content[offset : offset + length] = data
                    said = self.content[offset : offset + length] if kind == Kind.READ and not code else b""
                    await stream.write(REPLY.pack(REPLY_MAGIC, code, cookie) + said)
        finally:
            self._streams.discard(stream)
            stream.abort()


class FakeClient:
    """What QEMU is to a relay, a request at a time."""

    def __init__(self, export: Export) -> None:
        self.export = export
        self._cookie = 1000

    @classmethod
    async def to(cls, path: Path) -> FakeClient:
        return cls(await open_unix(path))

    def send(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", *, flags: int = 0) -> int:
        """Return the cookie."""
        self._cookie += 1
        head = pack_request(kind, self._cookie, flags=flags, offset=offset, length=length or len(data))
        self.export.stream.send(head + data)
        return self._cookie

    async def answer(self, length: int = 0) -> tuple[int, int, bytes]:
        """Return error, cookie and, for a read, data of the next answer."""
        async with asyncio.timeout(5):
            magic, code, cookie = REPLY.unpack(await self.export.stream.readexactly(REPLY.size))
            assert magic == REPLY_MAGIC
            return code, cookie, await self.export.stream.readexactly(0 if code else length)

    async def write(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        cookie = self.send(Kind.WRITE, offset, data=data, flags=flags)
        code, answered, _ = await self.answer()
        assert answered == cookie
        return code

    async def read(self, offset: int, length: int) -> bytes:
        cookie = self.send(Kind.READ, offset, length)
        code, answered, data = await self.answer(length)
        assert (code, answered) == (0, cookie)
        return data

    async def is_silent(self, within_s: float = 0.3) -> bool:
        """Whether nothing comes for that long."""
        try:
            async with asyncio.timeout(within_s):
                await self.export.stream.readexactly(1)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        self.export.stream.abort()


def raw_request(**changes: int) -> bytes:
    """Return a request's head, with something wrong in it if you like."""
    fields = {"magic": REQUEST_MAGIC, "flags": 0, "kind": 0, "cookie": 7, "offset": 0, "length": 512} | changes
    return REQUEST.pack(*fields.values())
