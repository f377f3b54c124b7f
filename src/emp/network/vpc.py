"""The ``vpc`` driver: a cloud routes each address to the node that has it, and the node to the EVM's tap.

There is no bridge. A route to each of a port's addresses is what opens it, in both directions: without one the node has
nowhere to send to, and takes nothing that the machine sends, as the tap's strict reverse-path filter (RFC 3704, 2.2;
for IPv6, where the kernel has none, a rule of ``emp.network.guard``) drops what has no way back. So too what a guest
sends under an address that is not its own.

To the guest its IPv4 subnet is one link. The tap answers every ARP request for an address that is elsewhere (proxy
ARP), by a MAC that is the same on every node: what the guest has learnt stays true wherever it goes. An IPv6 address it
has without a neighbour (/128), and the tap is its default router, ``fe80::1`` by the same MAC. Nobody is ever asked
for the guest's own MACs, as they are in the node's table for good. IPv6 is off at the tap of an EVM that has none.

Which node the cloud sends to, the controller tells it (``emp.addresses``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from ipaddress import ip_address
from socket import AF_INET6

from emp.host import netlink, routes, tap
from emp.host.link_stats import has_ipv6, mtu_bytes
from emp.model.errors import HostError, Refused
from emp.model.evm import ROUTED_GATEWAY, EvmSpec
from emp.network import guard
from emp.network.base import Port
from emp.network.tap_driver import QUEUE_FRAMES, TapDriver, alias, interface_name, macs_of
from emp.network.tap_port import TapPort

GATEWAY_MAC = "02:65:6d:70:00:01"
"""of every tap on every node: locally administered, then "emp" """
_RULES = 7701
"""priorities from here on; any before the main table's 32766 will do"""
_ROUTER = {"disable_ipv6": 0, "addr_gen_mode": 1, "accept_ra": 0, "autoconf": 0, "accept_dad": 0, "forwarding": 1}
"""of a tap: no address of its own making, and nothing that it learns from its guest"""


class VpcPort(TapPort):
    """One tap that is routed to; see ``emp.network.base.Port``. ``addresses`` are those behind it."""

    is_told = True

    def __init__(
        self, interface: str, index: int, tap_fd: int, addresses: Sequence[str], *, macs: Collection[str]
    ) -> None:
        six = any(_is_ipv6(address) for address in addresses)
        super().__init__(interface, index, tap_fd, macs=macs, routed=six)
        self._routes = routes.Routes(index, (*addresses, *([routes.LINK_LOCAL] if six else [])))
        self._elsewhere = asyncio.Event()

    async def open(self) -> None:
        self._routes.add()

    async def block(self) -> None:
        self._routes.remove()

    async def announce(self, addresses: Sequence[tuple[str, str]]) -> None:
        """Nobody is to be told: the cloud routes by its own table."""

    def listen(self, heard: Callable[[str, str], None]) -> None:
        """Nobody is to hear: what is sent to an address that a guest took by itself, the cloud brings nowhere."""

    def stopped(self) -> None:
        self._elsewhere.clear()
        super().stopped()

    def readdressed(self) -> None:
        self._elsewhere.set()

    async def moved(self) -> None:
        """See ``Port``: when the controller has said so."""
        await self._elsewhere.wait()

    def release(self) -> None:
        self._routes.remove()


