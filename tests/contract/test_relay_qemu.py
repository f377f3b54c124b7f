"""A QEMU on a relay: what its block layer makes of holds, kills and moves, and the end of a move, without a relay."""

# ruff: noqa: ASYNC110, ASYNC220 - QEMU is a process, and this loop has nothing else to do

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.hypervisor.qemu.qmp import QmpSession
from emp.volumes.base import RelayState
from tests.relay_bench import SIZE_BYTES, RelayBench, loop_device

PATIENCE_S = 30.0


class Qemu:
    """No machine: a block graph as a volume has it, and a monitor."""

    def __init__(self, monitor: QmpSession) -> None:
        self._monitor = monitor

    async def io(self, command: str) -> str:
        """Do I/O as ``qemu-io`` would; QEMU's monitor answers nothing else meanwhile."""
        line = f'qemu-io volume0 "{command}"'
        return str(await self.execute("human-monitor-command", **{"command-line": line}))

    async def execute(self, command: str, **arguments: Any) -> Any:
        return await self._monitor.execute(command, arguments)


@contextlib.asynccontextmanager
async def qemu_on(socket: Path, directory: Path) -> AsyncIterator[Qemu]:
    server = {"type": "unix", "path": str(socket)}
    nbd = {"driver": "nbd", "node-name": "relay0", "server": server, "reconnect-delay": 300}
    raw = {"driver": "raw", "node-name": "volume0", "size": SIZE_BYTES, "file": "relay0"}
    path = directory / "qmp"
    argv = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none"]
    argv += ["-qmp", f"unix:{path},server=on,wait=off", "-blockdev", json.dumps(nbd), "-blockdev", json.dumps(raw)]
    with subprocess.Popen(argv) as process:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not path.exists():
                    assert process.poll() is None
                    await asyncio.sleep(0.02)
            monitor = QmpSession(path, timeout_s=PATIENCE_S)
            await monitor.open()
            try:
                yield Qemu(monitor)
            finally:
                await monitor.close()
        finally:
            process.kill()


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[RelayBench]:
    made = RelayBench(tmp_path)
    try:
        yield made
    finally:
        await made.close()


async def test_a_hold_of_three_seconds_costs_three_seconds(bench: RelayBench, tmp_path: Path) -> None:
    """A connection that QEMU makes anew after 1, 2 and 4 s would cost 7."""
    volume = await bench.volume("n1")
    n2 = await bench.node("n2")
    async with qemu_on(await bench.pair(volume.endpoint), tmp_path) as qemu:
        await qemu.io("write -P 1 0 4k")
        began_s = time.monotonic()
        assert (await n2.hold("v", within_s=5)).is_flushed
        writing = asyncio.create_task(qemu.io("write -P 2 0 4k"))
        await asyncio.wait({writing}, timeout=3 - (time.monotonic() - began_s))
        assert not writing.done()
        await n2.switch("v", bench.served)
        await writing
        assert 2.9 < time.monotonic() - began_s < 3.6
        assert volume.at(0, 1) == b"\2"


async def test_qemu_goes_on_when_its_relay_is_killed(bench: RelayBench, tmp_path: Path) -> None:
    volume = await bench.volume("n1")
    n2 = await bench.node("n2")
    async with qemu_on(await bench.pair(volume.endpoint), tmp_path) as qemu:
        for byte in (1, 2):
            await n2.hold("v", within_s=5)
            writing = asyncio.create_task(qemu.io(f"write -P {byte} 0 4k"))
            async with asyncio.timeout(5):
                while not (await n2.status("v")).waiting:
                    await asyncio.sleep(0.01)
            killed = bench.relay("n2")
            killed.send(signal.SIGKILL)
            await killed.ended()
            assert (await n2.switch("v", bench.served)).state is RelayState.RUNNING
            await writing
            assert volume.at(0, 1) == bytes([byte])


async def test_at_the_end_qemu_has_the_device_and_no_relay(bench: RelayBench, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(SIZE_BYTES))
    with loop_device(image) as device:
        n1, n2 = await bench.node("n1"), await bench.node("n2")
        async with qemu_on(await bench.pair(device), tmp_path) as qemu:
            await qemu.io("write -P 1 0 4k")
            await n2.hold("v", within_s=5)
            writing = asyncio.create_task(qemu.io("write -P 2 4k 4k"))
            await n1.end("v")
            await n2.switch("v", device)
            await writing
            local = {"driver": "host_device", "node-name": "device0", "filename": device.path}
            await qemu.execute("blockdev-add", **local | {"cache": {"direct": True}, "locking": "off"})
            again = {"driver": "raw", "node-name": "volume0", "size": SIZE_BYTES, "file": "device0"}
            await qemu.execute("blockdev-reopen", options=[again])
            await qemu.execute("blockdev-del", **{"node-name": "relay0"})
            await n2.end("v")
            await qemu.io("write -P 3 8k 4k")
            await qemu.io("flush")
        assert image.read_bytes()[: 3 * 4096 : 4096] == b"\1\2\3"
