"""Links and bridge ports over rtnetlink.

One ``Netlink`` holds one socket, in the network namespace where ``connect`` was called. A verb takes 0.2 to 0.5 ms,
nearly all of it Python, and more on a busy machine. Removing a link takes the kernel 15 ms and more, and so has a
thread to itself. The functions beside the class work in the namespace of the calling thread.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from pyroute2 import AsyncIPRoute, IPRoute  # type: ignore[import-untyped]
from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped]

from emp.host.run import command_failed
from emp.model.errors import CommandFailed

_IFF_UP = 0x1
_IFF_PROMISC = 0x100

# linux/rtnetlink.h, linux/netlink.h, linux/if_link.h, linux/neighbour.h
_RTM_SETLINK, _RTM_NEWNEIGH, _RTM_DELNEIGH = 19, 28, 29
_REQUEST, _ACK, _REPLACE, _CREATE = 0x1, 0x4, 0x100, 0x400
_PROTINFO, _NESTED = 12, 0x8000
_NEIGHBOUR = struct.Struct("=B3xiHBB")
"""family, interface, state, flags, type"""
_NUD_NOARP, _NTF_MASTER, _NTF_STICKY, _LLADDR = 0x40, 0x04, 0x40, 2
_NODAD = 0x02
"""linux/if_addr.h: IFA_F_NODAD"""
_LOOK_S, _LISTENS_S = 0.005, 10.0
"""how often, and how long, to look whether a new address answers"""
_LEARNING, _UNICAST_FLOOD, _FLUSH, _MULTICAST_FLOOD, _BROADCAST_FLOOD, _LOCKED = 8, 9, 24, 27, 30, 39


@dataclass(frozen=True)
class Link:
    """One network interface, as the kernel describes it."""

    index: int
    name: str
    kind: str | None
    """``bridge``, ``veth``, ``tun``, ...; None for hardware"""
    mac: str
    mtu_bytes: int
    up: bool
    master: int | None
    """index of the bridge that it is a port of"""
    alias: str | None
    locked: bool
    """a bridge port that takes no frame from addresses it has not been given"""


@contextmanager
def _asked(*argv: object) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        words = ["netlink", *map(str, argv)]
        raise command_failed(words, error.code, os.strerror(error.code)) from error


def _link(message: Any) -> Link:
    info = message.get("IFLA_LINKINFO")
    port = info.get("IFLA_INFO_SLAVE_DATA") if info and info.get("IFLA_INFO_SLAVE_KIND") == "bridge" else None
    return Link(
        index=message["index"],
        name=message.get("IFLA_IFNAME"),
        kind=info.get("IFLA_INFO_KIND") if info else None,
        mac=message.get("IFLA_ADDRESS") or "",
        mtu_bytes=message.get("IFLA_MTU"),
        up=bool(message["flags"] & _IFF_UP),
        master=message.get("IFLA_MASTER"),
        alias=message.get("IFLA_IFALIAS"),
        locked=bool(port and port.get("IFLA_BRPORT_LOCKED")),
    )


class Netlink:
    """Verbs on links. Each raises ``CommandFailed`` with the kernel's errno as ``returncode``."""

    def __init__(self) -> None:
        self._socket: Any = None

    async def connect(self) -> None:
        """Open the socket, in the network namespace that the caller is in. Idempotent."""
        if self._socket is None:
            self._socket = AsyncIPRoute()
            await self._socket.setup_endpoint()

    async def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            closing, self._socket = self._socket, None
            closing.close()

    async def links(self) -> list[Link]:
        with _asked("link", "list"):
            return [_link(message) async for message in await self._socket.link("dump")]

    async def link(self, name: str) -> Link | None:
        """Return the link of that name, None if there is none."""
        with _asked("link", "get", name):
            try:
                return _link((await self._socket.link("get", ifname=name))[0])
            except NetlinkError as error:
                if error.code == errno.ENODEV:
                    return None
                raise

    async def addresses(self, index: int) -> list[str]:
        """Return the IP addresses on a link, without the IPv6 link-local ones."""
        with _asked("address", "list", index):
            found = [m.get("IFA_ADDRESS") async for m in await self._socket.addr("dump", index=index)]
        return [address for address in found if not address.startswith("fe80:")]

    async def add_address(self, link: Link, address: str, prefix_length: int) -> None:
        """Give a link that is up an IPv6 address, without a look for duplicates; it answers when this returns.

        Idempotent. The kernel has it listen in a thread of its own, which a busy machine keeps waiting: what is asked
        for meanwhile is not answered.
        """
        with _asked("address", "add", link.name, address):
            await self._socket.addr("replace", index=link.index, address=address, prefixlen=prefix_length, flags=_NODAD)
        deadline_s = asyncio.get_running_loop().time() + _LISTENS_S
        while not _listens(link.name, address):
            if asyncio.get_running_loop().time() > deadline_s:
                raise command_failed(["address", "add", link.name, address], errno.ETIMEDOUT, "it does not answer")
            await asyncio.sleep(_LOOK_S)

    async def add_rule(self, priority: int, **what: str | int) -> None:
        """Add a rule of the policy routing database (IPv4 unless ``family`` says else), as pyroute2 has them.
        Idempotent."""
        with _asked("rule", "add", priority, what):
            try:
                await self._socket.rule("add", priority=priority, **what)
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise

    async def add_bridge(self, name: str, *, mac: str) -> None:
        """Make a bridge, down. A MAC that is not fixed would change, and neighbours lose it, as ports come and go."""
        with _asked("bridge", "add", name):
            await self._socket.link("add", ifname=name, kind="bridge", address=mac)

    async def add_vlan(self, name: str, *, parent: int, vlan: int) -> None:
        """Make a VLAN of a link (IEEE 802.1Q), down."""
        with _asked("vlan", "add", name, vlan):
            await self._socket.link("add", ifname=name, kind="vlan", link=parent, vlan_id=vlan)

    async def add_vxlan(self, name: str, *, vni: int, local: str, port: int) -> None:
        """Make a VXLAN (RFC 7348), down, that learns nothing: where frames go is in its table alone."""
        with _asked("vxlan", "add", name, vni):
            await self._socket.link(
                "add",
                ifname=name,
                kind="vxlan",
                vxlan_id=vni,
                vxlan_local=local,
                vxlan_port=port,
                vxlan_learning=0,
            )

    async def fdb(self, index: int) -> set[tuple[str, str]]:
        """Return the (MAC, remote address) of a VXLAN's table; the zero MAC is for all that has no entry."""
        with _asked("fdb", "list", index):
            found = [m async for m in await self._socket.fdb("dump", ifindex=index)]
        return {(m.get("NDA_LLADDR"), m.get("NDA_DST")) for m in found if m["ifindex"] == index and m.get("NDA_DST")}

    async def add_fdb(self, index: int, mac: str, remote: str) -> None:
        """Say where a MAC is that has no entry. The zero MAC may be at several: it gets one more."""
        with _asked("fdb", "append", index, mac, remote):
            await self._socket.fdb("append", ifindex=index, lladdr=mac, dst=remote)

    async def remove_fdb(self, index: int, mac: str, remote: str) -> None:
        with _asked("fdb", "del", index, mac, remote):
            await self._socket.fdb("del", ifindex=index, lladdr=mac, dst=remote)

    async def set_bridge_plain(self, index: int) -> None:
        """Let a bridge forward at once: no spanning tree, no forward delay, no multicast snooping."""
        with _asked("bridge", "set", index):
            await self._socket.link(
                "set", index=index, kind="bridge", br_stp_state=0, br_forward_delay=0, br_mcast_snooping=0
            )

    async def set_link(self, index: int, **attributes: str | int) -> None:
        """Set ``state`` (up, down), ``master``, ``mtu``, ``address``, ``txqlen``, ``ifalias``."""
        with _asked("link", "set", index, attributes):
            await self._socket.link("set", index=index, **attributes)

    async def set_promiscuous(self, index: int) -> None:
        with _asked("link", "set", index, "promisc on"):
            await self._socket.link("set", index=index, flags=_IFF_PROMISC, change=_IFF_PROMISC)


