"""Reading a block of a device of this node, to see that the node reaches it. Past the page cache, or memory answers."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import threading

from emp.model.errors import Unreachable
from emp.model.volume import HostDevice

BLOCK_BYTES = 4096
"""no device asks for a coarser alignment"""
TIMEOUT_S = 5.0


class DeviceProbe:
    """See ``emp.volumes.base.VolumeProbe``.

    A read that the kernel holds up cannot be taken back. It is left to its thread, and no other is begun beside it.
    """

    def __init__(self, device: HostDevice) -> None:
        self._device = device
        self._reading: asyncio.Future[None] | None = None

    async def read(self) -> None:
        path = self._device.path
        if self._reading is None or self._reading.done():
            self._reading = _in_thread(path)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.shield(self._reading)
        except (OSError, TimeoutError) as error:
            reason = getattr(error, "strerror", None) or str(error) or f"no answer in {TIMEOUT_S:g} s"
            raise Unreachable(f"cannot read {path}: {reason}", hint="see what the kernel says of the device") from error

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()


def _in_thread(path: str) -> asyncio.Future[None]:
    """Read in a thread of its own that nobody waits for at the end: asyncio's own would hold up the agent's exit."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[None] = loop.create_future()

    def settle(error: OSError | None) -> None:
        if outcome.done():
            return
        if error is None:
            outcome.set_result(None)
        else:
            outcome.set_exception(error)
            outcome.exception()  # it may be that nobody waits any more

    def run() -> None:
        error = None
        try:
            _read_block(path)
        except OSError as failure:
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, name=f"read {path}", daemon=True).start()
    return outcome


def _read_block(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # aligned to a page, as O_DIRECT wants it
            if os.preadv(descriptor, [block], 0) < BLOCK_BYTES:
                raise OSError(f"it has no {BLOCK_BYTES} bytes")
    finally:
        os.close(descriptor)
