"""Two nodes' QEMU drivers on loopback, and a guest small enough to boot in a tenth of a second, for tests.

The guest is 214 bytes of real-mode code in the shape of a Linux kernel. It prints ``R`` on its serial console and then
answers each byte with the next of ``0``, ``1``, ``2``...: a count that only goes on if its memory did. Some bytes also
make it act: ``d`` rewrites a word in each page of 64 MiB for ever, ``q`` stops that, ``r`` resets the machine, ``s``
powers it off (as does the power button), ``p`` panics through pvpanic.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from emp.host.tap import open_tap, tap_interface
from emp.hypervisor.base import (
    BlockDevice,
    LaunchPlan,
    Machine,
    MachineEvent,
    MachineEventKind,
    StreamLimits,
    StreamStatus,
)
from emp.hypervisor.qemu import QemuHypervisor, QemuMachine
from emp.hypervisor.qemu.qmp import QmpSession
from emp.model.evm import EvmSpec, Nic
from emp.wire.pki import CertificateAuthority, Role

LOOPBACK = "127.0.0.1"
PATIENCE_S = 60.0

# Entered by QEMU's linuxboot ROM at CS:0 of the second sector. In AT&T syntax (assembles with `as --32`):
#
#   start:  cli; xorl %eax,%eax; movw %cs,%ax; movw %ax,%ds; shll $4,%eax; addl $(gdt-seg),%eax; movl %eax,gdtr+2-seg
#           lgdtl gdtr-seg; movl %cr0,%eax; orb $1,%al; movl %eax,%cr0; movw $8,%bx; movw %bx,%fs   # fs: 4 GiB limit
#           andb $0xfe,%al; movl %eax,%cr0; xorw %bx,%bx; movw %bx,%fs
#           movw $0x602,%dx; movw $0x100,%ax; outw %ax,%dx                # enable the power button's status bit
#           movb $'0',%ch; movb $'R',%al; call put
#   loop:   movw $0x600,%dx; inw %dx,%ax; testb $1,%ah; jnz off           # pressed?
#           movw $0x3fd,%dx; inb %dx,%al; testb $1,%al; jnz got; testb %bl,%bl; jnz dirty; sti; hlt; cli; jmp loop
#   dirty:  movl $0x200000,%edi
#   1:      incl %esi; movl %esi,%fs:(%edi); addl $4096,%edi; cmpl $0x4200000,%edi; jb 1b; jmp loop
#   got:    movw $0x3f8,%dx; inb %dx,%al; cmpb $'s',%al; je off; cmpb $'r',%al; je reset; cmpb $'p',%al; je panic
#           cmpb $'d',%al; jne 2f; movb $1,%bl
#   2:      cmpb $'q',%al; jne 3f; movb $0,%bl
#   3:      movb %ch,%al; call put; incb %ch; jmp loop
#   put:    movw $0x3f8,%dx; outb %al,%dx; ret
#   off:    movw $0x604,%dx; movw $0x2000,%ax; outw %ax,%dx; jmp loop     # ACPI S5
#   reset:  movb $0xfe,%al; outb %al,$0x64; jmp loop                      # keyboard controller
#   panic:  movw $0x505,%dx; movb $1,%al; outb %al,%dx; jmp loop         # the ISA pvpanic's port
#           .balign 8
#   gdt:    .quad 0, 0x00cf92000000ffff
#   gdtr:   .word 15; .long 0
_CODE = base64.b64decode(
    "+mYxwIzIjthmweAEZgUoAQAAZqM6AWYPARY4AQ8gwAwBDyLAuwgAjuMk/g8iwDHbjuO6Aga4AAHvtTCwUuheALoABu32xAF1Wrr9A+yoAXUohNt1"
    "Bfv0+uvmZr8AACAAZkZkZ2aJN2aBxwAQAABmgf8AACAEcunrx7r4A+w8c3QiPHJ0JzxwdCk8ZHUCswE8cXUCswCI6OgEAP7F66K6+APuw7oEBrgA"
    "IO/rlLD+5mTrjroFBbAB7uuGjbQAAGaQAAAAAAAAAAD//wAAAJLPAA8AAAAAAA=="
)


def write_guest(directory: Path) -> tuple[Path, Path]:
    """Write the guest's kernel and initrd, and return their paths."""
    boot_sector = bytearray(512)
    boot_sector[0x1F1] = 1  # one sector of setup code
    boot_sector[0x1FE:] = b"\x55\xaa"
    header = b"\xeb\x66" + b"HdrS" + b"\x02\x02" + bytes(9) + b"\x01"  # jump over it; boot protocol 2.2; loaded high
    setup = header.ljust(0x68, b"\0") + _CODE
    kernel, initrd = directory / "kernel", directory / "initrd"
    kernel.write_bytes(bytes(boot_sector) + setup.ljust(512, b"\0") + bytes(512))
    initrd.write_bytes(bytes(512))
    return kernel, initrd