class VpcDriver(TapDriver):
    """Ports that are routed to; see ``emp.network.base.NetworkDriver``. ``uplink`` has the node's own address."""

    is_overlay = False

    def __init__(self, *, uplink: str) -> None:
        super().__init__()
        self._uplink = uplink
        self._kernel_lacks: str | None = None

    async def start(self) -> None:
        await self._links.connect()
        uplink = await self._links.link(self._uplink)
        if uplink is None:
            raise HostError(f"there is no interface {self._uplink}", field="uplink")
        if not await self._links.addresses(uplink.index):
            hint = "give it the address of the node's network interface"
            raise HostError(f"{self._uplink} has no address", field="uplink", hint=hint)
        routes.set_ipv4("ip_forward", 1)
        # Of two settings the larger one is in force: a tap's filter is to be strict, and the uplink's none, as with
        # several interfaces packets come in by another one than they would leave by.
        for name in ("all", self._uplink):
            routes.set_ipv4(f"conf/{name}/rp_filter", 0)
            routes.set_ipv4(f"conf/{name}/send_redirects", 0)
        # What comes in by the uplink is the node's own or for a tap. Nothing is sent out again where it came from: it
        # would come back, as long as the cloud sends here what is not here any more.
        await self._links.add_rule(_RULES, iifname=self._uplink, table=routes.MAIN, suppress_prefixlen=31)
        await self._links.add_rule(_RULES + 1, iifname=self._uplink, action="blackhole")
        self._kernel_lacks = await guard.obstacle_to_routing()
        await guard.sweep([link.name for link in await self._links.links()])

    @property
    def mtu_bytes(self) -> int:
        return mtu_bytes(self._uplink)

    @property
    def no_ipv6(self) -> str | None:
        """See ``NetworkDriver``. What the kernel lacks is looked for as the driver starts."""
        if not has_ipv6(self._uplink):
            return f"{self._uplink} has no IPv6 address: give it the one of the node's network interface"
        return self._kernel_lacks

    async def place(self, macs: Mapping[str, str]) -> None:
        """Nothing to do: the cloud knows."""

    async def plug(self, spec: EvmSpec) -> tuple[Port, ...]:
        """See ``NetworkDriver``. Raise ``Refused`` for an EVM with IPv6 addresses where there is ``no_ipv6``."""
        if spec.has_ipv6:
            if why := self.no_ipv6:
                hint = "choose another node, or an EVM without IPv6 addresses"
                raise Refused(f"{spec.name} has IPv6 addresses, and {why}", field="addresses", hint=hint)
            await self._start_ipv6()
        return await super().plug(spec)

    async def adopt(self, spec: EvmSpec, tap_fds: Sequence[int]) -> tuple[Port, ...]:
        ports = await super().adopt(spec, tap_fds)
        try:
            if spec.has_ipv6:
                await self._start_ipv6()
        except BaseException:
            for port in ports:
                await port.close()
            raise
        return ports

    async def _start_ipv6(self) -> None:
        """Do for IPv6 what ``start`` does for IPv4, once an EVM needs it: a node without IPv6 is none the worse."""
        routes.forward_ipv6()
        rule: dict[str, str | int] = {"family": AF_INET6, "iifname": self._uplink}
        await self._links.add_rule(_RULES, table=routes.MAIN, suppress_prefixlen=127, **rule)
        await self._links.add_rule(_RULES + 1, action="blackhole", **rule)

    def _port(self, spec: EvmSpec, number: int, index: int, descriptor: int) -> VpcPort:
        addresses = [address for _, address in spec.behind(number)]
        return VpcPort(interface_name(spec.name, number), index, descriptor, addresses, macs=macs_of(spec))

    async def _plug(self, spec: EvmSpec, number: int) -> VpcPort:
        interface = interface_name(spec.name, number)
        uplink = await self._links.link(self._uplink)
        if uplink is None:
            raise HostError(f"the uplink {self._uplink} is gone", field="uplink")
        descriptor = tap.open_tap(interface)
        try:
            six = any(_is_ipv6(address) for _, address in spec.behind(number))
            netlink.set_ipv6(interface, **(_ROUTER if six else {"disable_ipv6": 1}))
            settings = {"rp_filter": 1, "proxy_arp": 1, "send_redirects": 0, "forwarding": 1}
            for name, value in settings.items():
                routes.set_ipv4(f"conf/{interface}/{name}", value)
            routes.set_ipv4(f"neigh/{interface}/proxy_delay", 0)  # else an answer waits up to 0.8 s
            link = await self._tap_link(interface)
            port = self._port(spec, number, link.index, descriptor)
            await port.allow([address for _, address in spec.addresses])
            await self._links.set_link(
                link.index,
                ifalias=alias(spec.name, number),
                address=GATEWAY_MAC,
                mtu=uplink.mtu_bytes,
                txqlen=QUEUE_FRAMES,
                state="up",
            )
            if six:
                await self._links.add_address(link, ROUTED_GATEWAY, 128)
            routes.add_neighbours(link.index, spec.behind(number))
        except BaseException:
            os.close(descriptor)
            raise
        return port


def _is_ipv6(address: str) -> bool:
    return ip_address(address).version == 6
