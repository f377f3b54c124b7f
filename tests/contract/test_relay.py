"""Relays as processes, between QEMU's own client and real volumes: killed, held and moved under I/O."""

# ruff: noqa: ASYNC110, ASYNC220, ASYNC221 - the other ends are processes, and this loop has nothing else to do

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.host.pid_file import running
from emp.host.processes import Process
from emp.model.errors import BadInput, Conflict, HostError, NotFound, Refused, Unreachable
from emp.model.volume import HostDevice, NbdEndpoint
from emp.volumes.base import RelayDriver, RelayState
from emp.volumes.nbd_probe import NbdProbe
from emp.volumes.nbd_wire import Kind
from emp.volumes.relay import manager
from emp.wire.pki import CertificateAuthority, Identity, Role
from emp.wire.tls import mutual_client
from tests.fakes.nbd import FakeClient
from tests.relay_bench import SIZE_BYTES, RelayBench, loop_device, qemu_io, writing

AGENT_2 = Identity(Role.AGENT, "n2")


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[RelayBench]:
    made = RelayBench(tmp_path)
    try:
        yield made
    finally:
        await made.close()


def is_whole(bench: RelayBench) -> RelayDriver:
    """The manager is what the protocol says, as far as types can tell."""
    return bench.nodes["n1"]


# ---------------------------------------------------------------------- writes wait for the commit


async def test_writes_wait_at_the_source_until_it_is_opened(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint, is_open=False)
    assert qemu_io(path, "read -P 0 0 64k").returncode == 0
    with subprocess.Popen(
        ["qemu-io", "--image-opts", f"driver=nbd,path={path}", "-c", "write -P 7 0 64k", "-c", "flush"]
    ) as client:
        n1 = await bench.node("n1")
        async with asyncio.timeout(10):
            while (status := await n1.status("v")).waiting == 0:
                await asyncio.sleep(0.02)
        assert (client.poll(), status.writes_open, volume.at(0, 1)) == (None, False, b"\0")
        opened = await n1.open("v")
        assert client.wait(timeout=10) == 0
    assert opened.writes_open
    assert volume.at(0, 65536) == b"\7" * 65536
    assert (await n1.open("v")).writes_open


async def test_a_relay_that_is_ended_before_it_was_opened_has_written_nothing(bench: RelayBench) -> None:
    """The way back: the target's writes were never let through, and are not when the source goes on."""
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint, is_open=False)
    with subprocess.Popen(["qemu-io", "--image-opts", f"driver=nbd,path={path}", "-c", "write -P 7 0 64k"]) as client:
        n1, n2 = await bench.node("n1"), await bench.node("n2")
        async with asyncio.timeout(10):
            while (await n1.status("v")).waiting == 0:
                await asyncio.sleep(0.02)
        await n1.end("v")
        await n2.end("v")
        assert client.wait(timeout=10) != 0
    assert volume.at(0, 65536) == bytes(65536)


# ---------------------------------------------------------------------- the move, under I/O


