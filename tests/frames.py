"""Frames as a guest or a client sends them, for tests: from the RFCs, not from the code that is tested."""

from __future__ import annotations

import struct
from ipaddress import ip_address

from tests.segment import mac_bytes

BROADCAST = "ff:ff:ff:ff:ff:ff"


def ethernet(source: str, destination: str, kind: int, payload: bytes) -> bytes:
    return (mac_bytes(destination) + mac_bytes(source) + struct.pack("!H", kind) + payload).ljust(60, b"\0")


def arp(source: str, sender: str, target: str, *, operation: int = 1, sender_mac: str | None = None) -> bytes:
    """RFC 826; ``source`` is the Ethernet header's MAC, ``sender_mac`` the one in the packet."""
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + mac_bytes(sender_mac or source)
    return ethernet(source, BROADCAST, 0x0806, body + ip_address(sender).packed + bytes(6) + ip_address(target).packed)


def icmpv6(mac: str, source: str, destination: str, kind: int, rest: bytes) -> bytes:
    """RFC 8200 and 4443, with a checksum of 0: it is the receiver's business."""
    message = struct.pack("!BBH", kind, 0, 0) + rest
    header = struct.pack("!IHBB", 6 << 28, len(message), 58, 255)
    packed = ip_address(source).packed + ip_address(destination).packed
    return ethernet(mac, "33:33:00:00:00:01", 0x86DD, header + packed + message)


def solicitation(mac: str, source: str, target: str) -> bytes:
    return icmpv6(mac, source, "ff02::1:ff00:1", 135, bytes(4) + ip_address(target).packed)


def advertisement(mac: str, source: str, target: str) -> bytes:
    option = b"\x02\x01" + mac_bytes(mac)
    return icmpv6(mac, source, "ff02::1", 136, b"\x20\0\0\0" + ip_address(target).packed + option)


def router_advertisement(mac: str, source: str) -> bytes:
    return icmpv6(mac, source, "ff02::1", 134, bytes(12))


def udp(mac: str, source: str, destination: str, port: int, payload: bytes = bytes(32), *, fragment: int = 0) -> bytes:
    """RFC 768 and 791, long enough not to be padded: a bridge with netfilter takes padding away."""
    segment = struct.pack("!HHHH", 68, port, 8 + len(payload), 0) + payload
    packed = ip_address(source).packed + ip_address(destination).packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), 1, fragment, 64, 17, 0) + packed
    checksum = sum(struct.unpack("!10H", header))
    checksum = ~(checksum + (checksum >> 16)) & 0xFFFF
    return ethernet(mac, BROADCAST, 0x0800, header[:10] + struct.pack("!H", checksum) + header[12:] + segment)


def dhcp_request(mac: str, asked: str, *, message: int = 3) -> bytes:
    """RFC 2131: a client without an address asks for one that it was offered."""
    fixed = bytes([1, 1, 6, 0]) + bytes(24) + mac_bytes(mac) + bytes(202)
    options = b"\x63\x82\x53\x63" + bytes([53, 1, message, 0, 50, 4]) + ip_address(asked).packed + b"\xff"
    return udp(mac, "0.0.0.0", "255.255.255.255", 67, fixed + options)


def tagged(data: bytes, vlan: int, kind: int = 0x8100) -> bytes:
    """IEEE 802.1Q: the tag stands before the EtherType."""
    return data[:12] + struct.pack("!HH", kind, vlan) + data[12:]
