"""The serial console of a machine, for any number of readers; keeps the last output so that a reader sees a prompt."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

BACKLOG_BYTES = 64 * 1024
_QUEUE = 256


class Console:
    """Connected to the machine's console socket from ``start`` until ``close`` or the machine's end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._backlog = bytearray()
        self._readers: set[asyncio.Queue[bytes | None]] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._ended = False

    async def start(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(str(self._path))
        self._task = asyncio.create_task(self._pump(reader), name=f"console {self._path}")

    async def _pump(self, reader: asyncio.StreamReader) -> None:
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(4096):
                    self._backlog += data
                    del self._backlog[:-BACKLOG_BYTES]
                    for queue in self._readers:
                        if not queue.full():  # a reader that does not read loses output, the guest does not wait
                            queue.put_nowait(data)
        finally:
            self._end()

    def _end(self) -> None:
        self._ended = True
        for queue in self._readers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(None)

    async def output(self, *, backlog: bool = True) -> AsyncIterator[bytes]:
        """Yield what was shown lately (unless ``backlog`` is false), then what comes; ends with the machine."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUE)
        if backlog and self._backlog:
            queue.put_nowait(bytes(self._backlog))
        if self._ended:
            queue.put_nowait(None)
        self._readers.add(queue)
        try:
            while (data := await queue.get()) is not None:
                yield data
        finally:
            self._readers.discard(queue)

    async def type(self, data: bytes) -> None:
        """Send input to the guest; nothing happens when the machine is gone."""
        if self._writer is not None and not self._ended:
            with contextlib.suppress(OSError):
                self._writer.write(data)
                await self._writer.drain()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
        self._end()
