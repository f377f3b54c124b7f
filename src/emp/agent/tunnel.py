"""The tunnel: what carries frames from one agent to the other, each once and in order, however often it is cut.

A connection that breaks takes with it what is on its way, and says nothing about how much that was. So the target says
now and then how many messages it has taken; the source keeps those that it has not heard of, and sends them again over
the next connection, which begins with the target's count. What is kept is bounded: no more may be on its way at all.

=========  ================  ==========================================================
message    from -> to        what
=========  ================  ==========================================================
data       source -> target  frames (``pack``), or nothing: what was held has been sent
taken      target -> source  messages: how many have come in all; lost: frames among them without room in their queue
=========  ================  ==========================================================

A target whose agent was restarted counts from nothing: what it had not spoken of before is given up, as it may have
come, and no frame is handed out twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from emp.host import packet
from emp.model.errors import EmpError, Unreachable
from emp.network.base import Port
from emp.wire.link import Link

log = logging.getLogger(__name__)

CAUGHT_UP = b""
"""the message that says: what was held has been sent"""
TAKEN_S = 0.02
"""from a message to the word that it was taken: not in the midst of the blackout"""
_REDIAL_S = 0.2
_HELLO_S = 2.0
_KEPT_BYTES = 4 << 20
_EACH_BYTES = 128
"""what a message that is kept takes beside its content"""
_CHUNK_BYTES = 256 << 10
_FRAME = struct.Struct("!BI")
"""number of the card, length of the frame that follows"""

DialFrames = Callable[[], Awaitable[Link]]


def pack(nic: int, frames: Sequence[bytes]) -> Iterator[tuple[bytes, int]]:
    """Yield the messages that carry the frames, each of 256 KiB or one frame, and how many frames are in it."""
    parts: list[bytes] = []
    size = 0
    for frame in frames:
        if parts and size + len(frame) > _CHUNK_BYTES:
            yield b"".join(parts), len(parts) // 2
            parts, size = [], 0
        parts += (_FRAME.pack(nic, len(frame)), frame)
        size += _FRAME.size + len(frame)
    if parts:
        yield b"".join(parts), len(parts) // 2


def unpack(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the card, frame). Raise ``ValueError`` for what ``pack`` has not made."""
    at = 0
    while at < len(message):
        if at + _FRAME.size > len(message):
            raise ValueError("a frame without its length")
        nic, size = _FRAME.unpack_from(message, at)
        at += _FRAME.size
        if not packet.HEADER_BYTES + 14 <= size <= len(message) - at:
            raise ValueError(f"a frame of {size} bytes in a message with {len(message) - at} left")
        yield nic, message[at : at + size]
        at += size


