"""Routes to single addresses behind a link, and who has them there: what lets a node forward to its own EVMs.

Opened inside the blackout, so all of a port's routes go in one message by hand (see ``netlink._set_port``). The kernel
works on it inside ``send``. All in the network namespace of the calling thread.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address
from pathlib import Path

from emp.host.netlink import attribute
from emp.host.run import command_failed

# linux/rtnetlink.h, linux/netlink.h, linux/neighbour.h
_NEW_ROUTE, _DELETE_ROUTE, _NEW_NEIGHBOUR = 24, 25, 28
_REQUEST, _ACK, _REPLACE, _CREATE = 0x1, 0x4, 0x100, 0x400
MAIN, _STATIC, _LINK, _UNICAST = 254, 4, 253, 1
_DESTINATION, _OUT_INTERFACE = 1, 4
_LLADDR = 2
_PERMANENT = 0x80
_AT_ONCE = 64
"""messages whose answers fit a socket's buffer"""

Message = tuple[int, bytes]
"""kind and body"""


def add_routes(index: int, addresses: Iterable[str]) -> None:
    """Send what is for these IPv4 addresses out of a link. Idempotent. Raise ``CommandFailed``."""
    _ask([_route(_NEW_ROUTE, index, address) for address in addresses], _CREATE | _REPLACE)


def remove_routes(index: int, addresses: Iterable[str]) -> None:
    """Undo ``add_routes``. Idempotent. Raise ``CommandFailed``."""
    _ask([_route(_DELETE_ROUTE, index, address) for address in addresses], 0, but=errno.ESRCH)


def add_neighbours(index: int, behind: Iterable[tuple[str, str]]) -> None:
    """Say for good which MAC each (MAC, IPv4 address) behind a link has, so that nobody is asked there."""
    _ask([_neighbour(index, mac, address) for mac, address in behind], _CREATE | _REPLACE)


def set_ipv4(name: str, value: int) -> None:
    """Write ``/proc/sys/net/ipv4/NAME``, such as ``conf/eth0/rp_filter``. Raise ``CommandFailed``."""
    try:
        Path("/proc/sys/net/ipv4", name).write_text(str(value))
    except OSError as error:
        raise command_failed(["sysctl", f"net/ipv4/{name}={value}"], error.errno or -1, str(error.strerror)) from error


def _route(kind: int, index: int, address: str) -> Message:
    head = struct.pack("=BBBBBBBBI", socket.AF_INET, 32, 0, 0, MAIN, _STATIC, _LINK, _UNICAST, 0)
    where = attribute(_DESTINATION, IPv4Address(address).packed) + attribute(_OUT_INTERFACE, struct.pack("=I", index))
    return kind, head + where


def _neighbour(index: int, mac: str, address: str) -> Message:
    head = struct.pack("=BxxxiHBB", socket.AF_INET, index, _PERMANENT, 0, 0)
    who = attribute(_LLADDR, bytes.fromhex(mac.replace(":", "")))
    return _NEW_NEIGHBOUR, head + attribute(_DESTINATION, IPv4Address(address).packed) + who


def _ask(messages: Sequence[Message], flags: int, *, but: int = 0) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as asking:
        for at in range(0, len(messages), _AT_ONCE):
            some = messages[at : at + _AT_ONCE]
            asking.send(b"".join(_message(number, kind, body, flags) for number, (kind, body) in enumerate(some)))
            answers = [struct.unpack_from("=i", asking.recv(4096), 16)[0] for _ in some]  # each 0 or minus errno
            if failed := [-code for code in answers if code and -code != but]:
                raise command_failed(["netlink", "routes", str(len(some))], failed[0], os.strerror(failed[0]))


def _message(number: int, kind: int, body: bytes, flags: int) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, number, 0) + body