class Console:
    """The guest's serial console."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def read(self) -> str:
        async with asyncio.timeout(PATIENCE_S):
            return (await self._reader.readexactly(1)).decode()

    async def say(self, byte: str) -> None:
        self._writer.write(byte.encode())
        await self._writer.drain()

    async def ask(self, byte: str = "?") -> str:
        """Say one byte and return the guest's answer, its count."""
        await self.say(byte)
        return await self.read()


def console(machine: Machine) -> contextlib.AbstractAsyncContextManager[Console]:
    return console_at(machine.console_path)


class Talker(Protocol):
    """A guest's console, real or fake."""

    async def ask(self, byte: str = "?") -> str: ...


async def rewriting(guest: Talker) -> None:
    """Have the guest rewrite 64 MiB for ever; return when it does, which the answer to the order alone does not say.

    It listens between two rounds: of four answers, some came after one.
    """
    for count, byte in enumerate("d???"):
        assert await guest.ask(byte) == str(count)


@contextlib.asynccontextmanager
async def console_at(path: Path) -> AsyncIterator[Console]:
    """The console of a machine that is there or is just being launched."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(0.001)
    try:
        yield Console(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def until(
    events: AsyncIterator[MachineEvent], wanted: Callable[[MachineEvent], bool], *, timeout_s: float = PATIENCE_S
) -> list[MachineEvent]:
    """Return the events up to and with the first that is ``wanted``; fail with those that came instead."""
    seen: list[MachineEvent] = []
    try:
        async with asyncio.timeout(timeout_s):
            async for event in events:
                seen.append(event)
                if wanted(event):
                    return seen
    except TimeoutError:
        raise AssertionError(f"did not come in {timeout_s} s; came: {seen}") from None
    raise AssertionError(f"did not come before the end; came: {seen}")


def is_kind(kind: MachineEventKind) -> Callable[[MachineEvent], bool]:
    return lambda event: event.kind is kind


def is_stream(*statuses: StreamStatus) -> Callable[[MachineEvent], bool]:
    return lambda event: event.stream in statuses


@dataclass
class Node:
    """One node's driver; its certificate is ``agent-<name>``."""

    name: str
    hypervisor: QemuHypervisor
    run_dir: Path
    """of its machines"""
    credentials_dir: Path

    @property
    def identity(self) -> str:
        return f"agent-{self.name}"


