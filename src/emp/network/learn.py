"""Which addresses a guest uses, by what its tap shows: ARP, neighbour discovery, DHCP.

A guest that takes an address says so before it is of use to it: it probes for it (RFC 5227, RFC 4862), asks a DHCP
server for it (RFC 2131), announces it, or asks for a neighbour in its name. So the frames that the guest sends are
enough, and the kernel hands us those few and no others: at any rate of other traffic this costs nothing that can be
measured. What is learnt here is the guest's word and no more; who may use what is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address

from emp.host.packet import Instruction, open_capture

Heard = Callable[[str, str], None]
"""(MAC, IP), in canonical text form"""

BUFFER_BYTES = 1 << 16
BATCH, REST_S = 64, 0.1
"""after so many frames in one go none is looked at for so long: a guest that floods them must not hold the agent up"""

_ARP, _IPV4, _IPV6 = 0x0806, 0x0800, 0x86DD
_UDP, _ICMPV6 = 17, 58
_DHCP_SERVER = 67
_SOLICITATION, _ADVERTISEMENT = 135, 136
_COOKIE = b"\x63\x82\x53\x63"
_MESSAGE_TYPE, _REQUESTED_ADDRESS, _PAD, _END = 53, 50, 0, 255
_REQUEST = 3

_LOAD_HALF, _LOAD_BYTE = 0x28, 0x30
_LOAD_HEADER_SIZE, _LOAD_HALF_BEHIND = 0xB1, 0x48
_EQUAL, _ANY_BIT, _RETURN = 0x15, 0x45, 0x06

_ALL, _NONE = (_RETURN, 0, 0, 0x40000), (_RETURN, 0, 0, 0)
FILTER: tuple[Instruction, ...] = (
    (_LOAD_HALF, 0, 0, 12),  # EtherType
    (_EQUAL, 14, 0, _ARP),
    (_EQUAL, 0, 5, _IPV6),
    (_LOAD_BYTE, 0, 0, 20),  # next header
    (_EQUAL, 0, 12, _ICMPV6),
    (_LOAD_BYTE, 0, 0, 54),  # ICMPv6 type
    (_EQUAL, 9, 0, _SOLICITATION),
    (_EQUAL, 8, 9, _ADVERTISEMENT),
    (_EQUAL, 0, 8, _IPV4),
    (_LOAD_BYTE, 0, 0, 23),  # protocol
    (_EQUAL, 0, 6, _UDP),
    (_LOAD_HALF, 0, 0, 20),  # fragment offset
    (_ANY_BIT, 4, 0, 0x1FFF),
    (_LOAD_HEADER_SIZE, 0, 0, 14),
    (_LOAD_HALF_BEHIND, 0, 0, 16),  # UDP destination port
    (_EQUAL, 0, 1, _DHCP_SERVER),
    _ALL,
    _NONE,
)
"""classic BPF: all ARP, ICMPv6 solicitations and advertisements, what goes to a DHCP server"""


def sightings(frame: bytes) -> Iterator[tuple[str, str]]:
    """Yield the (MAC, IP) that a frame sent by the guest speaks for; nothing for what is malformed."""
    with contextlib.suppress(struct.error):
        mac, (kind,) = frame[6:12], struct.unpack_from("!H", frame, 12)
        found: Iterator[IPv4Address | IPv6Address]
        match kind:
            case 0x0806:
                found = _arp(frame[14:])
            case 0x86DD:
                found = _neighbour_discovery(frame[14:])
            case 0x0800:
                found = _dhcp(frame[14:])
            case _:
                return
        for address in found:
            if not (address.is_unspecified or address.is_multicast or address.is_loopback):
                yield mac.hex(":"), str(address)


def _arp(packet: bytes) -> Iterator[IPv4Address]:
    """The sender's address; in a probe, which has none yet, the one that is probed for (RFC 5227, 2.1.1)."""
    form = struct.unpack_from("!HHBB", packet)
    if form != (1, _IPV4, 6, 4) or len(packet) < 28:
        return
    sender, target = IPv4Address(packet[14:18]), IPv4Address(packet[24:28])
    yield target if sender.is_unspecified else sender


def _neighbour_discovery(packet: bytes) -> Iterator[IPv6Address]:
    source, target = packet[8:24], packet[48:64]
    if len(target) < 16 or packet[6] != _ICMPV6:
        return
    if packet[40] == _ADVERTISEMENT:
        yield IPv6Address(target)
    elif packet[40] == _SOLICITATION:  # without a source it looks for a duplicate of the target (RFC 4862, 5.4.2)
        yield IPv6Address(source if any(source) else target)


def _dhcp(packet: bytes) -> Iterator[IPv4Address]:
    """What a DHCPREQUEST asks for or goes on with (RFC 2131, 4.3.2)."""
    (first,) = struct.unpack_from("!B", packet)
    message = packet[4 * (first & 15) + 8 :]
    if len(message) < 240 or message[236:240] != _COOKIE:
        return
    options = dict(_options(message[240:]))
    if options.get(_MESSAGE_TYPE) != bytes([_REQUEST]):
        return
    asked = options.get(_REQUESTED_ADDRESS, message[12:16])
    if len(asked) == 4:
        yield IPv4Address(asked)


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 1 < len(data) and data[at] != _END:
        if data[at] == _PAD:
            at += 1
            continue
        yield data[at], data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]


class Listener:
    """Tells ``heard`` what the guest behind a tap speaks for, until it is closed."""

    def __init__(self, interface: str, heard: Heard) -> None:
        """Raise ``CommandFailed`` without such a tap. The network namespace is the caller's."""
        self._heard = heard
        self._socket: socket.socket | None = open_capture(interface, FILTER, buffer_bytes=BUFFER_BYTES)
        self._loop = asyncio.get_running_loop()
        self._listen()

    def _listen(self) -> None:
        if self._socket is not None:
            self._loop.add_reader(self._socket, self._read, self._socket)

    def _read(self, capture: socket.socket) -> None:
        for _ in range(BATCH):
            try:
                frame = capture.recv(2048)
            except BlockingIOError:
                return
            except OSError:  # ENETDOWN: the tap has gone, or is down for a moment
                break
            for mac, ip in sightings(frame):
                self._heard(mac, ip)
        self._loop.remove_reader(capture)
        self._loop.call_later(REST_S, self._listen)

    def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None
