"""What a volume costs in the blackout, by the kind of disk that the guest is given: ``make bench-disk-models``.

Two QEMUs on loopback without agents, a Linux guest of 256 MiB, every volume an NBD export under TLS as in a pool. The
guest goes back and forth; the pause is from QEMU's STOP at the source to its RESUME at the target. ``busy``: the guest
appends a record to each volume 10 times a second, with O_DIRECT and fdatasync. The kinds that were not chosen are built
here (design note 0010). Prints a table and writes ``build/bench/disk-models.json``. Needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from emp.host.tap import open_tap
from emp.hypervisor.base import (
    BlockDevice,
    LaunchPlan,
    Machine,
    MachineEvent,
    MachineEventKind,
    StreamLimits,
    StreamStatus,
)
from emp.hypervisor.qemu import QemuHypervisor, command_line, disks
from emp.lab.images import KERNEL_COMMAND_LINE, ensure_image
from emp.model.evm import EvmSpec, Nic
from emp.model.volume import NbdEndpoint
from emp.wire import dh
from emp.wire.pki import CertificateAuthority, Role

LOOPBACK = "127.0.0.1"
PATIENCE_S = 90.0
VOLUME_BYTES = 16 << 20
RECORDS_PER_S = 10
LIMITS = StreamLimits(downtime_limit_ms=10)
FIRST_SLOT = 8
DRIVERS = ("virtio-scsi-pci", "scsi-hd")
"""of the devices that are left out of the project's command line for another kind of disk"""

Devices = Callable[[EvmSpec, Sequence[BlockDevice]], list[str]]


def no_disks(spec: EvmSpec, volumes: Sequence[BlockDevice]) -> list[str]:
    """Return no device at all: what a machine costs without volumes."""
    return []


def one_controller(spec: EvmSpec, volumes: Sequence[BlockDevice], **options: Any) -> list[str]:
    """Return the project's own."""
    queues = min(spec.vcpus, command_line.MAX_QUEUES)
    argv = ["-device", json.dumps(disks.controller(queues) | {"bus": "pci.0", "addr": hex(FIRST_SLOT)} | options)]
    for slot, volume in enumerate(volumes):
        argv += ["-device", json.dumps(disks.disk(slot, volume))]
    return argv


def with_iothread(spec: EvmSpec, volumes: Sequence[BlockDevice]) -> list[str]:
    """Return the project's own, its queues served by a thread beside the main loop."""
    return ["-object", "iothread,id=io0", *one_controller(spec, volumes, iothread="io0")]


def one_queue(spec: EvmSpec, volumes: Sequence[BlockDevice]) -> list[str]:
    return one_controller(spec, volumes, num_queues=1)


def device_each(spec: EvmSpec, volumes: Sequence[BlockDevice]) -> list[str]:
    """Return a virtio-blk device on the bus for each volume."""
    argv = []
    for slot, volume in enumerate(volumes):
        disk: dict[str, Any] = {"driver": "virtio-blk-pci", "id": disks.disk_name(slot), "drive": disks.raw_name(slot)}
        disk |= {"serial": volume.serial, "num-queues": min(spec.vcpus, command_line.MAX_QUEUES)}
        disk |= {"bus": "pci.0", "addr": hex(FIRST_SLOT + slot), "disable-legacy": "on"}
        argv += ["-device", json.dumps(disk | {"write-cache": "on", "werror": "stop", "rerror": "stop"})]
    return argv


KINDS: dict[str, Devices] = {
    "none": no_disks,
    "virtio-scsi": one_controller,
    "virtio-scsi, 1 queue": one_queue,
    "virtio-scsi, iothread": with_iothread,
    "virtio-blk": device_each,
}