@dataclass
class Bench:
    """Nodes with certificates of one pool. Machines that are alive when the bench is closed are killed."""

    directory: Path
    authority: CertificateAuthority = field(init=False)
    nodes: dict[str, Node] = field(default_factory=dict)
    specs: dict[str, EvmSpec] = field(default_factory=dict)
    """the latest of each name"""
    tap_names: list[str] = field(default_factory=list)
    _taps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.authority = CertificateAuthority.create(self.directory / "ca", "bench")
        self.kernel, self.initrd = write_guest(self.directory)

    def node(self, name: str, *, timeout_s: float = 5.0, authority: CertificateAuthority | None = None) -> Node:
        """Return the node, making it first."""
        if name not in self.nodes:
            credentials = self.directory / f"credentials-{name}"
            (authority or self.authority).issue(Role.AGENT, name, [LOOPBACK]).write(credentials)
            run_dir = self.directory / f"run-{name}"
            driver = QemuHypervisor(run_dir=run_dir, credentials_dir=credentials, timeout_s=timeout_s)
            self.nodes[name] = Node(name, driver, run_dir / "evm", credentials)
        return self.nodes[name]

    async def spec(self, name: str = "one", **changes: object) -> EvmSpec:
        facts = await self.node("left").hypervisor.facts()
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
        spec = spec.model_copy(update=changes)
        self.specs[name] = spec
        return spec

    @property
    def left(self) -> Node:
        return self.node("left")

    @property
    def right(self) -> Node:
        return self.node("right")

    def plan(self, spec: EvmSpec, *, incoming: bool = False, volumes: tuple[BlockDevice, ...] = ()) -> LaunchPlan:
        """Return a plan with a fresh tap for each NIC; the bench closes its own copies."""
        names = [f"t{secrets.token_hex(5)}" for _ in spec.nics]
        self.tap_names += names
        taps = tuple(map(open_tap, names))
        self._taps += taps
        return LaunchPlan(spec, self.kernel, self.initrd, "", taps, volumes, incoming)

    async def booted(self, name: str = "one", volumes: tuple[BlockDevice, ...] = ()) -> QemuMachine:
        """Return a machine on the left whose guest has answered."""
        spec = await self.spec(name, volumes=tuple(device.volume for device in volumes))
        async with asyncio.TaskGroup() as both:
            # Connected while QEMU starts: the guest says R once, and what it says to nobody is gone.
            answered = both.create_task(self._first_words(self.left.run_dir / name / "console"))
            machine = await self.left.hypervisor.launch(self.plan(spec, volumes=volumes))
        assert answered.result() == "R"
        return machine

    async def _first_words(self, path: Path) -> str:
        async with console_at(path) as guest:
            return await guest.read()

    async def pair(self) -> tuple[QemuMachine, QemuMachine]:
        """Return a booted machine on the left, and one on the right that waits for it."""
        source = await self.booted()
        return source, await self.right.hypervisor.launch(self.plan(self.specs["one"], incoming=True))

    def console(self, machine: Machine) -> contextlib.AbstractAsyncContextManager[Console]:
        return console(machine)

    async def say(self, machine: Machine, command: str) -> None:
        """Say a command to QEMU itself, past the driver."""
        assert isinstance(machine, QemuMachine)
        monitor = QmpSession(machine.guard_path, timeout_s=PATIENCE_S)
        await monitor.open()
        try:
            await monitor.execute(command)
        finally:
            await monitor.close()

    def sigkill(self, machine: Machine) -> None:
        """Its process dies, as seen from outside."""
        os.kill(machine.process.pid, signal.SIGKILL)

    def is_its_tap(self, descriptor: int) -> bool:
        """Whether a descriptor, which is closed here, is of a tap of one of the plans."""
        interface = tap_interface(descriptor)
        os.close(descriptor)
        return interface in self.tap_names

    def frozen(self, machine: Machine) -> contextlib.AbstractContextManager[None]:
        return frozen(machine)

    async def close(self) -> None:
        for node in self.nodes.values():
            for name, process in (await node.hypervisor.found()).items():
                await node.hypervisor.kill_stranger(name, process)
        for tap in self._taps:
            os.close(tap)


@contextlib.asynccontextmanager
async def bench(directory: Path) -> AsyncIterator[Bench]:
    """A bench; its nodes must be left as clean as they were."""
    made = Bench(directory)
    try:
        yield made
    finally:
        await made.close()
    assert leftovers(*made.nodes.values()) == []


@contextlib.contextmanager
def frozen(machine: Machine) -> Iterator[None]:
    """The process exists and does nothing."""
    os.kill(machine.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(machine.process.pid, signal.SIGCONT)


class Named(Protocol):
    """A node, real or fake."""

    @property
    def identity(self) -> str: ...


async def start_stream(
    source: Machine, target: Machine, *, to: Named, source_name: str, limits: StreamLimits | None = None
) -> None:
    """Connect the two and start pre-copy."""
    port = await target.listen_for_stream(host=LOOPBACK, source=source_name)
    await source.send_stream(host=LOOPBACK, port=port, target=to.identity, limits=limits or StreamLimits())


def leftovers(*nodes: Node) -> list[Path]:
    """Everything under the nodes' run directories."""
    return [path for node in nodes for path in node.run_dir.rglob("*")]