def _listens(interface: str, address: str) -> bool:
    """Whether it is in the address's solicited-node group (RFC 4291, 2.7.1), by which neighbours ask for it."""
    group = "ff0200000000000000000001ff" + IPv6Address(address).packed[-3:].hex()
    lines = Path("/proc/thread-self/net/igmp6").read_text().splitlines()
    return any(line.split()[1:3] == [interface, group] for line in lines)


def open_port(index: int) -> None:
    """Let a bridge port learn, send and receive. Raise ``CommandFailed``."""
    _set_port(index, {_LEARNING: 1, _UNICAST_FLOOD: 1, _MULTICAST_FLOOD: 1, _BROADCAST_FLOOD: 1, _LOCKED: 0})


def lock_port(index: int) -> None:
    """Let nothing through a bridge port in either direction, and forget what was learnt on it. Raise ``CommandFailed``.

    Locked, it drops what comes in from any address that is not in the table *for this port*; not learning, flushed and
    not flooded to, it has no address there, so nothing goes out either. Unlike the port's spanning-tree state, these
    flags are left alone by the kernel when this or another port changes.
    """
    closed = {_LEARNING: 0, _UNICAST_FLOOD: 0, _MULTICAST_FLOOD: 0, _BROADCAST_FLOOD: 0, _LOCKED: 1}
    _set_port(index, closed | {_FLUSH: None})


