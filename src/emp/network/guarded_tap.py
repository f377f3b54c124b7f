"""What stands between a guest and the wire at its tap, whatever the driver: rules, learning, counting."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable

from emp.host.link_stats import link_stats
from emp.model.errors import HostError
from emp.model.network import Traffic
from emp.network import guard
from emp.network.announce import membership_queries
from emp.network.guard import Guard
from emp.network.learn import Heard, Listener


class GuardedTap:
    def __init__(self, interface: str, index: int, macs: Iterable[str], *, routed: bool = False) -> None:
        """``macs``: every one that the EVM and its pods have; ``routed``: the node routes IPv6 to the tap. The rules
        that the tap may have are left as they are."""
        self._interface = interface
        self._index = index
        self._guard = Guard(interface, macs, routed=routed)
        self._listener: Listener | None = None

    async def allow(self, addresses: Iterable[str]) -> None:
        """See ``emp.network.base.Port``."""
        await self._guard.allow(addresses)

    def listen(self, heard: Heard) -> None:
        """See ``emp.network.base.Port``."""
        self.close()
        self._listener = Listener(self._interface, heard)

    def traffic(self) -> Traffic:
        """See ``emp.network.base.Port``."""
        seen = link_stats(self._index)
        spoofed = 0
        with contextlib.suppress(HostError):  # its rules are gone: the next ``allow`` makes them again
            spoofed = self._guard.spoofed
        return Traffic(
            received_frames=seen.tx_packets,
            received_bytes=seen.tx_bytes,
            sent_frames=seen.rx_packets - spoofed,
            sent_bytes=seen.rx_bytes,
            dropped_frames=seen.tx_dropped,
            spoofed_frames=spoofed,
        )

    def ask_for_groups(self) -> None:
        """Have the guest report its multicast groups, so that whoever snoops on the way learns its port. Raise
        ``OSError``."""
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as node:
            node.bind((self._interface, 0))
            for query in membership_queries(node.getsockname()[4].hex(":")):
                node.send(query)

    def close(self) -> None:
        """Stop listening; the rules stay. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    async def remove(self) -> None:
        """Take the rules away too, once the tap is gone: those of a later one of that name stay. Idempotent."""
        self.close()
        if not _exists(self._interface):
            await guard.remove(self._interface)


def _exists(interface: str) -> bool:
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True
