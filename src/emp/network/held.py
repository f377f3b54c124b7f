"""Which frames a machine has swallowed as its guest stopped: those too go to the target.

When a guest stops, QEMU stops reading its tap, and what comes for it waits there; all but one or two frames:

- The first that is there after the stop is still read, found to be for a guest that does not run, and queued inside
  QEMU (net/net.c, ``qemu_can_send_packet``; net/tap.c, ``tap_send`` stops polling only then). On an abort the guest
  gets it.
- One that is read while QEMU waits for its vCPUs to stop is queued as well, and thrown away when they have
  (``net_vm_change_state_handler``); then there is one more of the first kind. On an abort it is missing.

With the source's process they would go under, and nothing tells which ones they were. So what goes into the tap is
remembered, and

- as the guest stops, a frame of our own, the **mark**, follows right behind. It comes out of the tap after n frames:
  the last that QEMU has read went in n + 1 before it. It does not come out: QEMU has read the mark itself. Where a
  guest lags so far behind that the mark is not among the first frames that wait, these are looked up in the memory.
- the ring in the guest's memory says how long the newest frames are that the guest has really got. Laid beside the
  memory of the tap it says which one was the last. Now and then a frame of our own, a **spacer**, goes to the guest
  with a length that no frame near it has: of a stream of equal frames the ring would say nothing.
- if the guest runs here again it gets the mark too, which has such a length, as have the spacers behind it. The ring
  then says how many buffers were filled from the stop to there, and an earlier look what came before: what is missing
  in between was thrown away.

A guest drops mark and spacers: they are of a protocol that is nobody's.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from emp.host import packet, tap
from emp.network.base import Swallowed

KEPT_BYTES = 16 << 20
"""of memory; a tap's queue of frames below 1,500 bytes, at least a third of it"""
KEPT_FRAMES = 24_000
"""those of a tap's queue, the guest's ring and a pause: all are looked through in the midst of the blackout"""
_EACH_BYTES = 48
"""what a frame takes beside its content"""
LOOK_S = 0.005
_LOOKS = 512
"""frames that are looked at in one turn: beyond 100,000 a second the newest may be missed, and the agent lives on"""
_LAST_LOOKS = 16_384
"""at the end"""
_AHEAD = 512
"""frames at most that are taken out of the tap to find the mark: it is the midst of the blackout"""
_KNOWN_BY = 32
"""of these, where the others do not follow each other in the memory: the queue has overflowed"""
_WAITING_BYTES = 16 << 20
_SPACING = 64
"""frames from one spacer to the next; a guest's ring remembers 1,024"""
_NEAR = 1024
"""frames among which a spacer's length is to be the only one of its kind"""
_SPACER_BYTES = range(64, 1400)
_PURGED = 3
"""frames at most that are taken to have been thrown away"""
_RING_HEADER_BYTES = 12
_ETHERNET_BYTES = 14
_MARK_BYTES = 16
"""by which a mark is known"""
_LOCAL_EXPERIMENTAL = b"\x88\xb5"
"""EtherType that IEEE 802 leaves to local experiments (IEEE 802-2014, 9.2.4)"""
_US, _NOBODY = bytes.fromhex("02454d500001"), bytes.fromhex("02454d500000")
_EVERYBODY = b"\xff" * 6
_ONE_BUFFER_BYTES = packet.HEADER_BYTES + 14 + 1500
"""a frame of so much fits any buffer of a guest (virtio 1.2, 5.1.6.3)"""
_STRANGE = 64
"""frames between stop and mark that the card's filter may have kept from the guest"""


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
        self._sizes: deque[int] = deque(maxlen=KEPT_FRAMES // _SPACING)
        """of marks and spacers"""
        self._mark: bytes | None = None
        self._send_spacer()
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._tick)

    def stopped(self) -> None:
        """The guest has stopped: the mark goes in."""
        size = self._strange_size()
        self._mark = self._head() + os.urandom(_MARK_BYTES) + bytes(size - _ETHERNET_BYTES - _MARK_BYTES)
        self._put([self._mark])

    def resolve(self, received: Sequence[int]) -> tuple[Swallowed, list[bytes]]:
        """Once nobody else reads the tap: (what was swallowed, the frames after it up to the mark).

        ``received``: how much the newest buffers hold that the guest has got, oldest first.
        """
        if self._mark is None:
            return Swallowed([], []), []
        ahead: list[bytes] = []
        is_at_mark = is_swallowed = False
        while not (is_at_mark or is_swallowed) and len(ahead) < _AHEAD:
            frames = tap.read_frames(self._tap_fd, 1)
            is_at_mark, is_swallowed = frames == [self._mark], not frames
            ahead += [] if is_at_mark else frames
        self._look(_LAST_LOOKS)
        kept = list(self._kept)
        at_mark = self._at_mark(kept)
        if at_mark is None:
            return Swallowed([], []), ahead
        # If neither was met, the frames that wait may have gone in before the mark or behind it, and some not at all.
        first = at_mark + 1 if is_swallowed else at_mark - len(ahead) if is_at_mark else _place(ahead, kept)
        if not first or first < 0:  # it is not known, or nothing of what came before
            return Swallowed([], []), ahead
        last = first - 1
        purged = next((n for n in range(_PURGED + 1) if n <= last and self._is_last(kept[: last - n], received)), 0)
        thrown, queued = kept[max(0, last - purged) : last], kept[last : last + 1]
        return Swallowed(self._for_the_guest(thrown), self._for_the_guest(queued)), ahead

    def thrown(self, before: Sequence[int], after: Sequence[int], hidden: int) -> list[bytes] | None:
        """Once the guest runs here again: the frames that were thrown away; None: it has not got far enough yet.

        ``before``: how much the newest buffers held that it had got when it stopped; ``after``: the newest of those
        since, behind ``hidden`` others. In doubt nothing counts as thrown away: no frame is to be handed out twice.
        """
        if not after:
            return None
        self._look(_LAST_LOOKS)
        kept = list(self._kept)
        at_mark = self._at_mark(kept)
        if at_mark is None or not before:
            return []
        found = self._anchor(kept, at_mark, after)
        if found is None:
            return None
        behind, known = found
        firsts = self._firsts(kept[:behind], after[:known], hidden)
        for count in range(_PURGED + 1):
            for at in firsts:
                if count <= at and self._is_last(kept[: at - count], before):
                    return self._for_the_guest(kept[at - count : at])
        return []

    def _at_mark(self, kept: Sequence[bytes]) -> int | None:
        """Return where the mark is; it is among the newest, as a rule."""
        return next((at for at in reversed(range(len(kept))) if kept[at] == self._mark), None)

    def _anchor(self, kept: Sequence[bytes], at_mark: int, after: Sequence[int]) -> tuple[int, int] | None:
        """Return behind which frame of ours, the mark or a spacer after it, and behind which buffer that one is."""
        for at in range(at_mark, len(kept)):
            size = _RING_HEADER_BYTES + len(kept[at]) - packet.HEADER_BYTES
            if kept[at][packet.SENDER] == _US and after.count(size) == 1:
                return at + 1, after.index(size) + 1
        return None

    def _firsts(self, kept: Sequence[bytes], after: Sequence[int], hidden: int) -> list[int]:
        """Return which frame may be the first that the guest got after the stop, if the last of ``kept`` is the one
        in the last buffer."""
        if not hidden:
            newest = kept[-len(after) - _STRANGE :]
            beginnings = enumerate(self._beginnings(newest, after, exactly=True), 1)
            return [len(kept) - count for count, lefts in beginnings if 0 in lefts][::-1]
        # Of the hidden ones only the number is known: right if each is a frame, and no frame may have been stopped.
        at = len(kept) - hidden - len(after)
        if at < 0 or not all(self._fills_one_buffer(frame) for frame in kept[at:]):
            return []
        *_, lefts = self._beginnings(kept[at + hidden :], after, exactly=True)
        return [at] if 0 in lefts else []

    def _fills_one_buffer(self, frame: bytes) -> bool:
        receiver = frame[packet.RECEIVER]
        return len(frame) <= _ONE_BUFFER_BYTES and (receiver in self._own or receiver == _EVERYBODY)

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
        for lefts in self._beginnings(kept, received, exactly=False):
            if 0 in lefts:  # what is older than the ring may be as it likes
                break
        return bool(lefts)

    def _beginnings(self, frames: Sequence[bytes], received: Sequence[int], *, exactly: bool) -> Iterator[set[int]]:
        """Yield for each frame, from the last one on, where in ``received`` it may begin, if the last one ends it. With
        none any more it ends.

        ``exactly``: no frame begins before ``received``.
        """
        lefts = {len(received)}
        for frame in reversed(frames):
            wanted = _RING_HEADER_BYTES + len(frame) - packet.HEADER_BYTES
            before = lefts if frame[packet.RECEIVER] not in self._own else set()
            firsts = (_first_buffer(received, left, wanted, exactly=exactly) for left in lefts)
            lefts = {first for first in firsts if first is not None} | before
            yield lefts
            if not lefts:
                break

    def _for_the_guest(self, frames: Sequence[bytes]) -> list[bytes]:
        return [frame for frame in frames if frame[packet.SENDER] != _US]

    def _tick(self) -> None:
        self._look(_LOOKS)
        if self._since_spacer >= _SPACING:
            self._send_spacer()
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._tick)

    def _send_spacer(self) -> None:
        self._since_spacer = 0
        if self._own:
            self._put([self._head().ljust(packet.HEADER_BYTES + self._strange_size(), b"\0")])

    def _head(self) -> bytes:
        return packet.PLAIN + (self._own[0] if self._own else _NOBODY) + _US + _LOCAL_EXPERIMENTAL

    def _strange_size(self) -> int:
        """Return a length that no frame near has, and no other of ours that is remembered, of the Ethernet frame."""
        near = {len(frame) - packet.HEADER_BYTES for frame in islice(reversed(self._kept), _NEAR)}
        free = [size for size in _SPACER_BYTES if size not in near]
        size = random.choice([size for size in free if size not in self._sizes] or free)
        self._sizes.append(size)
        return size

    def _look(self, most: int) -> None:
        assert self._watching is not None
        for _ in range(most):
            try:
                frame = self._watching.recv(packet.LONGEST_BYTES)
            except OSError:  # nothing more, or the tap is gone and with it what to ask for
                return
            self._kept.append(frame)
            self._kept_bytes += _EACH_BYTES + len(frame)
            self._since_spacer += 1
            while self._kept_bytes > KEPT_BYTES or len(self._kept) > KEPT_FRAMES:
                self._kept_bytes -= _EACH_BYTES + len(self._kept.popleft())


def _place(waiting: Sequence[bytes], kept: Sequence[bytes]) -> int | None:
    """Return where in ``kept`` the frames begin that wait, the latest such place; its end for none; None: nowhere."""
    for some in (waiting, waiting[:_KNOWN_BY]):
        for at in range(len(kept) - len(some), -1, -1):
            if kept[at : at + len(some)] == some:
                return at
    return None


def _first_buffer(received: Sequence[int], left: int, wanted: int, *, exactly: bool) -> int | None:
    """Return where the buffers begin that end before ``left`` and hold ``wanted``; 0 also, unless ``exactly``: further
    back than is known."""
    while left > 0 and wanted > 0:
        left -= 1
        wanted -= received[left]
    return left if wanted == 0 or (left == 0 and wanted > 0 and not exactly) else None
