"""The bench of the hypervisor drivers' contract suite, with fake QEMUs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from emp.hypervisor.base import BlockDevice, LaunchPlan, Machine
from emp.model.evm import EvmSpec, Nic
from tests.fakes.fabric import Fabric
from tests.fakes.hypervisor import FakeHypervisor, FakeMachine
from tests.fakes.qemu import FakeQemu


@dataclass
class FakeNode:
    name: str
    hypervisor: FakeHypervisor

    @property
    def identity(self) -> str:
        return self.hypervisor.identity


class FakeConsole:
    """What the tiny guest of ``tests.qemu_bench`` says and does."""

    def __init__(self, qemu: FakeQemu) -> None:
        self._qemu = qemu
        self._said: asyncio.Queue[str] = asyncio.Queue()
        guest = qemu.guest
        if guest is not None and guest.answers == 0:
            self._said.put_nowait("R")

    async def read(self) -> str:
        async with asyncio.timeout(5):
            return await self._said.get()

    async def say(self, byte: str) -> None:
        while not self._said.empty():
            self._said.get_nowait()
        guest = self._qemu.guest
        assert guest is not None
        match byte:
            case "r":
                self._qemu.reset()
                self._said.put_nowait("R")
                return
            case "s":
                self._qemu.press_power_button()
                return
            case "p":
                self._qemu.panic()
                return
            case "d":
                guest = replace(guest, dirty_bytes_per_s=1e12, working_set_bytes=64 << 20)
            case "q":
                guest = replace(guest, dirty_bytes_per_s=0.0)
        self._qemu.guest = replace(guest, answers=guest.answers + 1)
        self._said.put_nowait(str(guest.answers))

    async def ask(self, byte: str = "?") -> str:
        await self.say(byte)
        return await self.read()


@dataclass
class FakeBench:
    """Nodes on a quiet fabric."""

    fabric: Fabric
    nodes: dict[str, FakeNode] = field(default_factory=dict)
    specs: dict[str, EvmSpec] = field(default_factory=dict)
    _taps: itertools.count[int] = field(default_factory=lambda: itertools.count(10))

    def node(self, name: str, *, timeout_s: float = 5.0) -> FakeNode:
        if name not in self.nodes:
            self.nodes[name] = FakeNode(name, FakeHypervisor(self.fabric, name, role="agent", timeout_s=timeout_s))
        return self.nodes[name]

    @property
    def left(self) -> FakeNode:
        return self.node("left")

    @property
    def right(self) -> FakeNode:
        return self.node("right")

    async def spec(self, name: str = "one", **changes: object) -> EvmSpec:
        facts = await self.left.hypervisor.facts()
        nic = Nic(mac="52:54:00:00:00:01", address="10.99.0.2", prefix_length=24)
        spec = EvmSpec(
            name=name,
            uuid=uuid4(),
            memory_bytes=128 << 20,
            vcpus=1,
            image="tiny",
            image_digest="none",
            machine=facts.default_machine,
            cpu_model=facts.default_cpu_model,
            nics=(nic,),
        )
        self.specs[name] = spec.model_copy(update=changes)
        return self.specs[name]

    def plan(self, spec: EvmSpec, *, incoming: bool = False, volumes: tuple[BlockDevice, ...] = ()) -> LaunchPlan:
        return LaunchPlan(spec, Path("kernel"), Path("initrd"), "", (next(self._taps),), volumes, incoming)

    async def booted(self, name: str = "one", volumes: tuple[BlockDevice, ...] = ()) -> FakeMachine:
        spec = await self.spec(name, volumes=tuple(device.volume for device in volumes))
        machine = await self.left.hypervisor.launch(self.plan(spec, volumes=volumes))
        assert machine.qemu.guest is not None
        machine.qemu.guest = replace(machine.qemu.guest, dirty_bytes_per_s=0.0, uses_volumes=False)  # it is idle
        return machine

    async def pair(self) -> tuple[FakeMachine, FakeMachine]:
        source = await self.booted()
        return source, await self.right.hypervisor.launch(self.plan(self.specs["one"], incoming=True))

    @contextlib.asynccontextmanager
    async def console(self, machine: Machine) -> AsyncIterator[FakeConsole]:
        yield FakeConsole(self._qemu(machine))

    async def say(self, machine: Machine, command: str) -> None:
        """Say a command to QEMU itself, past the driver."""
        qemu = self._qemu(machine)
        {"cont": qemu.cont, "stop": qemu.stop}[command]()

    def sigkill(self, machine: Machine) -> None:
        self._qemu(machine).die()

    def is_its_tap(self, descriptor: int) -> bool:
        return any(descriptor in qemu.plan.tap_fds for qemu in self.fabric.qemus)

    @contextlib.contextmanager
    def frozen(self, machine: Machine) -> Iterator[None]:
        """The process exists and does nothing."""
        qemu = self._qemu(machine)
        qemu.hang()
        try:
            yield
        finally:
            qemu.wake()

    def _qemu(self, machine: Machine) -> FakeQemu:
        return next(q for q in self.fabric.qemus if q.process == machine.process)


@contextlib.asynccontextmanager
async def fake_bench() -> AsyncIterator[FakeBench]:
    bench = FakeBench(Fabric(random.Random(1)))
    try:
        yield bench
    finally:
        await bench.fabric.close()
