"""The ``l2`` driver: all nodes of the pool share one Ethernet segment, and an EVM's addresses are announced on it.

One bridge per node joins the uplink and a tap per NIC. A port is blocked by its bridge flags (``netlink.lock_port``),
in some 0.05 ms and without touching another port. A blocked tap has carrier and takes frames that are put on it
directly, past the bridge: they wait in its queue until the machine reads.

Nothing is kept in a file: the tap's name says which interfaces are ours, its alias which EVM and NIC it is for, its
flags whether it is open.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import Collection, Mapping, Sequence

from emp.host import netlink, packet, tap
from emp.host.link_stats import mtu_bytes
from emp.host.netlink import Link, Netlink
from emp.model.errors import EmpError, HostError
from emp.model.evm import EvmSpec
from emp.network import guard
from emp.network.base import Port
from emp.network.tap_port import TapPort, readable
from emp.network.uplink import Overlay, Vxlan, vlan_of

_PREFIX = "emp"
_ALIAS = "emp-evm"


def interface_name(evm: str, nic: int) -> str:
    """Return the tap's name: at most 15 characters, the same on every node."""
    return f"{_PREFIX}{hashlib.sha256(evm.encode()).hexdigest()[:8]}n{nic}"


def alias(evm: str, nic: int) -> str:
    return f"{_ALIAS} {evm} {nic}"


def macs_of(spec: EvmSpec) -> frozenset[str]:
    """Whichever card of the guest a pod is behind, the MAC is the EVM's own."""
    return frozenset(mac for mac, _ in spec.addresses)


def _evm_of(link: Link) -> str | None:
    match (link.alias or "").split():
        case [mark, evm, nic] if mark == _ALIAS and nic.isdigit() and link.name == interface_name(evm, int(nic)):
            return evm
    return None


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


class L2Driver:
    """Ports on one bridge of this network namespace; see ``emp.network.base.NetworkDriver``.

    ``uplink`` must exist and carry no address of its own (the bridge may); the bridge is made if it is missing.
    ``txqueuelen``: frames that a tap holds for a machine that does not read.
    """

    def __init__(
        self,
        *,
        bridge: str,
        uplink: str,
        vlan: int | None = None,
        vxlan: Vxlan | None = None,
        txqueuelen: int = 10_000,
    ) -> None:
        """``vlan``, ``vxlan``: what of the uplink is joined, if not all of it."""
        self._bridge = bridge
        self._card = uplink
        self._uplink = uplink
        self._vlan = vlan
        self._txqueuelen = txqueuelen
        self._links = Netlink()
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

    async def close(self) -> None:
        """Let go of the netlink socket; ports and bridge stay as they are. Idempotent."""
        await self._links.close()

    async def plug(self, spec: EvmSpec) -> tuple[Port, ...]:
        await self.remove(spec.name)
        ports: list[Port] = []
        try:
            for number in range(len(spec.nics)):
                ports.append(await self._plug(spec, number))
        except BaseException:
            for port in ports:
                await port.remove()
            raise
        return tuple(ports)

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
                txqlen=self._txqueuelen,
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

    async def adopt(self, spec: EvmSpec, tap_fds: Sequence[int]) -> tuple[Port, ...]:
        """See ``NetworkDriver``. The descriptors may come in any order; raise ``HostError`` if they are not exactly the
        EVM's taps. They are closed then: ownership has passed."""
        try:
            held = {tap.tap_interface(descriptor): descriptor for descriptor in tap_fds}
            wanted = [interface_name(spec.name, number) for number in range(len(spec.nics))]
            if sorted(held) != sorted(wanted) or len(held) != len(tap_fds):
                raise HostError(f"{spec.name} holds the taps {sorted(held)}, not {wanted}")
            indices = [(await self._tap_link(interface)).index for interface in wanted]
        except EmpError:
            for descriptor in tap_fds:
                os.close(descriptor)
            raise
        return tuple(
            self._port(spec, number, index, held[name])
            for number, (name, index) in enumerate(zip(wanted, indices, strict=True))
        )

    async def leftovers(self) -> frozenset[str]:
        return frozenset(evm for link in await self._links.links() if (evm := _evm_of(link)))

    async def remove(self, evm: str) -> None:
        for link in await self._links.links():
            if _evm_of(link) == evm:
                await netlink.delete_link(link.index)
                await guard.remove(link.name)

    async def _bridge_link(self) -> Link:
        bridge = await self._links.link(self._bridge)
        if bridge is None:
            raise HostError(f"the bridge {self._bridge} is gone", hint="restart the agent: it makes the bridge again")
        return bridge

    async def _tap_link(self, interface: str) -> Link:
        link = await self._links.link(interface)
        if link is None:
            raise HostError(f"the tap {interface} is not in this network namespace")
        return link
