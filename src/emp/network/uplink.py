"""What a node's bridge is joined to: its card, a VLAN of the card, or a VXLAN over it.

A VXLAN (RFC 7348) makes one segment of nodes that reach each other by IP alone. It learns nothing from the wire: its
table says which node has which MAC, and what has no entry, as broadcast, is sent to every peer. The table is kept by
whoever knows where the EVMs are (``Overlay.place``), so a stranger on the underlay cannot draw frames to himself by a
forged source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from emp.host import netlink
from emp.host.netlink import Link, Netlink
from emp.model.errors import CommandFailed, HostError

VXLAN_PORT = 4789
"""IANA's (RFC 7348, 4.2)"""
VXLAN_BYTES = 50
"""around each frame: outer Ethernet less its own, IPv4, UDP, VXLAN (RFC 7348, 5)"""
_ALL = "00:00:00:00:00:00"


@dataclass(frozen=True)
class Vxlan:
    id: int
    """VNI, the same on every node"""
    local: str
    """this node's address on the underlay"""
    peers: Mapping[str, str]
    """the other nodes, by name, and their addresses there"""


async def vlan_of(links: Netlink, uplink: Link, vlan: int) -> Link:
    """Return the VLAN's link, made if it is missing. Raise ``HostError`` naming the field."""
    name = f"{uplink.name}.{vlan}"
    if await links.link(name) is None:
        try:
            await links.add_vlan(name, parent=uplink.index, vlan=vlan)
        except CommandFailed as error:
            raise HostError(
                f"no VLAN {vlan} on {uplink.name}: {error.details['stderr']}",
                field="vlan",
                hint="the kernel needs CONFIG_VLAN_8021Q (module 8021q)",
            ) from error
    return await _there(links, name)


class Overlay:
    """A VXLAN of this node and its table."""

    def __init__(self, links: Netlink, vxlan: Vxlan) -> None:
        self._links = links
        self._vxlan = vxlan
        self._index = -1

    @property
    def name(self) -> str:
        return f"emp-vxlan{self._vxlan.id}"[:15]

    async def start(self, uplink: Link) -> Link:
        """Return its link, made if it is missing, every peer in its table. Raise ``HostError`` naming the field."""
        if await self._links.link(self.name) is None:
            try:
                await self._links.add_vxlan(self.name, vni=self._vxlan.id, local=self._vxlan.local, port=VXLAN_PORT)
            except CommandFailed as error:
                raise HostError(
                    f"no VXLAN {self._vxlan.id}: {error.details['stderr']}",
                    field="vxlan",
                    hint="the kernel needs CONFIG_VXLAN (module vxlan)",
                ) from error
        made = await _there(self._links, self.name)
        if made.kind != "vxlan":
            raise HostError(f"{self.name} is not a VXLAN but {made.kind or 'hardware'}", field="vxlan")
        await self._links.set_link(made.index, mtu=uplink.mtu_bytes - VXLAN_BYTES)
        self._index = made.index
        await self._set({(_ALL, remote) for remote in self._vxlan.peers.values()}, only=_ALL)
        return made

    async def place(self, macs: Mapping[str, str]) -> None:
        """Say which node has which MAC; those that are not named are at none, and go to every peer.

        A node that is no peer is left out. Raise ``CommandFailed``.
        """
        peers = self._vxlan.peers
        await self._set({(mac, peers[node]) for mac, node in macs.items() if node in peers})

    async def _set(self, wanted: set[tuple[str, str]], *, only: str | None = None) -> None:
        there = {entry for entry in await self._links.fdb(self._index) if (entry[0] == _ALL) == (only == _ALL)}
        for mac, remote in sorted(there - wanted):  # first: in between the MAC is at none, and goes to every peer
            await self._links.remove_fdb(self._index, mac, remote)
        for mac, remote in sorted(wanted - there):
            await self._links.add_fdb(self._index, mac, remote)


async def _there(links: Netlink, name: str) -> Link:
    link = await links.link(name)
    if link is None:
        raise HostError(f"{name} vanished as it was made", field="uplink")
    netlink.set_ipv6(name, disable_ipv6=1)  # a port of the bridge; the node says nothing there
    return link
