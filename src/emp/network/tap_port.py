"""What every driver's port has in common: a tap whose descriptor the agent shares with the machine.

At the tap frames can be put in from both ends: by the descriptor, as if the guest had sent them (announcements), and
by a packet socket, as if they had come from the network (what another node has forwarded).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from emp.host import netlink, packet, tap
from emp.host.link_stats import link_stats, mtu_bytes
from emp.model.errors import HostError
from emp.model.network import Traffic
from emp.network.announce import REPEATS_S, announcements
from emp.network.base import Swallowed
from emp.network.guarded_tap import GuardedTap
from emp.network.held import Held

log = logging.getLogger(__name__)

_REMEMBERED = 4096
"""broadcasts that came by themselves, among which a forwarded one may be found again"""


class TapPort:
    """One tap; see ``emp.network.base.Port``. What is left to a driver: ``open``, ``block``, ``moved``, ``release``."""

    is_told = False

    def __init__(self, interface: str, index: int, tap_fd: int, *, macs: Collection[str], routed: bool = False) -> None:
        """``macs``: every one that the EVM and its pods have, whichever card they are behind. ``routed``: the node
        routes IPv6 to the tap."""
        self._interface = interface
        self._guarded = GuardedTap(interface, index, macs, routed=routed)
        self._index = index
        self._tap_fd = tap_fd
        self._repeating: asyncio.Task[None] | None = None
        self._held: Held | None = None
        self._ahead: list[bytes] = []
        self._side: socket.socket | None = None
        """towards the machine, past the driver"""
        self._direct: Counter[bytes] | None = None
        """broadcasts that came by themselves; None: not noted"""

    @property
    def interface(self) -> str:
        return self._interface

    @property
    def tap_fd(self) -> int:
        return self._tap_fd

    async def announce(self, addresses: Sequence[tuple[str, str]]) -> None:
        """See ``Port``. Raise ``HostError`` if the tap does not take the frames.

        They go in at the tap's descriptor, as if the guest had sent them: so the node's own bridge learns too, and a
        blocked port lets none out.
        """
        await self._hush()
        frames = announcements(addresses)
        try:
            self._send(frames)
            self._guarded.ask_for_groups()
        except OSError as error:
            raise HostError(f"cannot announce on {self._interface}: {error.strerror}") from error
        self._repeating = asyncio.create_task(self._repeat(frames), name=f"announce {self._interface}")

    async def allow(self, addresses: Collection[str]) -> None:
        await self._guarded.allow(addresses)

    def listen(self, heard: Callable[[str, str], None]) -> None:
        self._guarded.listen(heard)

    @property
    def mtu_bytes(self) -> int:
        return mtu_bytes(self._interface)

    def traffic(self) -> Traffic:
        return self._guarded.traffic()

    @property
    def overflowed(self) -> int:
        return link_stats(self._index).tx_dropped

    async def remove(self) -> None:
        await self.close()
        await netlink.delete_link(self._index)
        await self._guarded.remove()

    async def close(self) -> None:
        self._guarded.close()
        await self._hush()
        self._ahead = []
        self.forget()
        self.settle()
        descriptor, self._tap_fd = self._tap_fd, -1
        if descriptor >= 0:
            await asyncio.to_thread(os.close, descriptor)  # the last one takes the tap with it: 15 ms and more

    def _send(self, frames: Sequence[bytes]) -> None:
        header = bytes(tap.header_bytes(self._tap_fd))  # all zero: no offload
        for frame in frames:
            with contextlib.suppress(BlockingIOError):  # the queue is full; there is another round
                os.write(self._tap_fd, header + frame)

    async def _repeat(self, frames: Sequence[bytes]) -> None:
        began_s = asyncio.get_running_loop().time()
        for after_s in REPEATS_S:
            await asyncio.sleep(began_s + after_s - asyncio.get_running_loop().time())
            try:
                self._send(frames)
            except OSError:
                return  # the tap has gone, and with it what there was to announce

    async def _hush(self) -> None:
        task, self._repeating = self._repeating, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    # -- what a machine that has stopped does not take

    def watch(self, macs: Sequence[str]) -> None:
        self.forget()
        self._held = Held(self._interface, self._tap_fd, macs, self.put)

    def stopped(self) -> None:
        if self._repeating is not None:  # of a migration to here, a moment ago
            self._repeating.cancel()
        if self._held is not None:
            self._held.stopped()

    def swallowed(self, received: Sequence[int]) -> Swallowed:
        if self._held is None:
            return Swallowed([], [])
        swallowed, self._ahead = self._held.resolve(received)
        self._held.close()
        self._held = None
        return swallowed

    def thrown(self, before: Sequence[int], after: Sequence[int], hidden: int) -> list[bytes] | None:
        return [] if self._held is None else self._held.thrown(before, after, hidden)

    def readdressed(self) -> None:
        """See ``Port``."""

    def pull(self, most: int) -> list[bytes]:
        frames, self._ahead = self._ahead[:most], self._ahead[most:]
        return frames + tap.read_frames(self._tap_fd, most - len(frames))

    async def filled(self) -> None:
        if not self._ahead:
            await readable(asyncio.get_running_loop(), self._tap_fd)

    def forget(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
        ahead, self._ahead = self._ahead, []
        if ahead:
            self.put(ahead)

    # -- what another node has forwarded

    def expect(self) -> None:
        self.settle()
        self._side = packet.open_packet(
            self._interface, program=packet.leaving(to_groups_only=True), receive_bytes=1 << 20
        )
        self._direct = Counter()

    def settle(self) -> None:
        if self._side is not None:
            packet.close_later(self._side)
            self._side, self._direct = None, None

    def put(self, frames: Sequence[bytes]) -> int:
        if self._side is None:
            self._side = packet.open_packet(self._interface, program=None)
        taken = 0
        for frame in frames:
            if self._direct is not None and frame[packet.HEADER_BYTES] & 1 and self._came_by_itself(frame):
                taken += 1
                continue
            try:
                self._side.send(frame)
                taken += 1
            except OSError as error:  # its queue is full, or the frame makes no sense here: that one is lost
                log.debug("%s takes no frame of %d bytes: %s", self._interface, len(frame), error)
        return taken

    def _came_by_itself(self, frame: bytes) -> bool:
        assert self._side is not None
        assert self._direct is not None
        with contextlib.suppress(BlockingIOError):
            while len(self._direct) < _REMEMBERED:
                self._direct[self._side.recv(packet.LONGEST_BYTES)[packet.HEADER_BYTES :]] += 1
        came = self._direct[frame[packet.HEADER_BYTES :]] > 0
        if came:
            self._direct[frame[packet.HEADER_BYTES :]] -= 1
        return came


async def readable(loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    """Wait until the descriptor has something to read."""
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, wake)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
