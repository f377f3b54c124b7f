"""What passes an EVM's tap on the target: when its first request was there, and when it sent first.

A packet socket in the node's network, on all interfaces, as the tap is made later; of UDP alone, as the agent and QEMU
announce the guest with ARP and RARP. Frames for the guest leave the host by its tap, also those that are put on it past
the bridge; they wait in its queue while the machine does not read.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from emp.host import packet
from emp.lab.checkers.frames import monotonic_s
from emp.lab.checkers.witness import Witness
from emp.lab.kernel import in_network
from emp.lab.places import NAMESPACES
from emp.lab.topology import Topology

_ETH_P_ALL = 0x0003
_SO_TIMESTAMPNS = 35
_IPV4, _UDP = 0x0800, 17
_LOAD_HALF, _LOAD_BYTE, _JUMP_EQUAL, _RETURN = 0x28, 0x30, 0x15, 0x06
_SNAP_BYTES = 64


@dataclass
class Passed:
    """When UDP frames for the guest, and those of its own, passed its tap (CLOCK_MONOTONIC)."""

    to_guest_s: list[float] = field(default_factory=list)
    from_guest_s: list[float] = field(default_factory=list)

    def emulator_ms(self, resumed_s: float) -> float | None:
        """Return how long a guest that runs, and has a request, took for its first frame; None if it sent none.

        ``resumed_s``: when its QEMU said RESUME.
        """
        own_s = [at_s for at_s in self.from_guest_s if at_s >= resumed_s]
        if not own_s or not self.to_guest_s:
            return None
        return max(0.0, min(own_s) - max(resumed_s, min(self.to_guest_s))) * 1000


class TapCapture(Witness):
    """``with TapCapture(topology, "n2", tap, "10.77.1.0") as capture: ...``, then ``capture.passed``."""

    def __init__(self, topology: Topology, node: str, tap: str, address: str) -> None:
        super().__init__("tap capture")
        self.passed = Passed()
        self._address = IPv4Address(address).packed
        self._tap = tap
        self._socket = in_network(str(NAMESPACES / topology.namespace(node)), self._open)

    def close(self) -> None:
        self._socket.close()

    @staticmethod
    def _open() -> socket.socket:
        mine = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        mine.settimeout(0.05)
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        mine.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        udp = [(_LOAD_HALF, 0, 0, 12), (_JUMP_EQUAL, 0, 3, _IPV4), (_LOAD_BYTE, 0, 0, 23), (_JUMP_EQUAL, 0, 1, _UDP)]
        packet.attach(mine, [*udp, (_RETURN, 0, 0, _SNAP_BYTES), (_RETURN, 0, 0, 0)])
        return mine

    def watch(self) -> None:
        while not self._stop.is_set():
            try:
                data, ancillary, _, address = self._socket.recvmsg(_SNAP_BYTES, 128)
            except TimeoutError:
                continue
            source, destination = data[26:30], data[30:34]  # RFC 791, behind 14 bytes of Ethernet
            if address[0] != self._tap:
                continue
            if address[2] == packet.OUTGOING and destination == self._address:
                self.passed.to_guest_s.append(monotonic_s(ancillary))
            elif address[2] != packet.OUTGOING and source == self._address:
                self.passed.from_guest_s.append(monotonic_s(ancillary))
