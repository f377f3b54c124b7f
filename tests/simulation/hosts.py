"""What a host has besides its daemons: ports of EVMs, guest images, exports of volumes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp.agent.images import NodeImage
from emp.model.evm import EvmSpec
from emp.model.network import NO_TRAFFIC, Traffic
from emp.network.base import Swallowed
from tests.simulation.loop import here

if TYPE_CHECKING:
    from tests.simulation.world import World


class SimPort:
    """One NIC. It outlives the agent, as the tap does."""

    def __init__(self, network: SimNetwork, evm: str, tap_fd: int) -> None:
        self._network = network
        self.evm = evm
        self.is_open = False
        self.tap_fd = tap_fd

    @property
    def interface(self) -> str:
        return f"tap{self.tap_fd}"

    async def open(self) -> None:
        await self._network.acts("open port")
        self.is_open = True

    async def block(self) -> None:
        await self._network.acts("block port")
        self.is_open = False

    async def announce(self, addresses: Sequence[tuple[str, str]]) -> None:
        await self._network.acts("announce")
        self._network.world.announced(self.evm, self._network.node)

    def watch(self, macs: Sequence[str]) -> None:
        here()

    def stopped(self) -> None:
        here()

    @property
    def overflowed(self) -> int:
        return 0

    def swallowed(self, received: Sequence[int]) -> Swallowed:
        return Swallowed([], [])

    def thrown(self, before: Sequence[int], after: Sequence[int], hidden: int) -> list[bytes] | None:
        return []

    def pull(self, most: int) -> list[bytes]:
        raise NotImplementedError("nothing is sent to an EVM here")

    async def filled(self) -> None:
        raise NotImplementedError("nothing is sent to an EVM here")

    def forget(self) -> None:
        here()

    is_told = False

    def readdressed(self) -> None:
        here()

    async def moved(self) -> None:
        here()

    def release(self) -> None:
        here()

    def expect(self) -> None:
        here()

    def settle(self) -> None:
        here()

    def put(self, frames: Sequence[bytes]) -> int:
        return len(frames)

    async def allow(self, addresses: Collection[str]) -> None:
        await self._network.acts("allow addresses")

    def listen(self, heard: Callable[[str, str], None]) -> None:
        here()

    @property
    def mtu_bytes(self) -> int:
        return 1500

    def traffic(self) -> Traffic:
        here()
        return NO_TRAFFIC

    async def remove(self) -> None:
        await self._network.acts("remove port")
        ports = self._network.ports.get(self.evm, [])
        if self in ports:
            ports.remove(self)
        if not ports:
            self._network.ports.pop(self.evm, None)

    async def close(self) -> None:
        here()


class SimNetwork:
    """``emp.network.base.NetworkDriver`` of one node."""

    def __init__(self, world: World, node: str) -> None:
        self.world = world
        self.node = node
        self.ports: dict[str, list[SimPort]] = {}
        self._taps = 10

    async def acts(self, what: str) -> None:
        await self.world.moment(what, self.node)
        await asyncio.sleep(self.world.rng.uniform(0.0001, 0.002))
        here()

    async def start(self) -> None:
        here()

    @property
    def mtu_bytes(self) -> int:
        return 1500

    @property
    def is_overlay(self) -> bool:
        return False

    @property
    def no_ipv6(self) -> str | None:
        return None

    async def place(self, macs: Mapping[str, str]) -> None:
        here()

    async def plug(self, spec: EvmSpec) -> tuple[SimPort, ...]:
        await self.acts("plug")
        self._taps += len(spec.nics)
        ports = [SimPort(self, spec.name, self._taps - n) for n in range(len(spec.nics))]
        self.ports[spec.name] = ports
        return tuple(ports)

    async def adopt(self, spec: EvmSpec, tap_fds: Sequence[int]) -> tuple[SimPort, ...]:
        await self.acts("adopt ports")
        return tuple(port for port in self.ports.get(spec.name, ()) if port.tap_fd in tap_fds)

    async def leftovers(self) -> frozenset[str]:
        here()
        return frozenset(self.ports)

    async def remove(self, evm: str) -> None:
        await self.acts("remove ports")
        self.ports.pop(evm, None)

    async def close(self) -> None:
        here()


class SimImages:
    """Every node has the one image."""

    def all(self) -> list[NodeImage]:
        return [NodeImage(name="micro", digest="sha256:aaaa", kernel_command_line="")]

    def get(self, name: str) -> tuple[NodeImage, Path, Path]:
        return self.all()[0], Path("kernel"), Path("initrd")


class SimExport:
    """One attachment's qemu-nbd: it outlives the volume daemon, unless its host goes."""

    restarts = 0

    def __init__(self, world: World, spec: Any) -> None:
        self._world = world
        self._name: str = spec.name

    async def open(self) -> None:
        await self._world.moment(f"export {self._name}", "vol")
        await asyncio.sleep(self._world.rng.uniform(0.005, 0.05))
        here()
        with self._world.disturbance():
            self._world.exports[self._name] = None

    async def close(self) -> None:
        await self._world.moment(f"end export {self._name}", "vol")
        await asyncio.sleep(self._world.rng.uniform(0.001, 0.02))
        here()
        with self._world.disturbance():
            self._world.exports.pop(self._name, None)
