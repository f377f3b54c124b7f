"""Which frames a machine has swallowed as its guest stopped: those too go to the target.

When a guest stops, QEMU stops reading its tap, and what comes for it waits there; all but one or two frames:

- The first that is there after the stop is still read, found to be for a guest that does not run, and queued inside
  QEMU (net/net.c, ``qemu_can_send_packet``; net/tap.c, ``tap_send`` stops polling only then). On an abort the guest
  gets it.
- One that is read while QEMU waits for its vCPUs to stop is queued as well, and thrown away when they have
  (``net_vm_change_state_handler``); then there is one more of the first kind.

With the source's process they would go under, and nothing tells which ones they were. So what goes into the tap is
remembered, and

- as the guest stops, a frame of our own, the **mark**, follows right behind. It comes out of the tap after n frames:
  the last that QEMU has read went in n + 1 before it. It does not come out: QEMU has read the mark itself.
- the ring in the guest's memory says how long the newest frames are that the guest has really got. Laid beside the
  memory of the tap it says which one was the last. Now and then a frame of our own, a **spacer**, goes to the guest
  with a length that no frame near it has: of a stream of equal frames the ring would say nothing.

A guest drops mark and spacers: they are of a protocol that is nobody's.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections import deque
from collections.abc import Callable, Sequence

from emp.host import packet, tap

KEPT_BYTES = 4 << 20
LOOK_S = 0.005
_LOOKS = 512
"""frames that are looked at in one turn: beyond 100,000 a second the newest may be missed, and the agent lives on"""
_AHEAD = 4096
"""frames among which the mark must be, if it is in the tap at all: it was sent within a millisecond of the stop"""
_WAITING_BYTES = 8 << 20
_SPACING = 64
"""frames from one spacer to the next; a guest's ring remembers 256"""
_SPACER_BYTES = range(64, 1024)
_PURGED = 3
"""frames at most that are taken to have been thrown away"""
_RING_HEADER_BYTES = 12
_LOCAL_EXPERIMENTAL = b"\x88\xb5"
"""EtherType that IEEE 802 leaves to local experiments (IEEE 802-2014, 9.2.4)"""
_US, _NOBODY = bytes.fromhex("02454d500001"), bytes.fromhex("02454d500000")


class Held:
    """The memory of one tap, from the beginning of pre-copy on. Raise ``CommandFailed`` when it cannot be watched."""

    def __init__(
        self, interface: str, tap_fd: int, macs: Sequence[str], put: Callable[[Sequence[bytes]], object]
    ) -> None:
        """``macs``: behind the tap, the guest's own card first. ``put``: into the tap, from the network's side."""
        self._tap_fd = tap_fd
        self._own = [bytes.fromhex(mac.replace(":", "")) for mac in macs]
        self._put = put
        self._watching: socket.socket | None = packet.open_packet(
            interface, program=packet.leaving(), receive_bytes=_WAITING_BYTES
        )
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._since_spacer = 0
        self._mark: bytes | None = None
        self._send_spacer()
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._tick)

    def stopped(self) -> None:
        """The guest has stopped: the mark goes in."""
        self._mark = packet.PLAIN + _NOBODY + _US + _LOCAL_EXPERIMENTAL + os.urandom(46)
        self._put([self._mark])

    def resolve(self, received: Sequence[int]) -> tuple[list[bytes], list[bytes]]:
        """Once nobody else reads the tap: (the frames that were swallowed, those after them up to the mark).

        ``received``: what ``Machine.received_bytes`` says.
        """
        if self._mark is None:
            return [], []
        ahead: list[bytes] = []
        is_swallowed = False
        while not is_swallowed and len(ahead) < _AHEAD:
            frames = tap.read_frames(self._tap_fd, 1)
            if frames == [self._mark]:
                break
            ahead += frames
            is_swallowed = not frames
        self._look(_AHEAD + _LOOKS)
        kept = list(self._kept)
        if self._mark not in kept:
            return [], ahead
        at_mark = kept.index(self._mark)
        last = at_mark if is_swallowed else at_mark - len(ahead) - 1
        purged = next((n for n in range(_PURGED + 1) if n <= last and self._is_last(kept[: last - n], received)), 0)
        swallowed = kept[max(0, last - purged) : last + 1] if last >= 0 else []
        return [frame for frame in swallowed if self._is_for_the_guest(frame)], ahead

    def close(self) -> None:
        """Forget everything. Idempotent."""
        self._timer.cancel()
        if self._watching is not None:
            packet.close_later(self._watching)
            self._watching = None
        self._kept.clear()

    def _is_last(self, kept: Sequence[bytes], received: Sequence[int]) -> bool:
        """Whether the ring can be as it is when the last of ``kept`` was the last that the guest got.

        Frames for another MAC may have got to the guest, or have been stopped by the card's filter.
        """
        lefts = {len(received)}
        """how much of the ring may be older than the frame that is looked at"""
        for frame in reversed(kept):
            wanted = _RING_HEADER_BYTES + len(frame) - packet.HEADER_BYTES
            before = lefts if frame[packet.RECEIVER] not in self._own else set()
            lefts = {first for left in lefts if (first := _first_buffer(received, left, wanted)) is not None} | before
            if 0 in lefts:
                return True
        return bool(lefts)

    def _is_for_the_guest(self, frame: bytes) -> bool:
        return frame != self._mark and frame[packet.SENDER] != _US

    def _tick(self) -> None:
        self._look(_LOOKS)
        if self._mark is None:
            if self._since_spacer >= _SPACING:
                self._send_spacer()
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._tick)

    def _send_spacer(self) -> None:
        self._since_spacer = 0
        if self._own:
            near = {len(frame) - packet.HEADER_BYTES for frame in list(self._kept)[-4 * _SPACING :]}
            size = random.choice([size for size in _SPACER_BYTES if size not in near])
            head = packet.PLAIN + self._own[0] + _US + _LOCAL_EXPERIMENTAL
            self._put([head.ljust(packet.HEADER_BYTES + size, b"\0")])

    def _look(self, most: int) -> None:
        assert self._watching is not None
        for _ in range(most):
            try:
                frame = self._watching.recv(packet.LONGEST_BYTES)
            except OSError:  # nothing more, or the tap is gone and with it what to ask for
                return
            self._kept.append(frame)
            self._kept_bytes += len(frame)
            self._since_spacer += 1
            while self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= len(self._kept.popleft())


def _first_buffer(received: Sequence[int], left: int, wanted: int) -> int | None:
    """Return where the buffers begin that end before ``left`` and hold ``wanted``; 0: further back than is known."""
    while left > 0 and wanted > 0:
        left -= 1
        wanted -= received[left]
    return left if wanted == 0 or (left == 0 and wanted > 0) else None