class Bench:
    """Two nodes and up to 16 volumes; ``with`` it."""

    def __init__(self, directory: Path, volumes: int) -> None:
        self.authority = CertificateAuthority.create(directory / "ca", "bench")
        self.image = ensure_image()
        self.directory = directory
        self.nodes = [self._node(name) for name in ("left", "right")]
        self.authority.issue(Role.CONTROLLER, "volumes", [LOOPBACK]).write(directory / "server")
        (directory / "server" / dh.FILE).write_bytes(dh.FFDHE2048)
        self._servers: list[subprocess.Popen[bytes]] = []
        self.volumes = [self._volume(number) for number in range(volumes)]

    def _node(self, name: str) -> QemuHypervisor:
        credentials = self.directory / f"credentials-{name}"
        self.authority.issue(Role.AGENT, name, [LOOPBACK]).write(credentials)
        return QemuHypervisor(run_dir=self.directory / name, credentials_dir=credentials, timeout_s=30)

    def _volume(self, number: int) -> BlockDevice:
        name, image = f"vol-{number}", self.directory / f"image-{number}"
        with image.open("wb") as file:
            file.truncate(VOLUME_BYTES)
        with socket.socket() as chosen:
            chosen.bind((LOOPBACK, 0))
            port = chosen.getsockname()[1]
        creds = f"tls-creds-x509,id=tls,endpoint=server,dir={self.directory / 'server'},verify-peer=yes"
        argv = ["qemu-nbd", "--format=raw", f"--export-name={name}", f"--bind={LOOPBACK}", f"--port={port}"]
        argv += ["--shared=0", "--persistent", "--object", creds, "--tls-creds=tls", "--cache=none"]
        self._servers.append(subprocess.Popen([*argv, str(image)], stderr=subprocess.DEVNULL))
        endpoint = NbdEndpoint(host=LOOPBACK, port=port, export=name, tls_hostname="controller-volumes")
        return BlockDevice(volume=name, serial=name, size_bytes=VOLUME_BYTES, source=endpoint)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.kill()
            server.wait()

    async def spec(self, vcpus: int, volumes: int) -> EvmSpec:
        facts = await self.nodes[0].facts()
        return EvmSpec(
            name="bench",
            uuid=uuid.uuid4(),
            memory_bytes=256 << 20,
            vcpus=vcpus,
            image="micro",
            image_digest=self.image.digest,
            machine=facts.default_machine,
            cpu_model=facts.default_cpu_model,
            nics=(Nic(mac="52:54:00:00:00:01", address="10.99.0.2", prefix_length=24),),
            volumes=tuple(volume.volume for volume in self.volumes[:volumes]),
        )

    async def launch(self, node: int, spec: EvmSpec, *, incoming: bool) -> Machine:
        tap = open_tap(f"b{secrets.token_hex(5)}")
        opened = tuple(self.volumes[: len(spec.volumes)])
        command = KERNEL_COMMAND_LINE
        try:
            plan = LaunchPlan(spec, self.image.kernel, self.image.initrd, command, (tap,), opened, incoming)
            return await self.nodes[node].launch(plan)
        finally:
            os.close(tap)


@contextlib.contextmanager
def kind_of_disk(devices: Devices) -> Iterator[None]:
    """Have every machine that is launched meanwhile get its disks from ``devices``."""
    real = command_line.command_line

    def patched(plan: LaunchPlan, **how: Any) -> list[str]:
        argv = real(plan, **how)
        kept: list[str] = []
        for word in argv:
            if any(word.startswith(f'{{"driver":"{name}"') for name in DRIVERS):
                kept.pop()  # its "-device"
            else:
                kept.append(word)
        at = kept.index("-S") if "-S" in kept else len(kept)
        return [*kept[:at], *devices(plan.spec, plan.volumes), *kept[at:]]

    with mock.patch("emp.hypervisor.qemu.hypervisor.command_line", patched):
        yield


@contextlib.asynccontextmanager
async def shell(machine: Machine) -> AsyncIterator[Callable[[str, str], Any]]:
    """Type a line into the guest's console and wait until it has said something."""
    reader, writer = await asyncio.open_unix_connection(str(machine.console_path))

    async def say(line: str, until: str) -> str:
        writer.write(line.encode() + b"\n")
        async with asyncio.timeout(PATIENCE_S):
            return (await reader.readuntil(until.encode())).decode(errors="replace")

    try:
        yield say
    finally:
        writer.close()
        await writer.wait_closed()


async def start_journals(machine: Machine, volumes: Sequence[BlockDevice]) -> None:
    async with shell(machine) as say:
        await say("", "# ")
        for volume in volumes:
            line = f"echo journal start {volume.serial} {RECORDS_PER_S} | nc 127.0.0.1 7778; echo do''ne"
            said = await say(line, "done\r\n")
            assert '"running": true' in said, said


async def check_journals(machine: Machine) -> None:
    async with shell(machine) as say:
        said = await say("echo journal status | nc 127.0.0.1 7778; echo do''ne", "done\r\n")
        assert '"errors": 0' in said, said