def pin_mac(index: int, mac: str) -> None:
    """Let a bridge send frames for ``mac`` to this port, wherever it sees that MAC come from. Raise ``CommandFailed``.

    Sticky (bridge(8), ``fdb ... sticky``): a learnt entry, and a static one too, follows the next frame from the MAC.
    """
    entry = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, _NUD_NOARP, _NTF_MASTER | _NTF_STICKY, 0)
    _ask(_RTM_NEWNEIGH, _CREATE | _REPLACE, entry + attribute(_LLADDR, bytes.fromhex(mac.replace(":", ""))))


def unpin_mac(index: int, mac: str) -> None:
    """Undo ``pin_mac``. Idempotent. Raise ``CommandFailed``."""
    entry = _NEIGHBOUR.pack(socket.AF_BRIDGE, index, 0, _NTF_MASTER, 0)
    try:
        _ask(_RTM_DELNEIGH, 0, entry + attribute(_LLADDR, bytes.fromhex(mac.replace(":", ""))))
    except CommandFailed as error:
        if error.details["returncode"] not in (errno.ENOENT, errno.ENODEV):
            raise


def _set_port(index: int, flags: dict[int, int | None]) -> None:
    attributes = b"".join(attribute(kind, b"" if value is None else bytes([value])) for kind, value in flags.items())
    body = struct.pack("=BxHiII", socket.AF_BRIDGE, 0, index, 0, 0) + attribute(_PROTINFO | _NESTED, attributes)
    _ask(_RTM_SETLINK, 0, body)


def _ask(kind: int, flags: int, body: bytes) -> None:
    """Send one request by hand: a port is opened inside the blackout, and a library takes ten times as long.

    The kernel works on it inside ``send``, under the lock that all changes of links share.
    """
    request = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as asking:
        asking.send(request)
        (code,) = struct.unpack_from("=i", asking.recv(4096), 16)  # the acknowledgement: 0 or minus errno
    if code:
        raise command_failed(["netlink", str(kind), body.hex()], -code, os.strerror(-code))


def attribute(kind: int, payload: bytes) -> bytes:
    """Return a netlink attribute, padded as they are in a message."""
    size = 4 + len(payload)
    return struct.pack("=HH", size, kind) + payload + bytes(-size % 4)


def _delete_link(index: int) -> None:
    with IPRoute() as sock, _asked("link", "delete", index):
        try:
            sock.link("del", index=index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise


async def delete_link(index: int) -> None:
    """Remove a link, whoever holds it open. Idempotent; takes 15 ms and more, in a thread."""
    await asyncio.to_thread(_delete_link, index)


def set_ipv6(interface: str, **settings: int) -> None:
    """Write ``/proc/sys/net/ipv6/conf/INTERFACE/*``; does nothing on a machine without IPv6."""
    directory = Path("/proc/sys/net/ipv6/conf") / interface
    if not directory.parent.is_dir():
        return
    for name, value in settings.items():
        try:
            (directory / name).write_text(str(value))
        except OSError as error:
            raise command_failed(
                ["sysctl", f"net.ipv6.conf.{interface}.{name}={value}"], error.errno or -1, str(error.strerror)
            ) from error
