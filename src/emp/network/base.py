"""What a node's agent needs of a network driver.

A ``Port`` is one NIC of one EVM on this node: a tap whose descriptor the agent shares with the machine, and its place
in the node's network. **A port is made blocked**: nothing that the machine sends leaves the node until ``open`` (QEMU
announces the guest's MAC by itself when a migration has loaded, even while it is paused). A guest speaks from its EVM's
MACs and as the addresses that it is allowed; what else it sends is dropped and counted (``emp.network.guard``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from emp.model.evm import EvmSpec
from emp.model.network import Traffic


@dataclass(frozen=True)
class Swallowed:
    """What a machine took as its guest stopped and did not give to it, in order."""

    thrown: list[bytes]
    """gone"""
    queued: list[bytes]
    """in the machine: the guest gets it if it runs here again"""


class Port(Protocol):
    """One NIC of one EVM on this node."""

    @property
    def interface(self) -> str: ...
    @property
    def tap_fd(self) -> int:
        """The agent's own copy of the tap's descriptor; valid until ``close`` or ``remove``."""
        ...

    async def open(self) -> None:
        """Let frames pass in both directions. Fast: it is called inside the blackout. Idempotent."""
        ...

    async def block(self) -> None:
        """Let nothing pass. Idempotent."""
        ...

    async def announce(self, addresses: Sequence[tuple[str, str]]) -> None:
        """Tell the segment that these (MAC, IP) are here now: gratuitous ARP / unsolicited NA, at once, then repeated
        in the background a few times (RFC 5227, RFC 4861 7.2.6). Have the guest report its multicast groups. Returns
        after the first round."""
        ...

    async def allow(self, addresses: Collection[str]) -> None:
        """Let the guest speak as these addresses and no others; a new port allows those that its EVM declares, an
        adopted one what it did. Takes a process, so not for the blackout. Raise ``HostError``: then as before."""
        ...

    def listen(self, heard: Callable[[str, str], None]) -> None:
        """Call ``heard`` with each (MAC, IP) that the guest is seen to speak for, allowed or not, until ``close`` or
        ``remove``; never where only declared addresses can be reached. Raise ``HostError`` where the tap is gone."""
        ...

    @property
    def mtu_bytes(self) -> int:
        """Raise ``HostError`` where the port is gone."""
        ...

    def traffic(self) -> Traffic:
        """Return what was counted since the port was made. Raise ``HostError`` where it is gone."""
        ...

    @property
    def overflowed(self) -> int:
        """Frames for the machine, since the port was made, that found its queue full. Raise ``HostError`` where it is
        gone."""
        ...

    # The source, from pre-copy until the network has moved. A *frame* is as ``emp.host.packet`` has it.

    def watch(self, macs: Sequence[str]) -> None:
        """Pre-copy begins: remember what goes to the machine, and let frames for these MACs come here from now on even
        when they show elsewhere. Raise ``HostError``."""
        ...

    def stopped(self) -> None:
        """The guest has stopped: what comes waits here for ``pull``, or for the guest if it runs here again. Nothing is
        announced from here any more."""
        ...

    def swallowed(self, received: Sequence[int]) -> Swallowed:
        """Behind the commit, once, before ``pull``: the frames that the machine took as its guest stopped, and did not
        give to it. ``received``: how much the newest buffers hold that the guest has got, oldest first."""
        ...

    def thrown(self, before: Sequence[int], after: Sequence[int], hidden: int) -> list[bytes] | None:
        """Once the guest runs here again, before ``forget``: the frames that the machine threw away as its guest
        stopped; None: ask again, it has not come so far. How much the newest buffers held: ``before`` the stop, and
        ``after`` it, behind ``hidden`` others."""
        ...

    def pull(self, most: int) -> list[bytes]:
        """Behind the commit: take up to ``most`` frames from the machine. Raise ``OSError`` when the port is gone."""
        ...

    async def filled(self) -> None:
        """Return when there is something to ``pull``."""
        ...

    def forget(self) -> None:
        """Undo ``watch``; what was held goes to the machine. Idempotent."""
        ...

    @property
    def is_told(self) -> bool:
        """Whether nothing here shows that the network has moved, and ``readdressed`` tells."""
        ...

    def readdressed(self) -> None:
        """The network has moved, by the word of who has moved it. Idempotent; nothing where it is seen from here."""
        ...

    async def moved(self) -> None:
        """Return when the network shows that the MACs are elsewhere, as far as can be seen from here, or told."""
        ...

    def release(self) -> None:
        """Nothing comes here any more: the EVM is elsewhere. Idempotent."""
        ...

    # The target, and the source when a committed migration comes back.

    def expect(self) -> None:
        """Before ``open``: note what broadcast and multicast arrives by itself, so that ``put`` doubles none of it."""
        ...

    def settle(self) -> None:
        """Nothing more is ``put``: undo ``expect``. Idempotent."""
        ...

    def put(self, frames: Sequence[bytes]) -> int:
        """Queue frames for the machine, as if they had come from the network; return how many were taken."""
        ...

    async def remove(self) -> None:
        """Take the port away: tap, rules, everything. Idempotent."""
        ...

    async def close(self) -> None:
        """Let go of the descriptor without touching the port (the agent stops; the EVM goes on)."""
        ...


class NetworkDriver(Protocol):
    """Makes ports on one node."""

    async def start(self) -> None:
        """Make or check the node's bridge and uplink; raise ``HostError`` with what is missing."""
        ...

    @property
    def mtu_bytes(self) -> int:
        """What the way between a port and the wire takes now. Raise ``HostError`` where a part of it is gone."""
        ...

    @property
    def is_overlay(self) -> bool:
        """Whether the driver must be told where other nodes' EVMs are (``place``)."""
        ...

    @property
    def no_ipv6(self) -> str | None:
        """Why an EVM with IPv6 addresses cannot be here now, and what to do; None: it can."""
        ...

    async def place(self, macs: Mapping[str, str]) -> None:
        """Take which other node has which MAC, of all EVMs of the pool. Raise ``HostError``."""
        ...

    async def plug(self, spec: EvmSpec) -> tuple[Port, ...]:
        """Make one blocked port per NIC, replacing leftovers of the same EVM."""
        ...

    async def adopt(self, spec: EvmSpec, tap_fds: Sequence[int]) -> tuple[Port, ...]:
        """Take back the ports of a running machine, as they are; the copies in ``tap_fds`` pass to the driver."""
        ...

    async def leftovers(self) -> frozenset[str]:
        """Names of EVMs that have ports on this node."""
        ...

    async def remove(self, evm: str) -> None:
        """Remove every port of the EVM, whoever made it. Idempotent."""
        ...

    async def close(self) -> None:
        """Let go of what the driver itself holds (the agent stops); ports stay."""
        ...