async def seen(events: AsyncIterator[MachineEvent], wanted: Callable[[MachineEvent], bool]) -> MachineEvent:
    async with asyncio.timeout(PATIENCE_S):
        async for event in events:
            assert event.kind is not MachineEventKind.GONE, event
            if wanted(event):
                return event
    raise AssertionError("the events ended")


def stream_is(status: StreamStatus) -> Callable[[MachineEvent], bool]:
    return lambda event: event.stream is status


@dataclass
class Pause:
    pause_ms: float
    qemu_downtime_ms: float


async def move(source: Machine, target: Machine, *, to: str, of: str) -> Pause:
    events, loaded, resumed = source.events(), target.events(), target.events()
    stops = source.events()
    port = await target.listen_for_stream(host=LOOPBACK, source=f"agent-{of}")
    await source.send_stream(host=LOOPBACK, port=port, target=f"agent-{to}", limits=LIMITS)
    await seen(events, stream_is(StreamStatus.PRE_SWITCHOVER))
    stopped = await seen(stops, lambda event: event.kind is MachineEventKind.STOPPED)
    await source.continue_stream()
    await seen(events, stream_is(StreamStatus.COMPLETED))
    await seen(loaded, stream_is(StreamStatus.COMPLETED))
    await target.cont()
    runs = await seen(resumed, lambda event: event.kind is MachineEventKind.RESUMED)
    info = await source.stream_info()
    return Pause((runs.at_s - stopped.at_s) * 1000, float(info.downtime_ms or 0))


async def measure(
    bench: Bench, kind: str, *, vcpus: int, volumes: int, busy: bool, runs: int, console: Console
) -> dict[str, Any]:
    """Return one row: the medians over ``runs`` migrations of one guest."""
    names = ("left", "right")
    spec = await bench.spec(vcpus, volumes)
    with kind_of_disk(KINDS[kind]):
        began = asyncio.get_running_loop().time()
        machine = await bench.launch(0, spec, incoming=False)
        async with shell(machine) as say:
            await say("", "# ")
        boot_s = asyncio.get_running_loop().time() - began
        if busy:
            await start_journals(machine, bench.volumes[:volumes])
        pauses = []
        for run in range(runs):
            here, there = run % 2, 1 - run % 2
            waiting = await bench.launch(there, spec, incoming=True)
            pauses.append(await move(machine, waiting, to=names[there], of=names[here]))
            await machine.kill()
            machine = waiting
            if busy:
                await check_journals(machine)
        await machine.kill()
    row = {
        "kind": kind,
        "vcpus": vcpus,
        "volumes": volumes,
        "io": "busy" if busy else "idle",
        "runs": runs,
        "boot_s": round(boot_s, 2),
        "pause_ms": {
            "median": round(statistics.median(one.pause_ms for one in pauses), 1),
            "worst": round(max(one.pause_ms for one in pauses), 1),
        },
        "qemu_downtime_ms": round(statistics.median(one.qemu_downtime_ms for one in pauses), 1),
    }
    console.print(row)
    return row


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table("disk", "vCPUs", "volumes", "I/O", "pause ms, median", "worst", "QEMU's downtime ms", "boot s")
    for row in rows:
        figures = row["pause_ms"]["median"], row["pause_ms"]["worst"], row["qemu_downtime_ms"], row["boot_s"]
        made.add_row(row["kind"], str(row["vcpus"]), str(row["volumes"]), row["io"], *map(str, figures))
    return made


async def measure_all(options: argparse.Namespace, directory: Path, console: Console) -> list[dict[str, Any]]:
    rows = []
    with Bench(directory, max(options.volumes)) as bench:
        for volumes, busy in [(volumes, busy) for volumes in options.volumes for busy in (False, True)]:
            for kind in options.kinds or KINDS:  # side by side, because the neighbours' load changes
                if (kind == "none" and volumes) or (busy and not volumes):
                    continue
                how = {"vcpus": options.vcpus, "volumes": volumes, "busy": busy, "runs": options.runs}
                rows.append(await measure(bench, kind, **how, console=console))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--volumes", type=int, nargs="+", default=[0, 1, 16])
    parser.add_argument("--kinds", nargs="*", choices=KINDS)
    options = parser.parse_args()
    console = Console(width=150)
    directory = Path(tempfile.mkdtemp(prefix="emp-disks-"))
    directory.chmod(0o755)  # its machines are users of their own
    try:
        rows = asyncio.run(measure_all(options, directory, console))
    finally:
        shutil.rmtree(directory)
    console.print(table(rows))
    output = Path("build/bench/disk-models.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
