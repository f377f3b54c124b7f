"""QEMU's migrations and volumes, on loopback: what only the real one can show."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from emp.host.processes import Process
from emp.host.run import run
from emp.hypervisor.base import (
    BlockDevice,
    Machine,
    MachineEventKind,
    RunState,
    StreamLimits,
    StreamStatus,
)
from emp.hypervisor.qemu.qmp import QmpSession
from emp.hypervisor.qemu.run_directory import RunDirectory
from emp.lab.images import KERNEL_COMMAND_LINE, ensure_image
from emp.model.errors import HypervisorError, OutcomeUnknown
from emp.model.volume import NbdEndpoint
from emp.wire import dh
from emp.wire.pki import CertificateAuthority, Role
from tests.qemu_bench import (
    LOOPBACK,
    Bench,
    bench,
    console,
    frozen,
    is_kind,
    is_stream,
    leftovers,
    rewriting,
    start_stream,
    until,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines can be started by root only")

KIND = MachineEventKind
EVERYTHING_AT_ONCE = StreamLimits(downtime_limit_ms=60_000)
"""over it goes after the first pass, whatever is left"""


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path) as made:
        yield made


class TestMigration:
    async def test_a_hung_target_in_the_device_phase_is_left_behind_by_yank(self, nodes: Bench) -> None:
        for name in ("left", "right"):
            nodes.node(name, timeout_s=1.0)
        source, target = await nodes.pair()
        async with console(source) as guest:
            await rewriting(guest)
        events = source.events()
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity, limits=EVERYTHING_AT_ONCE)
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        assert (await source.stream_info()).remaining_bytes > 32 << 20
        with frozen(target):
            await source.continue_stream()
            await until(events, is_stream(StreamStatus.DEVICE))
            with pytest.raises(OutcomeUnknown):
                async with asyncio.timeout(10):
                    while True:  # once the socket is full, QEMU waits in write() with its big lock held
                        await source.run_state()
            began = time.monotonic()
            await source.cancel_stream()
            await until(events, is_kind(KIND.RESUMED))
            assert time.monotonic() - began < 3, "it waits for a timeout"
            assert await source.run_state() is RunState.RUNNING
        assert await target.run_state() is RunState.INMIGRATE
        for machine in (source, target):
            await machine.kill()

    @pytest.mark.parametrize("hangs_in", [StreamStatus.PRE_SWITCHOVER, StreamStatus.DEVICE])
    async def test_the_guard_brings_the_guest_back_when_nobody_else_does(
        self, nodes: Bench, hangs_in: StreamStatus
    ) -> None:
        source, target = await nodes.pair()
        async with console(source) as guest:
            await rewriting(guest)
        await source.guard_stream(pre_switchover_s=0.5, device_s=0.5)
        events = source.events()
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity, limits=EVERYTHING_AT_ONCE)
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        with frozen(target):
            if hangs_in is StreamStatus.DEVICE:  # more is left than the socket takes: QMP falls silent
                await source.continue_stream()
                await until(events, is_stream(StreamStatus.DEVICE))
            await until(events, is_kind(KIND.RESUMED))
            assert await source.run_state() is RunState.RUNNING
            assert (await source.stream_info()).status.ended_badly
        for machine in (source, target):
            await machine.kill()

    @pytest.mark.parametrize("guarded", [True, False])
    async def test_a_target_that_dies_in_pre_switchover_does_not_keep_the_guest_paused(
        self, nodes: Bench, guarded: bool
    ) -> None:
        """QEMU 10.0 sees it at once or when it goes on; in the first case it fails the migration and waits for ever."""
        source, target = await nodes.pair()
        async with console(source) as guest:
            await rewriting(guest)
        if guarded:
            await source.guard_stream(pre_switchover_s=60, device_s=60)
        events = source.events()
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity, limits=EVERYTHING_AT_ONCE)
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        await target.kill()
        with contextlib.suppress(HypervisorError):
            await source.continue_stream()
        if not guarded:
            await source.cancel_stream()
        await until(events, is_kind(KIND.RESUMED))
        target = await nodes.right.hypervisor.launch(nodes.plan(nodes.specs["one"], incoming=True))
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity, limits=EVERYTHING_AT_ONCE)
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        await asyncio.sleep(0.2)  # and it waits: nothing of the earlier release is left
        assert (await source.stream_info()).status is StreamStatus.PRE_SWITCHOVER
        for machine in (source, target):
            await machine.kill()

    @pytest.mark.parametrize("hung", [True, False])
    async def test_cancelled_in_pre_switchover_the_guest_runs_again_at_once(self, nodes: Bench, hung: bool) -> None:
        source, target = await nodes.pair()
        async with console(source) as guest:
            await rewriting(guest)
        events = source.events()
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity, limits=EVERYTHING_AT_ONCE)
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        with frozen(target) if hung else contextlib.nullcontext():
            await source.cancel_stream()
            await until(events, is_kind(KIND.RESUMED))
        for machine in (source, target):
            await machine.kill()

    async def test_a_guard_leaves_a_migration_alone_that_goes_well_and_is_gone_after_it(self, nodes: Bench) -> None:
        source, target = await nodes.pair()
        events, loaded = source.events(), target.events()
        await source.guard_stream(pre_switchover_s=60, device_s=60)
        (guard,) = guards(nodes)
        assert privileges(guard.pid) == privileges(source.process.pid)
        assert (privileges(guard.pid)["CapEff"], "0" in privileges(guard.pid).values()) == ("0" * 16, False)
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        await source.continue_stream()
        await until(loaded, is_stream(StreamStatus.COMPLETED))
        await until(events, is_stream(StreamStatus.COMPLETED))
        async with asyncio.timeout(20):
            await guard.ended()
        for machine in (source, target):
            await machine.kill()

    async def test_a_killed_machine_takes_its_guard_with_it(self, nodes: Bench) -> None:
        machine = await nodes.booted()
        await machine.guard_stream(pre_switchover_s=60, device_s=60)
        (first,) = guards(nodes)
        await machine.guard_stream(pre_switchover_s=60, device_s=60)  # the monitor serves one
        (second,) = guards(nodes)
        assert (first.alive, second.alive, first == second) == (False, True, False)
        second.send(signal.SIGSTOP)
        await machine.kill()
        assert not second.alive
        assert guards(nodes) == []

    async def test_garbage_at_the_port_does_not_cost_the_migration(self, nodes: Bench) -> None:
        source, target = await nodes.pair()
        port = await target.listen_for_stream(host=LOOPBACK, source=nodes.left.identity)
        for garbage in (b"", b"GET / HTTP/1.0\r\n\r\n" * 10, b"\x16\x03\x01\xff\xff" + bytes(200), bytes(5000)):
            with socket.create_connection((LOOPBACK, port)) as visitor:
                visitor.sendall(garbage)
        events, loaded = source.events(), target.events()
        await source.send_stream(host=LOOPBACK, port=port, target=nodes.right.identity, limits=StreamLimits())
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        await source.continue_stream()
        await until(loaded, is_stream(StreamStatus.COMPLETED))
        await until(events, is_stream(StreamStatus.COMPLETED))
        await target.cont()
        for machine in (source, target):
            await machine.kill()

    async def test_a_silent_visitor_makes_the_target_deaf_until_it_leaves(self, nodes: Bench) -> None:
        """Not what we want, but what QEMU does: the port must be open to the peer alone."""
        nodes.node("right", timeout_s=0.5)
        source, target = await nodes.pair()
        port = await target.listen_for_stream(host=LOOPBACK, source=nodes.left.identity)
        with socket.create_connection((LOOPBACK, port)), pytest.raises(OutcomeUnknown):
            async with asyncio.timeout(10):
                while True:
                    await target.run_state()
        assert await target.run_state() is RunState.INMIGRATE
        for machine in (source, target):
            await machine.kill()

    @pytest.mark.parametrize("wrong", ["left", "right"])
    @pytest.mark.parametrize("how", ["another CA", "expired"])
    async def test_a_certificate_that_is_not_of_the_pool_is_refused(self, nodes: Bench, wrong: str, how: str) -> None:
        node = nodes.node(wrong)
        if how == "another CA":
            stranger = CertificateAuthority.create(nodes.directory / "other", "bench")
            stranger.issue(Role.AGENT, wrong, [LOOPBACK]).write(node.credentials_dir)
        else:
            past = datetime.now(UTC) - timedelta(days=3)
            nodes.authority.issue(Role.AGENT, wrong, [LOOPBACK], now=past, life=timedelta(days=1)).write(
                node.credentials_dir
            )
        source, target = await nodes.pair()
        events = source.events()
        try:
            await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
        except HypervisorError:
            assert how == "expired"  # QEMU does not even load it
        else:
            await until(events, is_stream(StreamStatus.FAILED))
        assert await source.run_state() is RunState.RUNNING
        assert await target.run_state() is RunState.INMIGRATE
        for machine in (source, target):
            await machine.kill()

    async def test_a_certificate_renewed_since_the_machine_started_is_the_one_used(self, nodes: Bench) -> None:
        stranger = CertificateAuthority.create(nodes.directory / "other", "bench")
        stranger.issue(Role.AGENT, "left", [LOOPBACK]).write(nodes.left.credentials_dir)
        source, target = await nodes.pair()
        nodes.authority.issue(Role.AGENT, "left", [LOOPBACK]).write(nodes.left.credentials_dir)
        events = source.events()
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        for machine in (source, target):
            await machine.kill()

    async def test_nothing_leaves_a_loaded_target_before_it_runs(self, nodes: Bench) -> None:
        source, target = await nodes.pair()
        tap = nodes.tap_names[-1]
        await run("ip", "link", "set", tap, "up")
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire:
            wire.bind((tap, 0))
            wire.setblocking(False)
            loaded, events = target.events(), source.events()
            await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
            await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
            await source.continue_stream()
            await until(loaded, is_stream(StreamStatus.COMPLETED))
            # QEMU announces the guest's MAC (RARP) at once and again every 50 ms or so: into its queue
            await asyncio.sleep(0.3)
            assert guest_frames(wire, nodes) == []
            await target.cont()
            assert "8035" in guest_frames(wire, nodes)
        for machine in (source, target):
            await machine.kill()

    async def test_questions_in_the_blackout_are_answered_in_about_a_millisecond(self, nodes: Bench) -> None:
        machine = await nodes.booted()
        took_ms = []
        for _ in range(50):
            began = time.perf_counter()
            await machine.run_state()
            took_ms.append((time.perf_counter() - began) * 1000)
        assert sorted(took_ms)[len(took_ms) // 5] < 5  # 0.4 on a quiet machine; a busy one delays many, never all
        await machine.kill()


def guards(nodes: Bench) -> list[Process]:
    """Return the guard processes that are alive, by what the machines' directories say."""
    found = [directory.guard_process() for node in nodes.nodes.values() for directory in RunDirectory.all(node.run_dir)]
    return [process for process in found if process and process.alive]


