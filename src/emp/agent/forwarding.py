"""Hold and forward: what came for the EVM since its guest stopped reaches it on the target, in order and once.

::

    guest stops     GIVEN                the target runs            the network has moved
        |-- held ----->|-- forwarded: all ---->|-- forwarded: unicast ----->|-- over
        (in the tap)    (copies are kept)       (copies are dropped)

The target announces itself when what was held has arrived, or after ``ANNOUNCED_S``: what then comes directly would
overtake it.

Until the commit nothing is taken out of the tap, so an abort needs nothing put back. The two agents have a connection
of their own for the frames, opened before HANDOVER: an order never waits behind them. What the target or the connection
does not take at once stays in the source's tap, whose queue is bounded and counts what it drops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence

from emp.host import packet
from emp.hypervisor.base import Machine
from emp.model.errors import EmpError
from emp.network.base import Port
from emp.wire.link import Link

log = logging.getLogger(__name__)

_BATCH = 64
"""frames in one turn of the event loop"""
ANNOUNCED_S = 0.2
"""the target waits so long at most for what was held, while the connection to the source is there"""
CAUGHT_UP = b""
"""the message that says: what was held has been sent"""
_AT_ONCE = 512
"""frames that were held and are sent before anything else happens; some 5 ms"""
_CHUNK_BYTES = 256 << 10
_COPIES_BYTES = 16 << 20
"""of frames that the target may still send back; what is beyond waits in the tap until it runs"""
_LOCAL_S = 1.0
"""after the network has moved, frames can only come from EVMs of this very node, and those need not fall silent"""
_REDIAL_S = 0.2
_SETTLE_S = 0.01
_LOOK_S = 0.05
_FRAME = struct.Struct("!BI")
"""number of the card, length of the frame that follows"""

DialFrames = Callable[[], Awaitable[Link]]


def pack(nic: int, frames: Sequence[bytes]) -> Iterator[bytes]:
    """Yield the messages that carry the frames, each of 256 KiB or one frame."""
    parts: list[bytes] = []
    size = 0
    for frame in frames:
        if parts and size + len(frame) > _CHUNK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
        parts += (_FRAME.pack(nic, len(frame)), frame)
        size += _FRAME.size + len(frame)
    if parts:
        yield b"".join(parts)


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


class Forwarder:
    """The source's side, for one migration."""

    def __init__(
        self,
        name: str,
        ports: Sequence[Port],
        macs: Sequence[Sequence[str]],
        dial: DialFrames,
        *,
        quiet_s: float,
        most_s: float,
    ) -> None:
        """``macs``: per port, those behind it. ``quiet_s``, ``most_s``: as ``Policy``'s ``forward_...``."""
        self._name = name
        self._ports = ports
        self._macs = macs
        self._own = [{bytes.fromhex(mac.replace(":", "")) for mac in behind} for behind in macs]
        self._dial = dial
        self._quiet_s = quiet_s
        self._most_s = most_s
        self._link: Link | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._watches = False
        self._runs = asyncio.Event()
        self._behind = set(range(len(ports)))
        """ports whose queue has not been empty since the commit"""
        self._has_caught_up = False
        self._received: list[asyncio.Task[list[int]] | None] = [None for _ in ports]
        self._copies: list[list[bytes]] = [[] for _ in ports]
        self._copied_bytes = 0
        self._frame_at_s = 0.0
        self.held = 0
        """frames that came before the target ran"""
        self.forwarded = 0

    async def connect(self) -> None:
        """Open the connection. Raises as the dialling does."""
        self._link = await self._dial()

    def watch(self) -> None:
        """Pre-copy begins."""
        for port, macs in zip(self._ports, self._macs, strict=True):
            try:
                port.watch(macs)
            except EmpError as error:
                log.error("%s: %s: frames may be lost in the handover: %s", self._name, port.interface, error)
        self._watches = True

    def stopped(self) -> None:
        """The guest has stopped."""
        for port in self._ports:
            port.stopped()

    def completed(self, machine: Machine) -> None:
        """Everything is with the target: see what the guest had received to the last. QEMU answers nothing before."""
        for nic in range(len(self._ports)):
            looking = asyncio.create_task(self._look(machine, nic), name=f"last frames of {self._name}")
            self._received[nic] = looking

    async def _look(self, machine: Machine, nic: int) -> list[int]:
        try:
            return await machine.received_bytes(nic)
        except EmpError as error:
            log.warning("%s: a frame may be lost that came as the guest stopped: %s", self._name, error)
            return []

    def begin(self) -> None:
        """GIVEN is on disk: from now on frames go to the target. Idempotent.

        What was held is sent before this returns, so that it is there before the target announces itself and frames
        take the short way.
        """
        if self._tasks:
            return
        if not self._watches:  # the agent was restarted
            self.watch()
        self._frame_at_s = asyncio.get_running_loop().time()
        for nic, port in enumerate(self._ports):
            received = self._received[nic]
            known = received.result() if received is not None and received.done() else None
            waiting = self._take_held(nic, port, known) if known is not None or received is None else None
            self._tasks.append(asyncio.create_task(self._carry(nic, port, waiting), name=f"frames of {self._name}"))

    def _take_held(self, nic: int, port: Port, received: Sequence[int] | None) -> list[bytes]:
        """Send what was held; return what could not be sent."""
        held = port.swallowed(received or ())
        self.held += len(held)
        with contextlib.suppress(OSError):  # the task says it
            held += self._pulled(nic, port, _AT_ONCE)
        if self._link is None or not self._send_at_once(self._link, nic, held):
            return held
        self._say_if_caught_up()
        return []

    def _pulled(self, nic: int, port: Port, most: int) -> list[bytes]:
        """Take what there is for the target, up to ``most`` frames."""
        own = self._own[nic]
        pulled = port.pull(most)
        if len(pulled) < most:
            self._behind.discard(nic)
        # The target's announcements come by here too. The guest must not see them: a bridge in it would take its pods
        # for being outside.
        frames = [frame for frame in pulled if frame[packet.SENDER] not in own]
        if self._runs.is_set():  # broadcast and multicast reach the target by themselves by now
            return [frame for frame in frames if frame[packet.RECEIVER] in own]
        self.held += len(frames)
        self._copies[nic] += frames
        self._copied_bytes += sum(map(len, frames))
        return frames

    def _send_at_once(self, link: Link, nic: int, frames: list[bytes]) -> bool:
        """Send without waiting, unless the connection is gone."""
        try:
            for message in pack(nic, frames):
                link.send_data(message)
        except EmpError:
            return False
        self.forwarded += len(frames)
        return True

    def _say_if_caught_up(self) -> None:
        """Once what was held on every port has been sent."""
        if not self._behind and not self._has_caught_up and self._link is not None:
            self._has_caught_up = True
            with contextlib.suppress(EmpError):  # the target waits for it in vain, for a moment
                self._link.send_data(CAUGHT_UP)

    async def _carry(self, nic: int, port: Port, waiting: list[bytes] | None) -> None:
        received = self._received[nic]
        if waiting is None and received is not None:
            await asyncio.wait({received}, timeout=_LOOK_S)
            waiting = self._take_held(nic, port, received.result() if received.done() else None)
        frames = waiting or []
        while True:
            if frames:
                self._frame_at_s = asyncio.get_running_loop().time()
                await self._send(nic, frames)
            self._say_if_caught_up()
            await asyncio.sleep(0)  # a flood must not take the event loop from the migration
            if self._copied_bytes > _COPIES_BYTES:
                await self._runs.wait()
            try:
                await port.filled()
                frames = self._pulled(nic, port, _BATCH)
            except OSError as error:
                log.warning("%s: %s is gone, frames for it are lost: %s", self._name, port.interface, error)
                return

    async def _send(self, nic: int, frames: Sequence[bytes]) -> None:
        for message in pack(nic, frames):
            while True:
                try:
                    link = self._link = self._link or await self._dial()
                    if not link.send_data(message):
                        await link.writable()
                    break
                except EmpError as error:
                    log.info("%s: frames wait for a connection to the target: %s", self._name, error)
                    self._link = None
                    await asyncio.sleep(_REDIAL_S)
        self.forwarded += len(frames)

    async def until_moved(self) -> None:
        """The target runs: go on until nothing comes here any more, or the policy's time is up."""
        if not self._tasks:
            return
        self._runs.set()
        self._copies, self._copied_bytes = [[] for _ in self._ports], 0
        try:
            async with asyncio.timeout(self._most_s):
                await asyncio.gather(*(port.moved() for port in self._ports))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOCAL_S):
                        await self._quiet(self._quiet_s)
        except TimeoutError:
            log.warning("%s: the network has not shown within %g s that it moved", self._name, self._most_s)
        except OSError as error:
            log.warning("%s: whether the network has moved cannot be seen: %s", self._name, error)
        for port in self._ports:
            try:
                port.release()
            except EmpError as error:  # it is removed next
                log.warning("%s: %s is not closed: %s", self._name, port.interface, error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOCAL_S):
                await self._quiet(_SETTLE_S)
        await self.close()

    async def _quiet(self, span_s: float) -> None:
        began_s = asyncio.get_running_loop().time()
        while (left_s := max(began_s, self._frame_at_s) + span_s - asyncio.get_running_loop().time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)  # a frame has come meanwhile, or none: then it is over

    async def put_back(self) -> None:
        """The guest is to run here again: it gets what was held, in order."""
        copies, self._copies = self._copies, [[] for _ in self._ports]
        if self._link is not None:  # the guest stands still: no goodbye is waited for
            self._link.abort()
            self._link = None
        await self.close()
        for port, frames in zip(self._ports, copies, strict=True):
            port.put(frames)
            port.forget()

    async def close(self) -> None:
        """Forward no more. Idempotent."""
        tasks = [*self._tasks, *filter(None, self._received)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._link is not None:
            await self._link.close()
            self._link = None


class Arrivals:
    """The target's side: frames from one connection go into the ports' queues, where the machine finds them."""

    def __init__(self, name: str, ports: Sequence[Port]) -> None:
        self._name = name
        self._ports = ports
        self._lost = 0
        self.caught_up = asyncio.Event()
        """what the source held has arrived"""

    async def take(self, link: Link) -> None:
        """Until the connection ends."""
        link.on_data = self._put
        try:
            async for _ in link:
                pass
        finally:
            self.caught_up.set()
            for port in self._ports:
                port.settle()
            if self._lost:
                log.warning("%s: %d forwarded frames found no room in their queue", self._name, self._lost)

    def _put(self, message: bytes) -> None:
        if message == CAUGHT_UP:
            self.caught_up.set()
        for nic, frame in unpack(message):
            if nic < len(self._ports):
                self._lost += 1 - self._ports[nic].put([frame])
