"""What an interface has and has counted, each in a system call or two: it is read for every report, once a second."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from emp.host.run import command_failed

# linux/rtnetlink.h, linux/if_link.h
_RTM_GETSTATS = 94
_REQUEST = 0x1
_NLMSG_ERROR = 2
_LINK_64 = 1
_SIOCGIFMTU = 0x8921
_GLOBAL = "00"
"""include/net/ipv6.h: IPV6_ADDR_SCOPE_TYPE of what is neither link-local, site-local nor the host's own"""
_IFREQ = struct.Struct("16si20x")


@dataclass(frozen=True)
class LinkStats:
    """``struct rtnl_link_stats64``: received and sent as the node sees it."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_errors: int
    tx_errors: int
    rx_dropped: int
    tx_dropped: int


def link_stats(index: int) -> LinkStats:
    """Return the counters of a link in the calling thread's network namespace. Raise ``CommandFailed``."""
    body = struct.pack("=BBHII", 0, 0, 0, index, 1 << (_LINK_64 - 1))
    request = struct.pack("=IHHII", 16 + len(body), _RTM_GETSTATS, _REQUEST, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as asking:
        asking.send(request)
        answer = asking.recv(4096)
    if struct.unpack_from("=H", answer, 4)[0] == _NLMSG_ERROR:
        code = -struct.unpack_from("=i", answer, 16)[0]
        raise command_failed(["netlink", "stats", "get", str(index)], code, os.strerror(code))
    return LinkStats(*struct.unpack_from("=8Q", answer, 16 + len(body) + 4))


def mtu_bytes(interface: str) -> int:
    """Return an interface's MTU. Raise ``CommandFailed``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking:
        try:
            answer = fcntl.ioctl(asking, _SIOCGIFMTU, _IFREQ.pack(interface.encode(), 0))
        except OSError as error:
            raise command_failed(["SIOCGIFMTU", interface], error.errno or -1, str(error.strerror)) from error
    return int(_IFREQ.unpack(answer)[1])


def has_ipv6(interface: str) -> bool:
    """Return whether an interface has an IPv6 address that is not link-local, in the calling thread's namespace."""
    table = Path("/proc/thread-self/net/if_inet6")  # address, index, prefix length, scope, flags, name
    if not table.exists():  # a kernel without IPv6
        return False
    rows = (line.split() for line in table.read_text().splitlines())
    return any(name == interface and scope == _GLOBAL for _, _, _, scope, _, name in rows)
