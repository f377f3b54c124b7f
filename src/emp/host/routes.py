"""Routes to single addresses behind a link, and who has them there: what lets a node forward to its own EVMs.

Opened inside the blackout, so all of a port's routes go in one message by hand (see ``netlink._set_port``). The kernel
works on it inside ``send``. All in the network namespace of the calling thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from ipaddress import ip_address, ip_network
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
_SYSCTL = Path("/proc/sys/net")
LINK_LOCAL = "fe80::/64"
"""RFC 4291, 2.5.6; every link has one"""

Message = tuple[int, int, bytes]
"""kind, flags and body"""
Batch = tuple[bytes, int]
"""messages as they are sent, and how many"""


class Routes:
    """The way to these IPv4 and IPv6 addresses by a link. The messages are made here once: a hundred addresses take
    longer to parse than the kernel takes to route them.

    ``LINK_LOCAL`` may be among them; other links keep theirs.
    """

    def __init__(self, index: int, destinations: Iterable[str]) -> None:
        ways = [(_way(index, destination), destination == LINK_LOCAL) for destination in destinations]
        self._add = _batches(
            [(_NEW_ROUTE, _CREATE if is_shared else _CREATE | _REPLACE, way) for way, is_shared in ways]
        )
        self._remove = _batches([(_DELETE_ROUTE, 0, way) for way, _ in ways])

    def add(self) -> None:
        """Send what is for them out of the link, wherever it was sent before. Idempotent. Raise ``CommandFailed``."""
        _ask(self._add, but=errno.EEXIST)

    def remove(self) -> None:
        """Undo ``add``. Idempotent. Raise ``CommandFailed``."""
        _ask(self._remove, but=errno.ESRCH)


def add_neighbours(index: int, behind: Iterable[tuple[str, str]]) -> None:
    """Say for good which MAC each (MAC, IP address) behind a link has, so that nobody is asked there."""
    _ask(_batches([_neighbour(index, mac, address) for mac, address in behind]))


def set_ipv4(name: str, value: int) -> None:
    """Write ``/proc/sys/net/ipv4/NAME``, such as ``conf/eth0/rp_filter``. Raise ``CommandFailed``."""
    _set(f"ipv4/{name}", value)


def forward_ipv6() -> None:
    """Forward IPv6. Idempotent; raise ``CommandFailed``.

    A node that forwards takes no more router advertisements where ``accept_ra`` is 1, and loses at once the default
    route that it has from one; it goes on with 2 (Linux, Documentation/networking/ip-sysctl.rst). So what took them
    before gets 2 first. Those that are made later (containers', taps) take none, as on every router.
    Where the node forwards already, its owner has decided.
    """
    conf = _SYSCTL / "ipv6/conf"
    if int((conf / "all/forwarding").read_text()) != 0:
        return
    for interface in conf.iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just gone
            if interface.name not in ("all", "default") and _takes_advertisements(interface):
                _set(f"ipv6/conf/{interface.name}/accept_ra", 2)
    _set("ipv6/conf/all/forwarding", 1)


def _takes_advertisements(interface: Path) -> bool:
    """Whether it does so only as long as nobody forwards."""
    wanted = {"accept_ra": 1, "forwarding": 0, "disable_ipv6": 0}
    return all(int((interface / name).read_text()) == value for name, value in wanted.items())


def _set(name: str, value: int) -> None:
    try:
        (_SYSCTL / name).write_text(str(value))
    except OSError as error:
        raise command_failed(["sysctl", f"net/{name}={value}"], error.errno or -1, str(error.strerror)) from error


def _way(index: int, destination: str) -> bytes:
    there = ip_network(destination)
    family = socket.AF_INET if there.version == 4 else socket.AF_INET6
    head = struct.pack("=BBBBBBBBI", family, there.prefixlen, 0, 0, MAIN, _STATIC, _LINK, _UNICAST, 0)
    where = attribute(_DESTINATION, there.network_address.packed) + attribute(_OUT_INTERFACE, struct.pack("=I", index))
    return head + where


def _neighbour(index: int, mac: str, address: str) -> Message:
    ip = ip_address(address)
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    head = struct.pack("=BxxxiHBB", family, index, _PERMANENT, 0, 0)
    who = attribute(_LLADDR, bytes.fromhex(mac.replace(":", "")))
    return _NEW_NEIGHBOUR, _CREATE | _REPLACE, head + attribute(_DESTINATION, ip.packed) + who


def _batches(messages: Sequence[Message]) -> tuple[Batch, ...]:
    some = [messages[at : at + _AT_ONCE] for at in range(0, len(messages), _AT_ONCE)]
    return tuple((b"".join(_message(number, one) for number, one in enumerate(few)), len(few)) for few in some)


def _ask(batches: Iterable[Batch], *, but: int = 0) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as asking:
        for messages, count in batches:
            asking.send(messages)
            answers = [struct.unpack_from("=i", asking.recv(4096), 16)[0] for _ in range(count)]  # 0 or minus errno
            if failed := [-code for code in answers if code and -code != but]:
                raise command_failed(["netlink", "routes", str(count)], failed[0], os.strerror(failed[0]))


def _message(number: int, message: Message) -> bytes:
    kind, flags, body = message
    return struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, number, 0) + body