async def test_a_hold_leaves_nothing_on_its_way_and_costs_the_time_that_it_lasts(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    n1, n2 = await bench.node("n1"), await bench.node("n2")
    async with writing(path) as writer:
        await writer.more()
        flushes = (await n1.status("v")).flushes
        began_s = time.monotonic()
        held = await n2.hold("v", within_s=5)
        assert (held.state, held.outstanding, held.is_flushed) == (RelayState.HELD, 0, True)
        assert (await n1.status("v")).flushes == flushes + 1
        assert not writer.lost(volume), "every acknowledged write is there before it is let go"
        count = writer.count
        await asyncio.sleep(3 - (time.monotonic() - began_s))  # what a move would take
        assert writer.count <= count + writer.AT_ONCE
        await n2.switch("v", bench.served)
        lasted_s = time.monotonic() - began_s
        await writer.more()
        await writer.stop()
    assert 2.9 < writer.slowest_s < lasted_s + 0.6, "and not the 7 s of a client that connects anew, ever later"
    assert not writer.lost(volume)


async def test_a_volume_moves_from_node_to_node_under_io(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    n1, n2 = await bench.node("n1"), await bench.node("n2")
    async with writing(path) as writer:
        await writer.more()
        await n2.hold("v", within_s=5)
        await n1.end("v")
        await volume.export.close()
        moved = await bench.volume("n2", image=volume.image)
        status = await n2.switch("v", moved.endpoint)
        assert (status.state, status.held_since_s) == (RelayState.RUNNING, None)
        await writer.more()
        await n2.switch("v", moved.endpoint)
        await writer.stop()
    assert not writer.lost(moved)


async def test_a_block_device_is_let_go_at_one_end_and_taken_at_the_other(bench: RelayBench, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(SIZE_BYTES))
    with loop_device(image) as device:
        path = await bench.pair(device)
        n1, n2 = await bench.node("n1"), await bench.node("n2")
        assert openers(device) == ["qemu-nbd"]
        async with writing(path) as writer:
            await writer.more()
            await n2.hold("v", within_s=5)
            await n1.end("v")
            assert openers(device) == []
            await n2.switch("v", device)
            await writer.more()
            await writer.stop()
        # what QEMU does at the end of a move, and what it may ask for
        assert qemu_io(path, "write -P 3 512 512", "discard 1M 64k", "write -z 2M 64k", "flush").returncode == 0
        held = await n2.hold("v", within_s=5)
        assert (held.is_flushed, openers(device)) == (True, [])
        await n2.switch("v", device)
        assert qemu_io(path, "read -P 3 512 512", "read -P 0 1M 64k").returncode == 0
        killed = bench.relay("n2")
        killed.send(signal.SIGKILL)
        await killed.ended()
        assert (await n2.status("v")).state is RelayState.RUNNING
        assert qemu_io(path, "read -P 3 512 512").returncode == 0, "another one has been started"
        await n2.end("v")
        assert openers(device) == []


def openers(device: HostDevice) -> list[str]:
    """Return the programs that have a device open."""
    number = Path(device.path).stat().st_rdev
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.stat().st_rdev == number:
                found.append((descriptor.parent.parent / "comm").read_text().strip())
        except OSError:  # it has ended meanwhile
            continue
    return found


# ---------------------------------------------------------------------- whatever dies


async def test_a_killed_volume_server_is_nothing_but_a_pause(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    async with writing(path) as writer:
        for _ in range(3):
            await writer.more()
            volume.process.send(signal.SIGKILL)
            await writer.more()
        await writer.stop()
    assert not writer.lost(volume)
    assert (await (await bench.node("n1")).status("v")).reconnects >= 3
    assert (await (await bench.node("n2")).status("v")).errors == 0


@pytest.mark.parametrize("node", ["n1", "n2"])
async def test_a_killed_relay_is_started_again_and_qemu_goes_on(bench: RelayBench, node: str) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    async with writing(path) as writer:
        for _ in range(2):
            await writer.more()
            killed = bench.relay(node)
            killed.send(signal.SIGKILL)
            await killed.ended()
            await writer.more()
        await writer.stop()
    assert not writer.lost(volume)


async def test_a_source_that_dies_costs_no_acknowledged_write(bench: RelayBench) -> None:
    """The attachment is taken over, and what the source did not answer is sent to the volume itself."""
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    n2 = await bench.node("n2")
    async with writing(path) as writer:
        await writer.more()
        relay = bench.relay("n1")
        relay.send(signal.SIGSTOP)  # it takes requests, and answers none
        async with asyncio.timeout(10):
            while (await n2.status("v")).outstanding < writer.AT_ONCE // 2:
                await asyncio.sleep(0.02)
        with pytest.raises(Unreachable, match=r"requests are unanswered after 0\.5 s"):
            await n2.hold("v", within_s=0.5)
        await bench.forget("n1")
        relay.send(signal.SIGKILL)
        await relay.ended()
        await volume.export.close()
        moved = await bench.volume("n2", image=volume.image)
        status = await n2.switch("v", moved.endpoint)
        assert status.state is RelayState.RUNNING
        await writer.more()
        await writer.stop()
    assert not writer.lost(moved)


async def test_relays_outlive_their_agent_and_are_adopted(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    async with writing(path) as writer:
        await writer.more()
        before = bench.relay("n2")
        await bench.forget("n2")
        await writer.more()
        n2 = await bench.node("n2")
        assert await n2.names() == ("v",)
        assert bench.relay("n2") == before
        assert (await n2.hold("v", within_s=5)).is_flushed

        await bench.forget("n2")
        killed = bench.relay("n2")
        killed.send(signal.SIGKILL)
        await killed.ended()
        status = await (await bench.node("n2")).status("v")
        assert (status.state, status.is_flushed) == (RelayState.HELD, True), "as it was"
        await (await bench.node("n2")).switch("v", bench.served)
        await writer.more()
        await writer.stop()
    assert "another relay" not in bench.log("n2"), "none was ever started beside one that ran"
    assert not writer.lost(volume)


async def test_what_an_agent_left_unfinished_is_ended(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    await bench.pair(volume.endpoint)
    process = bench.relay("n2")
    await bench.forget("n2")
    directory = bench.directory / "n2" / "relays" / "one" / "v"
    (directory / "order.json").unlink()
    n2 = await bench.node("n2")
    assert await n2.names() == ()
    assert not process.alive
    assert not directory.exists()


async def test_a_pid_file_that_names_somebody_else_harms_nobody(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    process = bench.relay("n2")
    await bench.forget("n2")
    process.send(signal.SIGKILL)
    await process.ended()
    with subprocess.Popen(["sleep", "60"]) as somebody:
        (bench.directory / "n2" / "relays" / "one" / "v" / "pid").write_text(f"{somebody.pid}\n")
        await bench.node("n2")
        assert qemu_io(path, "read 0 4k").returncode == 0
        assert somebody.poll() is None
        somebody.kill()


# ---------------------------------------------------------------------- orders


async def test_the_same_order_again_gives_the_same_answer(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    n1, n2 = await bench.node("n1"), await bench.node("n2")
    processes = bench.relay("n1"), bench.relay("n2")
    served = await n1.serve("v", source=volume.endpoint, size_bytes=SIZE_BYTES, peer="agent-n2")
    assert served == await n1.serve("v", source=volume.endpoint, size_bytes=SIZE_BYTES, peer="agent-n2")
    assert served.tls_hostname == "agent-n1"
    assert path == await n2.dial("v", machine="m", upstream=served, size_bytes=SIZE_BYTES)
    assert (await n1.status("v")).writes_open, "it is not closed again"
    assert (bench.relay("n1"), bench.relay("n2")) == processes
    with pytest.raises(Conflict, match="something else"):
        await n1.serve("v", source=volume.endpoint, size_bytes=SIZE_BYTES, peer="agent-n3")
    with pytest.raises(Conflict, match="something else"):
        await n2.dial("v", machine="other", upstream=served, size_bytes=SIZE_BYTES)
    for _ in range(2):
        await n2.end("v")
    assert not any(process.alive for process in processes[1:])
    assert not path.parent.exists()
    for order in (n2.status("v"), n2.hold("v", within_s=1), n2.open("v"), n2.switch("v", served)):
        with pytest.raises(NotFound, match="no relay v"):
            await order
    assert is_whole(bench)


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b", "x" * 64])
async def test_a_name_that_is_none_is_refused(bench: RelayBench, name: str) -> None:
    volume = await bench.volume("n1")
    n1 = await bench.node("n1")
    with pytest.raises(BadInput, match="not a valid name"):
        await n1.serve(name, source=volume.endpoint, size_bytes=SIZE_BYTES, peer="agent-n2")
    with pytest.raises(BadInput, match="not a valid name"):
        await n1.dial("v", machine=name, upstream=volume.endpoint, size_bytes=SIZE_BYTES)
    with pytest.raises(BadInput, match="not a valid name"):
        await n1.end(name)


async def test_a_volume_of_another_size_is_refused_at_each_end(bench: RelayBench) -> None:
    volume, small = await bench.volume("n1"), await bench.volume("n2", size_bytes=SIZE_BYTES // 2)
    n1, n2 = await bench.node("n1"), await bench.node("n2")
    with pytest.raises(Refused, match=f"{SIZE_BYTES} bytes, not 4096"):
        await n1.serve("wrong", source=volume.endpoint, size_bytes=4096, peer="agent-n2")
    path = await bench.pair(volume.endpoint)
    await n2.hold("v", within_s=5)
    with pytest.raises(Refused, match="another one"):
        await n2.switch("v", small.endpoint)
    assert (await n2.status("v")).state is RelayState.HELD
    await n2.switch("v", bench.served)
    assert qemu_io(path, "write -P 1 0 4k").returncode == 0


async def test_what_cannot_be_opened_is_told_and_tried_again(
    bench: RelayBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "REACH_S", 1.0)
    n1 = await bench.node("n1")
    image = tmp_path / "file"
    image.write_bytes(bytes(SIZE_BYTES))
    for path in (str(image), str(tmp_path / "none")):
        device = HostDevice(path=path, serial="s", size_bytes=SIZE_BYTES)
        with pytest.raises(HostError, match="cannot open"):
            await n1.serve("v", source=device, size_bytes=SIZE_BYTES, peer="agent-n2")
        await n1.end("v")
    nobody = NbdEndpoint(host="127.0.0.1", port=1, export="x", tls_hostname="volumes-v1")
    with pytest.raises(Unreachable, match="Connect call failed"):
        await n1.serve("v", source=nobody, size_bytes=SIZE_BYTES, peer="agent-n2")
    assert (await n1.status("v")).state is RelayState.CONNECTING


# ---------------------------------------------------------------------- who comes in


async def test_only_the_one_peer_and_only_under_tls(bench: RelayBench, tmp_path: Path) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    n1 = await bench.node("n1")
    served = await n1.serve("v", source=volume.endpoint, size_bytes=SIZE_BYTES, peer="agent-n2")

    async def read_as(credentials: Path, endpoint: NbdEndpoint = served) -> None:
        probe = NbdProbe(endpoint, mutual_client(credentials))
        try:
            for _ in range(3):
                await probe.read()
        finally:
            await probe.close()

    await read_as(bench.pool.credentials(AGENT_2))
    for identity in (Identity(Role.AGENT, "n3"), Identity(Role.QEMU, "n2"), Identity(Role.AGENT, "n1")):
        with pytest.raises(Unreachable, match=rf"refused \(0x80000002\): {identity} may not"):
            await read_as(bench.pool.credentials(identity))
    with pytest.raises(Unreachable, match="0x80000006"):
        await read_as(bench.pool.credentials(AGENT_2), served.model_copy(update={"export": "other"}))
    with pytest.raises(Unreachable, match="Hostname mismatch"):
        await read_as(bench.pool.credentials(AGENT_2), served.model_copy(update={"tls_hostname": "agent-n9"}))
    stranger = CertificateAuthority.create(tmp_path / "other-ca", "p").issue(Role.AGENT, "n2")
    stranger.write(tmp_path / "stranger")
    with pytest.raises(Unreachable):
        await read_as(tmp_path / "stranger")
    plain = subprocess.run(
        ["qemu-io", "-r", "-f", "raw", f"nbd://127.0.0.1:{served.port}/v", "-c", "read 0 512"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert plain.returncode != 0
    assert "TLS" in plain.stderr
    assert qemu_io(path, "read 0 4k").returncode == 0


async def test_strangers_do_not_disturb_a_client(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    port = (await (await bench.node("n1")).status("v")).port
    async with writing(path) as writer:
        await writer.more()
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        for number, stranger in enumerate(strangers[::2]):
            with_garbage = (os.urandom(64), b"\0\0\0\3IHAVEOPT\0\0\0\5\0\0\0\0" + os.urandom(200))[number % 2]
            try:
                stranger.sendall(with_garbage)
            except ConnectionError:  # there are too many of them already
                continue
        await writer.more()
        for stranger in strangers:
            stranger.close()
        await writer.more()
        await writer.stop()
    assert not writer.lost(volume)


async def test_sockets_and_records_are_where_only_the_right_ones_get(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    relays = bench.directory / "n2" / "relays"
    modes = {
        str(each.relative_to(relays)): oct(each.stat().st_mode & 0o777) for each in [relays, *sorted(relays.rglob("*"))]
    }
    directories = dict.fromkeys((".", "machine", "one", "one/v"), "0o700")
    files = dict.fromkeys(("one/v/config.json", "one/v/order.json", "one/v/pid", "one/v/control"), "0o600")
    public = {"machine/m": "0o711", "machine/m/v": "0o666"}
    assert modes | {"one/v/log": ""} == directories | files | public | {"one/v/log": ""}
    descriptor = os.open(path.parent, os.O_PATH)
    connected = subprocess.run(
        ["qemu-io", "--image-opts", f"driver=nbd,path=/proc/self/fd/{descriptor}/v", "-c", "read 0 512"],
        pass_fds=[descriptor],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    os.close(descriptor)
    assert connected.returncode == 0, connected


# ---------------------------------------------------------------------- the process


async def test_it_ends_cleanly_and_starts_fast(bench: RelayBench, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(SIZE_BYTES))
    with loop_device(image) as device:
        path = await bench.pair(device)
        n1 = await bench.node("n1")
        await n1.close()
        process, child = bench.relay("n1"), running(tmp_path / "n1" / "relays" / "one" / "v" / "device.pid")
        assert child
        process.send(signal.SIGTERM)
        async with asyncio.timeout(5):
            await process.ended()
        assert not child.alive
        left = {path.name for path in (tmp_path / "n1" / "relays" / "one" / "v").iterdir()}
        assert left <= {"config.json", "order.json", "log", "pid", "device.log"}
        assert "Traceback" not in bench.log("n1")
        await n1.start()
        assert qemu_io(path, "read 0 4k").returncode == 0
        killed, child = bench.relay("n1"), running(tmp_path / "n1" / "relays" / "one" / "v" / "device.pid")
        assert child
        await n1.close()
        killed.send(signal.SIGKILL)
        async with asyncio.timeout(5):
            await killed.ended()
            await child.ended()
        await n1.start()


async def test_a_relay_imports_nothing_heavy() -> None:
    program = "import sys, emp.volumes.relay.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydantic", "fastapi", "cryptography", "boto3", "uvicorn"} & set(loaded)


async def test_what_it_keeps_is_bounded(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    n2 = await bench.node("n2")
    await n2.hold("v", within_s=5)
    before_kb = peak_kb(bench.relay("n2"))
    pressing = [asyncio.create_task(press(path)) for _ in range(3)]
    async with asyncio.timeout(20):
        while (await n2.status("v")).waiting < 3 * 32:
            await asyncio.sleep(0.05)
    held_kb = peak_kb(bench.relay("n2")) - before_kb
    for task in pressing:
        task.cancel()
    await asyncio.wait(pressing)
    assert held_kb < 3 * 40_000, "32 MiB of each client, and its buffers"


def peak_kb(process: Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


async def press(path: Path) -> None:
    """Write more than anybody can keep, and never listen."""
    client = await FakeClient.to(path)
    try:
        while True:
            client.send(Kind.WRITE, data=b"\1" * (1 << 20))
            await client.export.stream.drain()
    finally:
        client.close()


async def test_a_relay_is_not_started_twice(bench: RelayBench) -> None:
    volume = await bench.volume("n1")
    path = await bench.pair(volume.endpoint)
    for node in ("n1", "n2"):
        config = bench.directory / node / "relays" / "one" / "v" / "config.json"
        again = [sys.executable, "-m", "emp.volumes.relay", "--config", str(config)]
        done = subprocess.run(again, capture_output=True, text=True, check=False, timeout=20)
        assert (done.returncode, "another relay works" in done.stderr) == (4, True)
    assert qemu_io(path, "read 0 4k").returncode == 0
