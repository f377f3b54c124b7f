"""What every driver does with the taps of this node's EVMs: make them, find them again, take them away.

Nothing is kept in a file: a tap's name says that it is ours, its alias which EVM and NIC it is for.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

from emp.host import netlink, tap
from emp.host.netlink import Link, Netlink
from emp.model.errors import EmpError, HostError
from emp.model.evm import EvmSpec
from emp.network import guard
from emp.network.base import Port

_PREFIX = "emp"
_ALIAS = "emp-evm"
QUEUE_FRAMES = 16_384
"""that a tap holds for a machine that does not read, for 0.8 s of 20,000 a second: a guest that begins to run on a busy
node falls behind by as much. Together they take 35 MB of the kernel's memory where each is of 1,500 bytes, and up to
1 GB where each is of the 64 KiB that a sender on the same node can leave to segmentation"""


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


class TapDriver(ABC):
    """The part of ``emp.network.base.NetworkDriver`` that does not depend on where a tap's frames go."""

    def __init__(self) -> None:
        self._links = Netlink()

    @abstractmethod
    def _port(self, spec: EvmSpec, number: int, index: int, descriptor: int) -> Port:
        """Return the port that a tap is for a NIC of the EVM."""

    @abstractmethod
    async def _plug(self, spec: EvmSpec, number: int) -> Port:
        """Make the tap of a NIC, blocked."""

    @property
    def no_ipv6(self) -> str | None:
        """See ``NetworkDriver``: a segment carries it, whatever the node itself has."""
        return None

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

    async def _tap_link(self, interface: str) -> Link:
        link = await self._links.link(interface)
        if link is None:
            raise HostError(f"the tap {interface} is not in this network namespace")
        return link
