"""Hold and forward: what came for the EVM since its guest stopped reaches it on the target, in order and once.

::

    guest stops     GIVEN                the target runs            the network has moved
        |-- held ----->|-- forwarded: all ---->|-- forwarded: unicast ----->|-- over
        (in the tap)    (copies are kept)       (copies are dropped)

The target announces itself when what was held has arrived, or after ``ANNOUNCED_S``: what then comes directly would
overtake it.

Until the commit nothing is taken out of the tap, so an abort needs nothing put back. The two agents have a connection
of their own for the frames (``emp.agent.tunnel``), opened before HANDOVER: an order never waits behind them. What the
target or the connection does not take at once stays in the source's tap, whose queue is bounded, and counts drops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from emp.agent.tunnel import DialFrames, Tunnel
from emp.host import packet
from emp.hypervisor.base import Machine, Received
from emp.model.errors import EmpError
from emp.network.base import Port

log = logging.getLogger(__name__)

_BATCH = 64
"""frames in one turn of the event loop"""
_GATHERED_S = 0.001
"""frames that follow each other so closely go together: 10,000 messages a second would take both agents a processor"""
ANNOUNCED_S = 0.2
"""the target waits so long at most for what was held, while the connection to the source is there"""
_AT_ONCE = 512
"""frames that were held and are sent before anything else happens; some 5 ms"""
_COPIES_BYTES = 16 << 20
"""of memory, for frames that the target may still send back; what is beyond waits in the tap until it runs"""
_LOCAL_S = 1.0
"""after the network has moved, frames can only come from EVMs of this very node, and those need not fall silent"""
_SETTLE_S = 0.01
_LAST_S, _LAST_MOST_S = 0.2, 5.0
"""for the word that the last frames have been taken: at least, however long the network has taken to move, and at most,
however much longer it might have taken"""
_LOOK_S = 0.05
_LOOKED_S = 0.05
"""for a machine to say what its guest had received when it stopped"""
_BACK_S = 1.0
"""until a guest that runs again has got the mark"""
_MODULUS = 1 << 16


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
        self._tunnel = Tunnel(name, dial)
        self._quiet_s = quiet_s
        self._most_s = most_s
        self._tasks: list[asyncio.Task[None]] = []
        self._watches = False
        self._runs = asyncio.Event()
        self._behind = set(range(len(ports)))
        """ports whose queue has not been empty since the commit"""
        self._has_caught_up = False
        self._received: list[asyncio.Task[Received | None] | None] = [None for _ in ports]
        self._got_before: list[asyncio.Task[Received | None]] = []
        """per port, what the guest had received when it stopped"""
        self._goes_back = False
        self._giving_back: asyncio.Task[None] | None = None
        self._copies: list[list[bytes]] = [[] for _ in ports]
        self._copied_bytes = 0
        self._frame_at_s = 0.0
        self._overflowed = [0 for _ in ports]
        """frames that the taps had dropped when the guest stopped"""
        self._dropped = [0 for _ in ports]
        self.held = 0
        """frames that came before the target ran"""

    @property
    def forwarded(self) -> int:
        """Frames that the target has taken."""
        return self._tunnel.forwarded

    @property
    def lost(self) -> int:
        """Frames since the guest's stop without room in a queue, here or there, or that the target has not taken."""
        return self._tunnel.lost + sum(self._dropped)

    async def connect(self) -> None:
        """Open the connection. Raises as the dialling does."""
        await self._tunnel.connect()

    def watch(self) -> None:
        """Pre-copy begins."""
        for port, macs in zip(self._ports, self._macs, strict=True):
            try:
                port.watch(macs)
            except EmpError as error:
                log.error("%s: %s: frames may be lost in the handover: %s", self._name, port.interface, error)
        self._watches = True

    def stopped(self, machine: Machine) -> None:
        """The guest has stopped."""
        for port in self._ports:
            port.stopped()
        # Asked before the hypervisor is told to go on or back: a later answer might be of a guest that runs again.
        if not self._goes_back:
            looking = (self._look(machine, nic, sizes=False) for nic in range(len(self._ports)))
            self._got_before = [asyncio.create_task(look, name=f"frames of {self._name}") for look in looking]
        self._overflowed = [_overflowed(port) for port in self._ports]

    def completed(self, machine: Machine) -> None:
        """Everything is with the target: see what the guest had received to the last. QEMU answers nothing before."""
        for nic in range(len(self._ports)):
            looking = asyncio.create_task(self._look(machine, nic), name=f"last frames of {self._name}")
            self._received[nic] = looking

    async def _look(self, machine: Machine, nic: int, *, sizes: bool = True) -> Received | None:
        try:
            return await machine.received(nic, sizes=sizes)
        except EmpError as error:
            log.warning("%s: a frame may be lost that came as the guest stopped: %s", self._name, error)
            return None

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
            is_known = received is None or received.done()
            if is_known:
                self._send_held(nic, port, received.result() if received is not None else None)
            self._tasks.append(asyncio.create_task(self._carry(nic, port, is_known), name=f"frames of {self._name}"))

    def _send_held(self, nic: int, port: Port, received: Received | None) -> None:
        swallowed = port.swallowed(received.sizes if received is not None else ())
        held = swallowed.thrown + swallowed.queued
        self.held += len(held)
        self._copies[nic] += swallowed.thrown  # what is queued the machine gives to its guest itself
        with contextlib.suppress(OSError):  # the task says it
            held += self._for_the_target(nic, port.pull(_AT_ONCE), _AT_ONCE)
        self._tunnel.send(nic, held)
        self._say_if_caught_up()

    def _for_the_target(self, nic: int, pulled: Sequence[bytes], most: int) -> list[bytes]:
        """Return what of the frames goes there. ``most``: so many were asked for."""
        own = self._own[nic]
        if len(pulled) < most:
            self._behind.discard(nic)
        # The target's announcements come by here too. The guest must not see them: a bridge in it would take its pods
        # for being outside.
        frames = [frame for frame in pulled if frame[packet.SENDER] not in own]
        if self._runs.is_set():  # broadcast and multicast reach the target by themselves by now
            return [frame for frame in frames if frame[packet.RECEIVER] in own]
        self.held += len(frames)
        self._copies[nic] += frames
        self._copied_bytes += sum(map(sys.getsizeof, frames))
        return frames

    def _say_if_caught_up(self) -> None:
        """Once what was held on every port has been sent."""
        if not self._behind and not self._has_caught_up:
            self._has_caught_up = True
            self._tunnel.say_caught_up()

    async def _carry(self, nic: int, port: Port, is_held_sent: bool) -> None:
        received = self._received[nic]
        if not is_held_sent and received is not None:
            await asyncio.wait({received}, timeout=_LOOK_S)
            self._send_held(nic, port, received.result() if received.done() else None)
        pulled: list[bytes] = []
        while True:
            # A flood must not take the event loop from the migration.
            await asyncio.sleep(_GATHERED_S if 0 < len(pulled) < _BATCH else 0)
            await self._tunnel.writable()
            if self._copied_bytes > _COPIES_BYTES:
                await self._runs.wait()
            try:
                await port.filled()
                pulled = port.pull(_BATCH)
            except OSError as error:
                log.warning("%s: %s is gone, frames for it are lost: %s", self._name, port.interface, error)
                return
            if frames := self._for_the_target(nic, pulled, _BATCH):
                self._frame_at_s = asyncio.get_running_loop().time()
                self._tunnel.send(nic, frames)
            self._say_if_caught_up()

    async def until_moved(self) -> None:
        """The target runs: go on until nothing comes here any more, or the policy's time is up."""
        if not self._tasks:
            return
        self._runs.set()
        self._copies, self._copied_bytes = [[] for _ in self._ports], 0
        until_s = asyncio.get_running_loop().time() + self._most_s
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
        self._count_drops()
        left_s = until_s - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(max(_LAST_S, left_s), _LAST_MOST_S)):
                await self.all_taken()
        except TimeoutError:
            log.warning("%s: the target has not taken %d frames for it", self._name, self._tunnel.lost)
        await self.close()

    def _count_drops(self) -> None:
        now = [_overflowed(port) for port in self._ports]
        self._dropped = [max(0, after - before) for before, after in zip(self._overflowed, now, strict=True)]

    async def _quiet(self, span_s: float) -> None:
        began_s = asyncio.get_running_loop().time()
        while (left_s := max(began_s, self._frame_at_s) + span_s - asyncio.get_running_loop().time()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left_s)  # a frame has come meanwhile, or none: then it is over

    async def all_taken(self) -> None:
        """Return when the target has taken everything that was sent."""
        await self._tunnel.emptied()

    async def looked(self) -> None:
        """Return when it is known what the guest had received when it stopped, if it has, or soon without that.

        To be awaited before the guest runs here again: later it cannot be known any more.
        """
        if self._got_before:
            await asyncio.wait(self._got_before, timeout=_LOOKED_S)

    def goes_back(self, machine: Machine) -> None:
        """Before the commit, and perhaps before the guest runs here again: look out for that, as it soon gets more than
        is remembered of it. It then gets what the machine has thrown away (``settled``). Idempotent."""
        if self._goes_back or self._tasks:
            return
        self._goes_back = True
        before = [looked.result() if looked.done() else None for looked in self._got_before]
        if before:
            giving = self._give_back(machine, before)
            self._giving_back = asyncio.create_task(giving, name=f"frames of {self._name} back")

    async def put_back(self, machine: Machine) -> None:
        """The guest is to run here again: it gets what was held, in order."""
        copies, self._copies = self._copies, [[] for _ in self._ports]
        self._count_drops()
        await self._tunnel.abort()  # the guest stands still: no goodbye is waited for
        await self._stop(*self._tasks, *self._received)
        for port, frames in zip(self._ports, copies, strict=True):
            port.put(frames)
        self.goes_back(machine)
        if self._giving_back is None:
            self._forget()

    async def settled(self) -> None:
        """Return when the guest that runs here again has got everything that can be given to it."""
        if self._giving_back is not None:
            await asyncio.wait({self._giving_back})

    async def _give_back(self, machine: Machine, before: Sequence[Received | None]) -> None:
        try:
            async with asyncio.timeout(_BACK_S):
                for nic, (port, got) in enumerate(zip(self._ports, before, strict=True)):
                    if got is None:
                        continue
                    port.put(await _thrown(port, machine, nic, got.buffers))
        except (EmpError, TimeoutError) as error:
            log.warning("%s: a frame may be lost that came as the guest stopped: %s", self._name, error)
        finally:
            self._forget()

    def _forget(self) -> None:
        for port in self._ports:
            port.forget()

    async def close(self) -> None:
        """Forward no more. Idempotent."""
        await self._stop(*self._tasks, *self._received, *self._got_before, self._giving_back)
        await self._tunnel.close()

    async def _stop(self, *maybe: asyncio.Task[Any] | None) -> None:
        tasks = [task for task in maybe if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _thrown(port: Port, machine: Machine, nic: int, buffers_before: int) -> list[bytes]:
    """Look until it is known what the machine threw away."""
    before: Sequence[int] = ()
    while True:
        received = await machine.received(nic, again=True)
        if not received.sizes:
            return []
        since = (received.buffers - buffers_before) % _MODULUS
        known = min(since, len(received.sizes))
        first = len(received.sizes) - known
        if since == known:  # else so much has come since the last look that nothing of before is left
            before = received.sizes[:first] or before
        thrown = port.thrown(before, received.sizes[first:], since - known)
        if thrown is not None:
            return thrown
        await asyncio.sleep(0)  # the guest tells nobody what it receives


def _overflowed(port: Port) -> int:
    try:
        return port.overflowed
    except EmpError:
        return 0  # it is gone, and its counter with it