class Tunnel:
    """The source's end."""

    def __init__(self, name: str, dial: DialFrames) -> None:
        self._name = name
        self._dial = dial
        self._link: Link | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._kept: deque[tuple[bytes, int]] = deque()
        """sent or to be sent, and not known to have been taken: (message, frames in it)"""
        self._kept_bytes = 0
        self._written = 0
        """of those, the first so many have been given to a connection"""
        self._taken: int | None = None
        """messages, by the target's count; None: not asked yet"""
        self._needed = asyncio.Event()
        self._shorter = asyncio.Event()
        self.forwarded = 0
        """frames that the target has taken"""
        self._lost = 0
        self._lost_there = 0

    @property
    def lost(self) -> int:
        """Frames that the target has not taken, or had no room for."""
        return self._lost + self._lost_there + sum(frames for _, frames in self._kept)

    async def connect(self) -> None:
        """Open the first connection. Raise as the dialling does."""
        await self._connect()
        self._keep()

    def send(self, nic: int, frames: Sequence[bytes]) -> None:
        """Send without waiting; ``writable`` says when more may be."""
        for message, count in pack(nic, frames):
            self._send(message, count)

    def say_caught_up(self) -> None:
        self._send(CAUGHT_UP, 0)

    async def writable(self) -> None:
        """Return when there is not more on its way than may be."""
        while self._kept_bytes > _KEPT_BYTES:
            await self._until_shorter()

    async def emptied(self) -> None:
        """Return when all that was sent has been taken."""
        while self._kept:
            await self._until_shorter()

    async def close(self) -> None:
        """Say goodbye, and wait for the target's a second at most. Idempotent."""
        await self._stop_keeping()
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def abort(self) -> None:
        """Drop it without a word: what the target has not taken is not sent any more. Idempotent."""
        link, self._link = self._link, None
        while self._kept:
            self._pop()
        if link is not None:
            link.abort()
        await self._stop_keeping()

    async def _stop_keeping(self) -> None:
        task, self._keeping = self._keeping, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _until_shorter(self) -> None:
        self._shorter.clear()
        await self._shorter.wait()

    def _send(self, message: bytes, frames: int) -> None:
        self._kept.append((message, frames))
        self._kept_bytes += _EACH_BYTES + len(message)
        self._needed.set()
        self._keep()
        if self._link is not None:
            with contextlib.suppress(EmpError):  # it has broken, and is made anew
                self._link.send_data(message)
                self._written = len(self._kept)

    def _keep(self) -> None:
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep_connected(), name=f"tunnel of {self._name}")

    async def _keep_connected(self) -> None:
        while True:
            if self._link is None:
                await self._needed.wait()
                try:
                    await self._connect()
                except EmpError as error:
                    log.info("%s: frames wait for a connection to the target: %s", self._name, error)
                    await asyncio.sleep(_REDIAL_S)
                    continue
            assert self._link is not None
            async for said in self._link:
                self._hear(said)
            self._link = None

    async def _connect(self) -> None:
        link = await self._dial()
        try:
            async with asyncio.timeout(_HELLO_S):
                said = await anext(aiter(link), None)
            if said is None:
                raise Unreachable(f"{link.peer} does not take frames")
            self._begin(said)
            for message, _ in self._kept:
                link.send_data(message)
            self._written = len(self._kept)
        except TimeoutError:
            link.abort()
            raise Unreachable(f"{link.peer} does not say what it has taken") from None
        except BaseException:
            link.abort()
            raise
        self._link = link

    def _begin(self, said: dict[str, Any]) -> None:
        match said:
            case {"type": "taken", "messages": int(taken)} if self._taken is None:
                self._taken = taken
            case {"type": "taken", "messages": int(taken)} if self._taken is not None and taken < self._taken:
                self._lost, self._lost_there = self._lost + self._lost_there, 0
                self._lost += sum(self._pop() for _ in range(self._written))
                self._shortened()
                self._taken = taken
            case _:
                self._hear(said)

    def _pop(self) -> int:
        """Keep the oldest message no longer; return how many frames were in it."""
        message, frames = self._kept.popleft()
        self._kept_bytes -= _EACH_BYTES + len(message)
        self._written = max(0, self._written - 1)
        return frames

    def _hear(self, said: dict[str, Any]) -> None:
        match said:
            case {"type": "taken", "messages": int(taken), "lost": int(lost)} if self._taken is not None:
                while self._taken < taken and self._kept:
                    self.forwarded += self._pop()
                    self._taken += 1
                self._lost_there = lost
                self._shortened()

    def _shortened(self) -> None:
        if not self._kept:
            self._needed.clear()
        self._shorter.set()


class Arrivals:
    """The target's end: frames go into the ports' queues, where the machine finds them."""

    def __init__(self, name: str, ports: Sequence[Port]) -> None:
        self._name = name
        self._ports = ports
        self._link: Link | None = None
        self._taken = 0
        self._news = asyncio.Event()
        self.lost = 0
        """frames that found no room in their queue"""
        self.caught_up = asyncio.Event()
        """what the source held has arrived, or nothing arrives any more"""

    async def take(self, link: Link) -> None:
        """Until the connection ends. Another one that is still there gets no further: its rest comes here."""
        if self._link is not None:
            self._link.abort()
        self._link = link
        link.on_data = self._put
        telling = asyncio.create_task(self._tell(link), name=f"frames of {self._name} taken")
        try:
            async for _ in link:
                pass
        finally:
            telling.cancel()
            await asyncio.wait({telling})
            if self._link is link:
                self._link = None
                self.caught_up.set()
                for port in self._ports:
                    port.settle()
                if self.lost:
                    log.warning("%s: %d forwarded frames found no room in their queue", self._name, self.lost)

    async def _tell(self, link: Link) -> None:
        with contextlib.suppress(EmpError):  # it has ended
            while True:
                self._news.clear()
                await link.send({"type": "taken", "messages": self._taken, "lost": self.lost})
                await self._news.wait()
                await asyncio.sleep(TAKEN_S)

    def _put(self, message: bytes) -> None:
        self._taken += 1
        if message == CAUGHT_UP:
            self.caught_up.set()
        for nic, frame in unpack(message):
            if nic < len(self._ports):
                self.lost += 1 - self._ports[nic].put([frame])
        self._news.set()