def privileges(pid: int) -> dict[str, str]:
    """Return user and capabilities of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()}
    return {name: fields[name] for name in ("Uid", "CapEff", "CapPrm")}


def guest_frames(wire: socket.socket, nodes: Bench) -> list[str]:
    """Return the types of the frames that came from the guest's MAC."""
    guest = bytes.fromhex(nodes.specs["one"].nics[0].mac.replace(":", ""))
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            frame = wire.recv(2048)
            if frame[6:12] == guest:
                found.append(frame[12:14].hex())
    return found


@pytest.fixture
def volume_server(nodes: Bench) -> Iterator[BlockDevice]:
    """One volume on an NBD server under TLS, open to both nodes at once."""
    nodes.authority.issue(Role.CONTROLLER, "volumes", [LOOPBACK]).write(nodes.directory / "server")
    (nodes.directory / "server" / dh.FILE).write_bytes(dh.FFDHE2048)
    image = nodes.directory / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    with socket.socket() as chosen:
        chosen.bind((LOOPBACK, 0))
        port = chosen.getsockname()[1]
    creds = f"tls-creds-x509,id=tls,endpoint=server,dir={nodes.directory / 'server'},verify-peer=yes"
    argv = ["qemu-nbd", "--format=raw", "--export-name=vol-1", f"--bind={LOOPBACK}", f"--port={port}", "--shared=8"]
    argv += ["--persistent", "--object", creds, "--tls-creds=tls", f"--pid-file={nodes.directory / 'nbd.pid'}"]
    server = subprocess.Popen([*argv, str(image)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not (nodes.directory / "nbd.pid").exists():
        assert server.poll() is None, "qemu-nbd did not start"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    endpoint = NbdEndpoint(host=LOOPBACK, port=port, export="vol-1", tls_hostname="controller-volumes")
    yield BlockDevice(volume="vol-1", serial="vol-1", size_bytes=16 << 20, source=endpoint)
    server.kill()
    server.wait()


class TestVolumes:
    async def test_both_ends_have_the_volume_open_through_a_migration(
        self, nodes: Bench, volume_server: BlockDevice
    ) -> None:
        spec = await nodes.spec(volumes=("vol-1",))
        source = await nodes.left.hypervisor.launch(replace(nodes.plan(spec), volumes=(volume_server,)))
        target = await nodes.right.hypervisor.launch(replace(nodes.plan(spec, incoming=True), volumes=(volume_server,)))
        guard = QmpSession(target.guard_path, timeout_s=5)
        await guard.open()
        (disk,) = await guard.execute("query-block")
        assert disk["inserted"]["image"]["virtual-size"] == volume_server.size_bytes
        path = {"path": "/machine/peripheral/disk0", "property": "serial"}
        assert await guard.execute("qom-get", path) == "vol-1"
        events, loaded = source.events(), target.events()
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
        await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
        await source.continue_stream()
        await until(loaded, is_stream(StreamStatus.COMPLETED))
        await until(events, is_stream(StreamStatus.COMPLETED))
        await target.cont()
        assert await target.run_state() is RunState.RUNNING
        await guard.close()
        for machine in (source, target):
            await machine.kill()

    @pytest.mark.parametrize("wrong", ["export", "tls_hostname", "size_bytes"])
    async def test_a_volume_that_is_not_as_told_stops_the_launch(
        self, nodes: Bench, volume_server: BlockDevice, wrong: str
    ) -> None:
        if wrong == "size_bytes":
            device = replace(volume_server, size_bytes=32 << 20)
        else:
            assert isinstance(volume_server.source, NbdEndpoint)
            device = replace(volume_server, source=volume_server.source.model_copy(update={wrong: "other"}))
        spec = await nodes.spec(volumes=("vol-1",))
        with pytest.raises(HypervisorError) as error:
            await nodes.left.hypervisor.launch(replace(nodes.plan(spec), volumes=(device,)))
        assert "blockdev" in error.value.message
        assert leftovers(nodes.left) == []


class TestLinux:
    async def test_boots_from_its_config_migrates_and_shuts_down_in_order(self, nodes: Bench) -> None:
        """After a migration, a guest with drivers resets its devices: QEMU has died of that."""
        image = await asyncio.to_thread(ensure_image)
        spec = await nodes.spec("linux", memory_bytes=256 << 20, vcpus=2)
        linux = {"kernel": image.kernel, "initrd": image.initrd, "kernel_command_line": KERNEL_COMMAND_LINE}
        source = await nodes.left.hypervisor.launch(replace(nodes.plan(spec), **linux))  # type: ignore[arg-type]
        await prompt(source, "linux:/# ")
        incoming = replace(nodes.plan(spec, incoming=True), **linux)  # type: ignore[arg-type]
        target = await nodes.right.hypervisor.launch(incoming)
        sent, loaded = source.events(), target.events()
        await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
        await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
        await source.continue_stream()
        await until(sent, is_stream(StreamStatus.COMPLETED))
        await until(loaded, is_stream(StreamStatus.COMPLETED))
        await target.cont()
        await source.kill()
        await prompt(target, "linux:/# ")
        await target.power_button()
        await until(loaded, is_kind(KIND.GUEST_SHUTDOWN))
        assert await target.run_state() is RunState.SHUTDOWN
        await target.kill()


async def prompt(machine: Machine, text: str) -> None:
    """Wait until the guest's shell asks for a command."""
    reader, writer = await asyncio.open_unix_connection(str(machine.console_path))
    writer.write(b"\n")
    try:
        async with asyncio.timeout(60):
            await reader.readuntil(text.encode())
    finally:
        writer.close()
        await writer.wait_closed()
