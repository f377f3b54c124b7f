"""A machine with its ports and console, as one thing that is put together and taken apart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

from emp.agent.addresses import Addresses, Seen, SeenFiles
from emp.agent.console import Console
from emp.agent.devices import Devices
from emp.agent.images import Images
from emp.agent.relays import Relays, Side
from emp.agent.shelf import Entry
from emp.hypervisor.base import BlockDevice, Hypervisor, LaunchPlan, Machine, ProcessId
from emp.model.errors import HostError
from emp.model.evm import EvmSpec
from emp.network.base import NetworkDriver, Port

log = logging.getLogger(__name__)


@dataclass
class Assembly:
    """One EVM's machine on this node."""

    spec: EvmSpec
    machine: Machine
    ports: tuple[Port, ...]
    addresses: Addresses
    console: Console
    relays: Relays

    async def open_ports(self) -> None:
        for port in self.ports:
            await port.open()

    async def block_ports(self) -> None:
        for port in self.ports:
            await port.block()

    async def announce(self) -> None:
        """Every address of the EVM and its pods, each from the port that it is behind."""
        await self.addresses.announce()

    async def dismantle(self) -> None:
        """Kill the machine, wait for its exit, take its relays and ports away. Idempotent."""
        await self.console.close()
        await self.machine.kill()
        await self.relays.end_of(self.spec.name, Side.BORROWED)
        for port in self.ports:
            await port.remove()
        self.addresses.forget()

    async def close(self) -> None:
        """Let go without touching anything: the agent stops, the EVM goes on."""
        await self.console.close()
        await self.machine.close()
        for port in self.ports:
            await port.close()


class Assembler:
    def __init__(
        self,
        hypervisor: Hypervisor,
        network: NetworkDriver,
        images: Images,
        devices: Devices,
        relays: Relays,
        seen: SeenFiles,
    ) -> None:
        self.hypervisor = hypervisor
        self.network = network
        self.images = images
        self.devices = devices
        self.relays = relays
        self.seen = seen

    async def assemble(self, entry: Entry, *, incoming: bool) -> Assembly:
        """Volumes that are there, blocked ports, then a machine that boots or waits for a stream.

        Nothing is left behind if that fails.
        """
        spec = entry.spec
        image, kernel, initrd = self.images.get(spec.image)
        if image.digest != spec.image_digest:
            raise HostError(
                f"image {spec.image!r} on this node is another build than the EVM's",
                field="image",
                hint="install the same image on every node",
            )
        ports: tuple[Port, ...] = ()
        try:
            volumes = await self._volumes(entry)
            ports = await self.network.plug(spec)
            plan = LaunchPlan(
                spec=spec,
                kernel=Path(kernel),
                initrd=Path(initrd),
                kernel_command_line=image.kernel_command_line,
                tap_fds=tuple(port.tap_fd for port in ports),
                volumes=volumes,
                incoming=incoming,
                mtus_bytes=tuple(port.mtu_bytes for port in ports),
            )
            machine = await self.hypervisor.launch(plan)
        except BaseException:
            for port in ports:
                await port.remove()
            await self.relays.end_of(spec.name, Side.BORROWED)
            raise
        return await self._assembled(spec, machine, ports, None)

    async def _volumes(self, entry: Entry) -> tuple[BlockDevice, ...]:
        """Return what each volume is opened from, in the EVM's order."""
        own = await self.devices.open_all([grant for grant in entry.volumes if grant.relay is None])
        lent = [grant for grant in entry.volumes if grant.relay is not None]
        borrowed = await asyncio.gather(*(self.relays.borrow(entry.spec.name, grant) for grant in lent))
        opened = {device.volume: device for device in (*own, *borrowed)}
        return tuple(opened[grant.volume.id] for grant in entry.volumes)

    async def adopt(self, spec: EvmSpec, process: ProcessId) -> Assembly:
        """Take back what an earlier agent process of this node had made; nothing happens to the guest."""
        machine = await self.hypervisor.adopt(spec, process)
        try:
            ports = await self.network.adopt(spec, await machine.tap_fds())
        except BaseException:
            await machine.close()  # it is adopted again: a monitor of QEMU's serves one client
            raise
        return await self._assembled(spec, machine, ports, self.seen.get(spec.name))

    async def clear(self, evm: str, process: ProcessId | None) -> None:
        """Kill a machine that has lost, and take every relay and port of the EVM away. Idempotent."""
        if process is not None:
            await self.hypervisor.kill_stranger(evm, process)
        await self.relays.end_of(evm, Side.BORROWED)
        await self.network.remove(evm)
        self.seen.drop(evm)

    async def _assembled(self, spec: EvmSpec, machine: Machine, ports: tuple[Port, ...], seen: Seen | None) -> Assembly:
        addresses = Addresses(spec, ports, self.seen, seen=seen)
        with contextlib.suppress(HostError):  # a machine that has just died has no tap; its GONE event tells
            addresses.listen()
        console = Console(machine.console_path)
        with contextlib.suppress(OSError):  # a machine that has just died has no console; its GONE event tells
            async with asyncio.timeout(2):
                await console.start()
        return Assembly(spec, machine, ports, addresses, console, self.relays)
