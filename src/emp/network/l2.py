"""The ``l2`` driver: all nodes of the pool share one Ethernet segment, and an EVM's addresses are announced on it.

One bridge per node joins the uplink and a tap per NIC. A port is blocked by its bridge flags (``netlink.lock_port``),
in some 0.05 ms and without touching another port. A blocked tap has carrier and takes frames that are put on it
directly, past the bridge: they wait in its queue until the machine reads.

Nothing is kept in a file: a tap's flags say whether it is open.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Collection, Mapping, Sequence

from emp.host import netlink, packet, tap
from emp.host.link_stats import mtu_bytes
from emp.host.netlink import Link
from emp.model.errors import HostError
from emp.model.evm import EvmSpec
from emp.network import guard
from emp.network.base import Port
from emp.network.tap_driver import QUEUE_FRAMES, TapDriver, alias, interface_name, macs_of
from emp.network.tap_port import TapPort, readable
from emp.network.uplink import Overlay, Vxlan, vlan_of


class L2Port(TapPort):
    """One tap on the node's bridge; see ``emp.network.base.Port``."""

    def __init__(self, interface: str, index: int, tap_fd: int, *, macs: Collection[str], uplink: str) -> None:
        super().__init__(interface, index, tap_fd, macs=macs)
        self._uplink = uplink
        self._pinned: tuple[str, ...] = ()
        self._arrivals: socket.socket | None = None

    async def open(self) -> None:
        netlink.open_port(self._index)

    async def block(self) -> None:
        await self._hush()
        netlink.lock_port(self._index)

    def watch(self, macs: Sequence[str]) -> None:
        """See ``Port``. Or the bridge would learn from the target's first frame that the MACs are behind the uplink,
        and drop what the switch had sent here before that. It is done early: 100 MACs take some milliseconds.
        """
        super().watch(macs)
        self._arrivals = packet.open_packet(self._uplink, program=packet.sent_by(macs))
        self._pinned = tuple(macs)
        for mac in macs:
            netlink.pin_mac(self._index, mac)

    async def moved(self) -> None:
        """See ``Port``: when each MAC was seen coming in by the uplink, the switches on the way know it as well."""
        waited = {bytes.fromhex(mac.replace(":", "")) for mac in self._pinned}
        loop = asyncio.get_running_loop()
        while waited and self._arrivals is not None:
            try:
                frame, address = self._arrivals.recvfrom(packet.LONGEST_BYTES)
            except BlockingIOError:
                await readable(loop, self._arrivals.fileno())
                continue
            if address[2] != packet.OUTGOING:
                waited.discard(frame[packet.SENDER])

    def release(self) -> None:
        netlink.lock_port(self._index)
        self._unpin()

    def forget(self) -> None:
        self._unpin()
        super().forget()

    def _unpin(self) -> None:
        pinned, self._pinned = self._pinned, ()
        for mac in pinned:
            netlink.unpin_mac(self._index, mac)
        if self._arrivals is not None:
            packet.close_later(self._arrivals)
            self._arrivals = None


class L2Driver(TapDriver):
    """Ports on one bridge of this network namespace; see ``emp.network.base.NetworkDriver``.

    ``uplink`` must exist and carry no address of its own (the bridge may); the bridge is made if it is missing.
    """

    def __init__(self, *, bridge: str, uplink: str, vlan: int | None = None, vxlan: Vxlan | None = None) -> None:
        """``vlan``, ``vxlan``: what of the uplink is joined, if not all of it."""
        super().__init__()
        self._bridge = bridge
        self._card = uplink
        self._uplink = uplink
        self._vlan = vlan
        self._overlay = Overlay(self._links, vxlan) if vxlan is not None else None

    async def start(self) -> None:
        await self._links.connect()
        uplink = await self._find_uplink()
        self._uplink = uplink.name
        bridge = await self._links.link(self._bridge) or await self._make_bridge(mac=uplink.mac)
        if bridge.kind != "bridge":
            raise HostError(f"{self._bridge} is not a bridge but {bridge.kind or 'hardware'}", field="bridge")
        await self._links.set_bridge_plain(bridge.index)
        if uplink.master != bridge.index:
            await self._enslave_uplink(uplink, bridge)
        # Promiscuous in any case: or the card's filter would be set anew, with a pause, as ports open and close.
        await self._links.set_promiscuous(uplink.index)
        for link in (uplink, bridge):
            if not link.up:
                await self._links.set_link(link.index, state="up")
        await guard.sweep([link.name for link in await self._links.links()])

    @property
    def mtu_bytes(self) -> int:
        return min(mtu_bytes(self._bridge), mtu_bytes(self._uplink))

    async def _find_uplink(self) -> Link:
        card = await self._links.link(self._card)
        if card is None:
            raise HostError(f"there is no interface {self._card} to be the bridge's uplink", field="uplink")
        if not card.up:
            await self._links.set_link(card.index, state="up")
        if self._overlay is not None:
            return await self._overlay.start(card)
        return card if self._vlan is None else await vlan_of(self._links, card, self._vlan)

    @property
    def is_overlay(self) -> bool:
        return self._overlay is not None

    async def place(self, macs: Mapping[str, str]) -> None:
        if self._overlay is not None:
            await self._overlay.place(macs)

    async def _make_bridge(self, *, mac: str) -> Link:
        await self._links.add_bridge(self._bridge, mac=mac)
        netlink.set_ipv6(self._bridge, accept_ra=0, autoconf=0, addr_gen_mode=1)
        made = await self._links.link(self._bridge)
        if made is None:
            raise HostError(f"the bridge {self._bridge} vanished as it was made", field="bridge")
        return made

    async def _enslave_uplink(self, uplink: Link, bridge: Link) -> None:
        if uplink.master is not None:
            raise HostError(f"{self._uplink} is already a port of another bridge", field="uplink")
        if addresses := await self._links.addresses(uplink.index):
            raise HostError(
                f"{self._uplink} has the address {addresses[0]}, which would stop answering",
                field="uplink",
                hint=f"make the bridge {self._bridge}, move the address and its routes there, then start again",
            )
        await self._links.set_link(uplink.index, master=bridge.index)

    def _port(self, spec: EvmSpec, number: int, index: int, descriptor: int) -> Port:
        return L2Port(interface_name(spec.name, number), index, descriptor, macs=macs_of(spec), uplink=self._uplink)

    async def _plug(self, spec: EvmSpec, number: int) -> Port:
        interface, mac = interface_name(spec.name, number), spec.nics[number].mac
        bridge = await self._bridge_link()
        descriptor = tap.open_tap(interface)
        try:
            netlink.set_ipv6(interface, disable_ipv6=1)
            link = await self._tap_link(interface)
            await self._links.set_link(
                link.index,
                ifalias=alias(spec.name, number),
                # not the guest's own: the bridge would take its frames for the node's
                address=f"fe{mac[2:]}",
                mtu=bridge.mtu_bytes,
                txqlen=QUEUE_FRAMES,
                master=bridge.index,
            )
            netlink.lock_port(link.index)
            port = self._port(spec, number, link.index, descriptor)
            await port.allow([address for _, address in spec.addresses])
            await self._links.set_link(link.index, state="up")
        except BaseException:
            os.close(descriptor)
            raise
        return port

    async def _bridge_link(self) -> Link:
        bridge = await self._links.link(self._bridge)
        if bridge is None:
            raise HostError(f"the bridge {self._bridge} is gone", hint="restart the agent: it makes the bridge again")
        return bridge
