"""The ``vpc`` driver: a cloud routes each address to the node that has it, and the node to the EVM's tap.

There is no bridge. A route to each of a port's addresses is what opens it, in both directions: without one the node has
nowhere to send to, and takes nothing that the machine sends, as the tap's strict reverse-path filter (RFC 3704, 2.2)
drops what has no way back. So too what a guest sends under an address that is not its own.

To the guest its subnet is one link. The tap answers every ARP request for an address that is elsewhere (proxy ARP), by
a MAC that is the same on every node: what the guest has learnt stays true wherever it goes. Nobody is ever asked for
the guest's own MACs, as they are in the node's table for good. Frames other than of IPv4 go nowhere.

Which node the cloud sends to, the controller tells it (``emp.addresses``).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from ipaddress import ip_address

from emp.host import netlink, routes, tap
from emp.host.link_stats import mtu_bytes
from emp.model.errors import HostError, Refused
from emp.model.evm import EvmSpec
from emp.network import guard
from emp.network.base import Port
from emp.network.tap_driver import QUEUE_FRAMES, TapDriver, alias, interface_name, macs_of
from emp.network.tap_port import TapPort

GATEWAY_MAC = "02:65:6d:70:00:01"
"""of every tap on every node: locally administered, then "emp" """
_RULES = 7701
"""priorities from here on; any before the main table's 32766 will do"""


class VpcPort(TapPort):
    """One tap that is routed to; see ``emp.network.base.Port``. ``addresses`` are those behind it."""

    is_told = True

    def __init__(
        self, interface: str, index: int, tap_fd: int, addresses: Sequence[str], *, macs: Collection[str]
    ) -> None:
        super().__init__(interface, index, tap_fd, macs=macs)
        self._addresses = tuple(addresses)
        self._elsewhere = asyncio.Event()

    async def open(self) -> None:
        routes.add_routes(self._index, self._addresses)

    async def block(self) -> None:
        routes.remove_routes(self._index, self._addresses)

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
        routes.remove_routes(self._index, self._addresses)


class VpcDriver(TapDriver):
    """Ports that are routed to; see ``emp.network.base.NetworkDriver``. ``uplink`` has the node's own address."""

    is_overlay = False

    def __init__(self, *, uplink: str) -> None:
        super().__init__()
        self._uplink = uplink

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
        await guard.sweep([link.name for link in await self._links.links()])

    @property
    def mtu_bytes(self) -> int:
        return mtu_bytes(self._uplink)

    async def place(self, macs: Mapping[str, str]) -> None:
        """Nothing to do: the cloud knows."""

    async def plug(self, spec: EvmSpec) -> tuple[Port, ...]:
        """See ``NetworkDriver``. Raise ``Refused`` for an IPv6 address: this driver does not route them."""
        if foreign := [address for _, address in spec.addresses if ip_address(address).version != 4]:
            hint = "declare IPv4 addresses"
            raise Refused(f"the vpc driver does not route {foreign[0]}", field="addresses", hint=hint)
        return await super().plug(spec)

    def _port(self, spec: EvmSpec, number: int, index: int, descriptor: int) -> VpcPort:
        addresses = [address for _, address in _behind(spec, number)]
        return VpcPort(interface_name(spec.name, number), index, descriptor, addresses, macs=macs_of(spec))

    async def _plug(self, spec: EvmSpec, number: int) -> VpcPort:
        interface = interface_name(spec.name, number)
        uplink = await self._links.link(self._uplink)
        if uplink is None:
            raise HostError(f"the uplink {self._uplink} is gone", field="uplink")
        descriptor = tap.open_tap(interface)
        try:
            netlink.set_ipv6(interface, disable_ipv6=1)
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
            routes.add_neighbours(link.index, _behind(spec, number))
        except BaseException:
            os.close(descriptor)
            raise
        return port


def _behind(spec: EvmSpec, number: int) -> list[tuple[str, str]]:
    nic = spec.nics[number]
    return [(nic.mac, nic.address)] + [(pod.mac, pod.address) for pod in spec.pods if pod.nic == number]
