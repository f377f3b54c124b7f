"""The network: from which node, and when, frames with an EVM's own MACs or addresses come onto the lab's switch.

A packet socket on each node's port of the switch, with a filter for them and the kernel's time stamps. Frames that
a source forwards for its old guest carry the clients' MACs, so any frame here was sent in the EVM's name.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from emp.host import packet
from emp.lab.checkers.owners import Tenure
from emp.lab.checkers.witness import Witness
from emp.lab.kernel import in_network
from emp.lab.places import NAMESPACES
from emp.lab.topology import FABRIC, Topology

_ETH_P_ALL = 0x0003
_SOURCES = {4: (0x0800, 26), 16: (0x86DD, 22)}
"""bytes of an address -> EtherType, and where the source is (RFC 791, RFC 8200)"""
_SO_TIMESTAMPNS = 35
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_LOAD_WORD, _LOAD_HALF, _JUMP_EQUAL, _RETURN = 0x20, 0x28, 0x15, 0x06
_SNAP_BYTES = 64

SLACK_S = 0.02
"""between a record on disk and a frame on the wire two processes stand, on a machine with other work"""


@dataclass(frozen=True)
class Seen:
    """A frame in the EVM's name came from ``node`` (CLOCK_MONOTONIC)."""

    at_s: float
    node: str
    kind: int
    """EtherType"""


class FrameWitness(Witness):
    """``with FrameWitness(topology, macs) as witness: ...``; then ``violations(witness.seen, tenures)``.

    ``addresses``: the EVM's; where nodes route, its frames are on the wire with the node's MAC.
    """

    def __init__(self, topology: Topology, macs: Iterable[str], addresses: Iterable[str] = ()) -> None:
        super().__init__("frames")
        self.seen: list[Seen] = []
        self.dropped = 0
        """frames that came faster than we took them; known at the end"""
        self._macs = tuple(macs)
        self._addresses = [ip_address(address).packed for address in addresses]
        self._selector = selectors.DefaultSelector()
        in_network(str(NAMESPACES / topology.namespace(FABRIC)), lambda: self._open(topology))

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            statistics = key.fileobj.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)  # packet(7): packets, drops
            self.dropped += struct.unpack("II", statistics)[1]
            key.fileobj.close()
        self._selector.close()

    def _open(self, topology: Topology) -> None:
        for place in topology.node_places:
            port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            port.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            program = [*_from_addresses(self._addresses), *packet.sent_by(self._macs, most_bytes=_SNAP_BYTES)]
            packet.attach(port, program)
            port.bind((place.name, _ETH_P_ALL))
            self._selector.register(port, selectors.EVENT_READ, place.name)

    def watch(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(timeout=0.05):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    data, ancillary, _, address = key.fileobj.recvmsg(_SNAP_BYTES, 128)
                except (BlockingIOError, OSError):
                    continue  # ENETDOWN: the port is being taken down
                if address[2] != packet.OUTGOING:
                    self.seen.append(Seen(monotonic_s(ancillary), key.data, struct.unpack_from("!H", data, 12)[0]))


def violations(seen: Sequence[Seen], tenures: Sequence[Tenure], slack_s: float = SLACK_S) -> list[str]:
    """Return, per node, how often it spoke in the EVM's name while it did not own it."""
    wrong: dict[str, list[Seen]] = {}
    for frame in seen:
        mine = [tenure for tenure in tenures if tenure.node == frame.node]
        if not any(t.since_s - slack_s <= frame.at_s <= t.until_s + slack_s for t in mine):
            wrong.setdefault(frame.node, []).append(frame)
    return [
        f"{node} sent {len(frames)} frames in the EVM's name without owning it (EtherType {frames[0].kind:04x})"
        for node, frames in wrong.items()
    ]


def monotonic_s(ancillary: list[tuple[int, int, bytes]]) -> float:
    """Return when the kernel took the frame, on the clock on which fault points are reached."""
    now_s, behind_s = time.monotonic(), 0.0
    for _, kind, data in ancillary:
        if kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = struct.unpack("qq", data[:16])
            behind_s = time.time() - (seconds + nanoseconds / 1e9)
    return now_s - behind_s


def _from_addresses(addresses: Iterable[bytes]) -> packet.Program:
    """Begin a filter that lets packets from these addresses through."""
    lines: list[packet.Instruction] = []
    for address in addresses:
        kind, at = _SOURCES[len(address)]
        compared = [(_LOAD_HALF, 12, kind)]
        compared += [(_LOAD_WORD, at + n, int.from_bytes(address[n : n + 4], "big")) for n in range(0, len(address), 4)]
        for number, (load, where, wanted) in enumerate(compared):
            left = 2 * (len(compared) - number - 1)
            lines += [(load, 0, 0, where), (_JUMP_EQUAL, 0, left + 1, wanted)]
        lines.append((_RETURN, 0, 0, _SNAP_BYTES))
    return lines
