"""The data plane of network interfaces: routes of the lab's router, in the fabric's network namespace.

An address is routed to the node that has it, by way of the node's own address, so that no ARP asks for it: as on AWS,
where what is sent to an address arrives at the interface that has it, whoever claims it. All interfaces of a node end
at its one uplink, and what the source/destination check of its primary one says goes for all of it: with the check on,
what comes from there under an address that is not routed there is dropped: a strict reverse-path filter, for IPv6 a
rule of nftables.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass

from emp.host.run import run
from emp.lab.cloud.network_plane import PlaneInterface
from emp.model.errors import CommandFailed, HostError


@dataclass(frozen=True)
class Port:
    """Where a node is."""

    segment: str
    """the fabric's interface to it"""
    address: str
    """its own, whose route is there from the start"""
    ipv6: str | None = None
    """as ``address``"""

    def gateway(self, version: int) -> str:
        """Return the address that leads to those of its EVMs. Raises ``HostError`` where it has none."""
        own = self.address if version == 4 else self.ipv6
        if own is None:
            raise HostError(f"the node on {self.segment} has no IPv6 address, by which others could be routed to it")
        return own


_CHECKED = "emp-checked"
_SOURCE_CHECK = f"""
table ip6 {_CHECKED} {{
    set segments {{ type ifname; }}
    chain arriving {{
        type filter hook prerouting priority raw; policy accept;
        iifname @segments ip6 saddr != fe80::/10 fib saddr . iif oif missing drop
    }}
}}
"""
"""by the name of a bridge: what comes in at its port is the bridge's in this hook"""


class Fabric:
    """See ``NetworkPlane``. ``descriptor``: of the fabric's namespace; ``ports``: instance -> where it is.

    The routes outlive the cloud, so that packets arrive while it is away.
    """

    def __init__(self, descriptor: int, ports: Mapping[str, Port]) -> None:
        self._namespace = f"/proc/{os.getpid()}/fd/{descriptor}"
        self._ports = dict(ports)
        self._own = {own for port in ports.values() for own in (port.address, port.ipv6) if own is not None}

    async def on_address_moved(self, address: str, interface: PlaneInterface | None) -> None:
        """Raises ``HostError``. A node's own address is its primary interface's, from which it never moves."""
        destination = ipaddress.ip_network(address)
        if address in self._own:
            if interface is not None:
                await self._check(self._ports[interface.instance], interface.source_dest_check)
            return
        if interface is not None:
            port = self._ports[interface.instance]
            gateway = port.gateway(destination.version)
            await self._ip("route", "replace", str(destination), "via", gateway, "dev", port.segment, "onlink")
            return
        try:
            await self._ip("route", "del", str(destination))
        except CommandFailed as error:
            if "No such process" not in error.details["stderr"]:  # there is no such route
                raise

    async def _check(self, port: Port, on: bool) -> None:
        setting = f"net.ipv4.conf.{port.segment}.rp_filter={int(on)}"
        await run("nsenter", f"--net={self._namespace}", "sysctl", "-q", "-w", setting)
        # Without the check no element: to add one first makes it no error that there was none.
        element = f"element ip6 {_CHECKED} segments {{ {port.segment} }}\n"
        script = f"{_SOURCE_CHECK}add {element}" + ("" if on else f"delete {element}")
        await run("nsenter", f"--net={self._namespace}", "nft", "-f", "-", stdin=script)

    async def _ip(self, *words: str) -> None:
        await run("nsenter", f"--net={self._namespace}", "ip", *words)
