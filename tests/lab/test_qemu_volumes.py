"""Volumes of a running Linux guest change below it: moved, plugged, unplugged, grown, under the guest's own I/O."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from emp.hypervisor.base import BlockDevice, LaunchPlan, Machine, RelaySocket, RunState, StreamStatus
from emp.hypervisor.qemu import QemuMachine, disks
from emp.hypervisor.qemu.qmp import QmpSession
from emp.lab.images import KERNEL_COMMAND_LINE, ensure_image
from emp.lab.journal_check import check_journal
from emp.model.errors import Conflict, OutcomeUnknown
from emp.model.evm import EvmSpec
from emp.model.volume import HostDevice
from tests.qemu_bench import Bench, bench, is_stream, start_stream, until
from tests.qemu_storage import MEBIBYTE, PATIENCE_S, Storage

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines can be started by root only")

HZ = 100
"""records a second that a guest appends to a volume"""


@dataclass
class Guest:
    """The shell on a guest's console."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def run(self, line: str) -> str:
        """Return what a command prints."""
        self.writer.write(f"echo be''gin; {line}; echo en''d\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            await self.reader.readuntil(b"begin\r\n")
            said = await self.reader.readuntil(b"end\r\n")
        return said.decode().removesuffix("end\r\n").strip()

    async def ask(self, command: str) -> Any:
        return json.loads(await self.run(f"echo {command} | nc 127.0.0.1 7778"))

    async def start_journal(self, serial: str) -> None:
        assert (await self.ask(f"journal start {serial} {HZ}"))["running"] is True

    async def journal(self) -> dict[str, Any]:
        (status,) = await self.ask("journal status")
        return dict(status)

    async def goes_on(self) -> None:
        """The journal writes, and has met no error."""
        goal = (await self.journal())["acked_seq"] + 10
        async with asyncio.timeout(PATIENCE_S):
            while (await self.journal())["acked_seq"] < goal:  # noqa: ASYNC110 - the console tells nothing by itself
                await asyncio.sleep(0.05)
        assert (await self.journal())["errors"] == 0

    async def stop_journal(self) -> dict[str, Any]:
        (status,) = await self.ask("journal stop")
        return dict(status)

    async def sectors(self) -> dict[str, int]:
        """Return SCSI address -> size in sectors, of every disk."""
        each = "echo $(basename $(readlink -f $d/device)) $(cat $d/size)"
        shown = await self.run(f"for d in /sys/block/sd*; do [ -e $d ] && {each}; done")
        return {address: int(size) for address, size in map(str.split, shown.splitlines())}

    async def until_disks(self, *addresses: str) -> None:
        """Wait until the guest has noticed: it is told, and looks for itself."""
        async with asyncio.timeout(PATIENCE_S):
            while set(await self.sectors()) != set(addresses):  # noqa: ASYNC110 - the console tells nothing by itself
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def guest_of(machine: Machine) -> AsyncIterator[Guest]:
    reader, writer = await asyncio.open_unix_connection(str(machine.console_path))
    try:
        writer.write(b"\n")
        async with asyncio.timeout(PATIENCE_S):
            await reader.readuntil(b":/# ")
        yield Guest(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path) as made:
        yield made


@pytest.fixture
def storage(nodes: Bench) -> Iterator[Storage]:
    made = Storage(nodes)
    with made.opened:
        yield made


async def linux(nodes: Bench, *volumes: BlockDevice, **changes: Any) -> EvmSpec:
    return await nodes.spec("linux", memory_bytes=256 * MEBIBYTE, volumes=tuple(v.volume for v in volumes), **changes)


async def plan(nodes: Bench, spec: EvmSpec, *volumes: BlockDevice, incoming: bool = False) -> LaunchPlan:
    image = await asyncio.to_thread(ensure_image)
    return replace(
        nodes.plan(spec, incoming=incoming),
        kernel=image.kernel,
        initrd=image.initrd,
        kernel_command_line=KERNEL_COMMAND_LINE,
        volumes=volumes,
    )


async def booted(nodes: Bench, *volumes: BlockDevice) -> Machine:
    spec = await linux(nodes, *volumes)
    return await nodes.left.hypervisor.launch(await plan(nodes, spec, *volumes))


async def moved(nodes: Bench, source: Machine, spec: EvmSpec, *volumes: BlockDevice) -> Machine:
    """Return the machine on the right, which runs on; the left one is gone."""
    target = await nodes.right.hypervisor.launch(await plan(nodes, spec, *volumes, incoming=True))
    sent, loaded = source.events(), target.events()
    await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
    await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
    await source.continue_stream()
    await until(sent, is_stream(StreamStatus.COMPLETED))
    await until(loaded, is_stream(StreamStatus.COMPLETED))
    await target.cont()
    await source.kill()
    return target


def check_records(storage: Storage, name: str, status: dict[str, Any]) -> None:
    """Everything that was acknowledged is in the file, whole and in order."""
    found = check_journal(storage.image(name))
    assert found.ok, found
    assert status["errors"] == 0
    assert status["acked_seq"] > 0
    assert found.missing(status["acked_seq"]) == 0


def has_open(machine: Machine, path: str) -> bool:
    """Whether the machine's process has a descriptor of it."""
    opened = Path(f"/proc/{machine.process.pid}/fd").iterdir()
    return any(str(each.readlink()) == path for each in opened)


class TestMove:
    async def test_under_io_no_write_is_lost_and_none_fails(self, nodes: Bench, storage: Storage) -> None:
        export, relay, device = (of("v") for of in (storage.export, storage.relay, storage.attached))
        assert isinstance(device.source, HostDevice)
        machine = await booted(nodes, relay)
        async with guest_of(machine) as guest:
            await guest.start_journal("v")
            for source in (device, export, relay, device, export, device, relay):
                await machine.move_volume(source)
                assert has_open(machine, device.source.path) == (source is device)
                await guest.goes_on()
            status = await guest.stop_journal()
        check_records(storage, "v", status)
        await machine.kill()

    async def test_while_paused_with_io_on_its_way(self, nodes: Bench, storage: Storage) -> None:
        machine = await booted(nodes, storage.export("v"))
        async with guest_of(machine) as guest:
            await guest.start_journal("v")
            for source in (storage.attached("v"), storage.relay("v")):
                await guest.goes_on()
                await machine.stop()
                await machine.move_volume(source)
                assert await machine.run_state() is RunState.PAUSED
                await machine.cont()
            await guest.goes_on()
            status = await guest.stop_journal()
        check_records(storage, "v", status)
        await machine.kill()

    @pytest.mark.parametrize("cut", ["nothing but a descriptor given", "opened", "in use, the old one not closed"])
    async def test_what_an_agent_that_died_had_begun_is_finished(
        self, nodes: Bench, storage: Storage, cut: str
    ) -> None:
        old, new = storage.export("v"), storage.attached("v")
        assert isinstance(new.source, HostDevice)
        machine = await booted(nodes, old)
        async with guest_of(machine) as guest:
            await guest.start_journal("v")
            assert isinstance(machine, QemuMachine)
            monitor = QmpSession(machine.guard_path, timeout_s=5)
            await monitor.open()
            descriptor = os.open(new.source.path, os.O_RDWR | os.O_DIRECT)
            await monitor.execute("add-fd", {"fdset-id": 0}, descriptor=descriptor)
            os.close(descriptor)
            if cut != "nothing but a descriptor given":
                await monitor.execute("blockdev-add", disks.source_node(0, new, disks.Handles(fdset=0)))
            if cut == "in use, the old one not closed":
                await monitor.execute("blockdev-reopen", {"options": [disks.raw_node(0, new)]})
            await machine.close()
            adopted = await nodes.left.hypervisor.adopt(nodes.specs["linux"], machine.process)
            await adopted.move_volume(new)
            nodes_left = {node["node-name"] for node in await monitor.execute("query-named-block-nodes")}
            assert nodes_left == {"volume0", disks.source_name(0, new)}
            assert await monitor.execute("query-fdsets") == [] or not any(
                one["fds"] for one in await monitor.execute("query-fdsets")
            )
            await guest.goes_on()
            await adopted.move_volume(old)
            assert not has_open(adopted, new.source.path)
            await guest.goes_on()
            status = await guest.stop_journal()
            await monitor.close()
        check_records(storage, "v", status)
        await adopted.kill()

    async def test_a_relay_that_is_started_anew_is_found_again(self, nodes: Bench, storage: Storage) -> None:
        """Also one that QEMU was given after its launch: it keeps the directory open, not the socket."""
        machine = await booted(nodes, storage.export("v"))
        relay = storage.relay("v")
        assert isinstance(relay.source, RelaySocket)
        await machine.move_volume(relay)
        async with guest_of(machine) as guest:
            await guest.start_journal("v")
            await guest.goes_on()
            storage.kill("v")
            relay.source.path.unlink()
            storage.relay("v")
            await guest.goes_on()
            status = await guest.stop_journal()
        check_records(storage, "v", status)
        await machine.kill()

    async def test_off_a_relay_that_is_dead_it_waits_for_the_relay(self, nodes: Bench, storage: Storage) -> None:
        """What QEMU does: it is deaf until the I/O on its way is through, and then the order is carried out."""
        nodes.node("left", timeout_s=1.0)
        relay, device = storage.relay("v"), storage.attached("v")
        assert isinstance(relay.source, RelaySocket)
        machine = await booted(nodes, relay)
        async with guest_of(machine) as guest:
            await guest.start_journal("v")
            await guest.goes_on()
            storage.kill("v")
            relay.source.path.unlink()
            await asyncio.sleep(0.2)  # in which the guest writes, ten times over
            with pytest.raises(OutcomeUnknown):
                async with asyncio.timeout(10):
                    while True:
                        await machine.move_volume(device)
            storage.relay("v")
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    with contextlib.suppress(OutcomeUnknown):
                        await machine.move_volume(device)
                        break
            await guest.goes_on()
            status = await guest.stop_journal()
        check_records(storage, "v", status)
        await machine.kill()


class TestPlug:
    async def test_a_plugged_disk_keeps_its_address_and_data_through_a_migration(
        self, nodes: Bench, storage: Storage
    ) -> None:
        first, late = storage.export("v"), storage.export("w")
        machine = await booted(nodes, first)
        async with guest_of(machine) as guest:
            await guest.until_disks("0:0:0:0")
            await machine.plug_volume(late, 9)
            await guest.until_disks("0:0:0:0", "0:0:0:9")
            await guest.start_journal("w")
            await guest.goes_on()
        spec = nodes.specs["linux"].with_volume("w", 9)
        target = await moved(nodes, machine, spec, first, late)
        async with guest_of(target) as guest:
            await guest.goes_on()
            assert set(await guest.sectors()) == {"0:0:0:0", "0:0:0:9"}
            with pytest.raises(Conflict) as refused:
                await target.unplug_volume("w", 9)
            assert "using" in str(refused.value)
            await guest.goes_on()
            status = await guest.stop_journal()
            await target.unplug_volume("w", 9)
            await guest.until_disks("0:0:0:0")
        check_records(storage, "w", status)
        await target.kill()

    async def test_insisting_takes_it_away_from_a_guest_that_uses_it(self, nodes: Bench, storage: Storage) -> None:
        machine = await booted(nodes, storage.attached("v"))
        async with guest_of(machine) as guest:
            await guest.start_journal("v")
            await guest.goes_on()
            await machine.unplug_volume("v", 0, in_use=True)
            await guest.until_disks()
            async with asyncio.timeout(PATIENCE_S):
                while (await guest.journal())["errors"] == 0:  # noqa: ASYNC110 - the console tells nothing by itself
                    await asyncio.sleep(0.05)
            status = await guest.stop_journal()
        check_records(storage, "v", status | {"errors": 0})
        assert await machine.run_state() is RunState.RUNNING
        await machine.kill()


class TestResize:
    @pytest.mark.parametrize("how", ["export", "attached"])
    async def test_the_guest_sees_it_and_writes_on(self, nodes: Bench, storage: Storage, how: str) -> None:
        device = getattr(storage, how)("v")
        machine = await booted(nodes, device)
        async with guest_of(machine) as guest:
            assert await guest.sectors() == {"0:0:0:0": 32768}
            await guest.start_journal("v")
            grown = storage.grown(device)
            await machine.resize_volume(grown)
            async with asyncio.timeout(PATIENCE_S):
                while await guest.sectors() != {"0:0:0:0": 65536}:  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(0.05)
            await guest.goes_on()
            said = await guest.run("dd if=/dev/zero of=/dev/sda bs=4096 seek=8191 count=1 conv=fsync && echo fits")
            assert "fits" in said
            status = await guest.stop_journal()
            await machine.move_volume(grown)
        check_records(storage, "v", status)
        await machine.kill()
