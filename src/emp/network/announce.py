"""The frames by which a host tells its segment that an address is here now.

IPv4: ARP announcements (RFC 5227, 2.3), in both forms: the request form refreshes neighbours that already know the
address, and the reply form reaches those that only listen to replies. IPv6: the unsolicited neighbour advertisement
with the override flag (RFC 4861, 7.2.6). Every frame comes from the address's own MAC, so bridges and switches on the
way learn where it is. One lost broadcast would cost a neighbour's cache time-out, hence ``REPEATS_S``.

Multicast groups are the guest's to announce: ``membership_queries`` are for its side of the tap, and make it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address

REPEATS_S = (0.05, 0.15, 0.5, 1.0, 2.0)
"""after the first round, in seconds from it"""

_BROADCAST = b"\xff" * 6
_ALL_NODES_MAC = bytes.fromhex("333300000001")
_ALL_NODES = IPv6Address("ff02::1").packed
_ARP = 0x0806
_IPV6 = 0x86DD
_ICMPV6 = 58
_NEIGHBOUR_ADVERTISEMENT = 136
_OVERRIDE = 0x20000000
_TARGET_LINK_LAYER_ADDRESS = 2
_MIN_FRAME_BYTES = 60

_IPV4 = 0x0800
_IGMP = 2
_HOP_BY_HOP = 0
_ALL_HOSTS_MAC = bytes.fromhex("01005e000001")
_ALL_HOSTS = bytes([224, 0, 0, 1])
_MEMBERSHIP_QUERY, _LISTENER_QUERY = 0x11, 130
_ANSWER_WITHIN_MS = 100
_ROBUSTNESS, _QUERY_INTERVAL_S = 2, 125
"""the standards' defaults: a guest takes them for the querier's"""


def _ethernet(destination: bytes, source: bytes, ethertype: int, payload: bytes) -> bytes:
    return (destination + source + struct.pack("!H", ethertype) + payload).ljust(_MIN_FRAME_BYTES, b"\0")


def _arp(mac: bytes, ip: bytes, operation: int) -> bytes:
    target_mac = bytes(6) if operation == 1 else mac
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + mac + ip + target_mac + ip
    return _ethernet(_BROADCAST, mac, _ARP, body)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def _neighbour_advertisement(mac: bytes, ip: bytes) -> bytes:
    option = struct.pack("!BB", _TARGET_LINK_LAYER_ADDRESS, 1) + mac
    rest = struct.pack("!I", _OVERRIDE) + ip + option
    size = 4 + len(rest)
    pseudo_header = ip + _ALL_NODES + struct.pack("!II", size, _ICMPV6)
    checksum = _checksum(pseudo_header + struct.pack("!BBH", _NEIGHBOUR_ADVERTISEMENT, 0, 0) + rest)
    message = struct.pack("!BBH", _NEIGHBOUR_ADVERTISEMENT, 0, checksum) + rest
    header = struct.pack("!IHBB", 6 << 28, size, _ICMPV6, 255) + ip + _ALL_NODES
    return _ethernet(_ALL_NODES_MAC, mac, _IPV6, header + message)


def announcement(mac: str, ip: str) -> tuple[bytes, ...]:
    """Return the Ethernet frames that announce one address; both arguments in their canonical text form."""
    source = bytes.fromhex(mac.replace(":", ""))
    address = ip_address(ip)
    if address.version == 4:
        return _arp(source, address.packed, 1), _arp(source, address.packed, 2)
    return (_neighbour_advertisement(source, address.packed),)


def announcements(addresses: Iterable[tuple[str, str]]) -> tuple[bytes, ...]:
    """Return the frames of one round over (MAC, IP) pairs: each address's first frame before any address's second."""
    rounds = [announcement(mac, ip) for mac, ip in addresses]
    return tuple(frame for form in (0, 1) for frames in rounds for frame in frames[form : form + 1])


def membership_queries(mac: str) -> tuple[bytes, bytes]:
    """Return the frames that ask a host which multicast groups it is in, from ``mac``, to be answered in a moment.

    An IGMPv3 general query (RFC 3376, 4.1) from 0.0.0.0, as of a switch that is no querier (RFC 4541, 2.1.1), and an
    MLDv2 one (RFC 3810, 5.1), which hosts take from a link-local address alone.
    """
    source = bytes.fromhex(mac.replace(":", ""))
    return _igmp_query(source), _mld_query(source)


def _igmp_query(source: bytes) -> bytes:
    rest = bytes(4) + struct.pack("!BBH", _ROBUSTNESS, _QUERY_INTERVAL_S, 0)
    head = struct.pack("!BB", _MEMBERSHIP_QUERY, _ANSWER_WITHIN_MS // 100)
    query = head + struct.pack("!H", _checksum(head + bytes(2) + rest)) + rest
    router_alert = b"\x94\x04\0\0"
    fixed = struct.pack("!BBHHHBB", 0x46, 0xC0, 24 + len(query), 0, 0, 1, _IGMP)
    addresses = bytes(4) + _ALL_HOSTS + router_alert
    header = fixed + struct.pack("!H", _checksum(fixed + bytes(2) + addresses)) + addresses
    return _ethernet(_ALL_HOSTS_MAC, source, _IPV4, header + query)


def _mld_query(source: bytes) -> bytes:
    link_local = b"\xfe\x80" + bytes(6) + bytes([source[0] ^ 2]) + source[1:3] + b"\xff\xfe" + source[3:]
    rest = struct.pack("!HH", _ANSWER_WITHIN_MS, 0) + bytes(16) + struct.pack("!BBH", _ROBUSTNESS, _QUERY_INTERVAL_S, 0)
    size = 4 + len(rest)
    pseudo_header = link_local + _ALL_NODES + struct.pack("!II", size, _ICMPV6)
    head = struct.pack("!BB", _LISTENER_QUERY, 0)
    query = head + struct.pack("!H", _checksum(pseudo_header + head + bytes(2) + rest)) + rest
    router_alert = struct.pack("!BB", _ICMPV6, 0) + b"\x05\x02\0\0\x01\0"
    header = struct.pack("!IHBB", 6 << 28, len(router_alert) + size, _HOP_BY_HOP, 1) + link_local + _ALL_NODES
    return _ethernet(_ALL_NODES_MAC, source, _IPV6, header + router_alert + query)
