"""The volume service as a process: what it remembers, and what a kill of it or of its exports leaves."""

# ruff: noqa: ASYNC110, ASYNC220, ASYNC221 - the daemon is a process, and this loop has nothing else to do

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.host.processes import Process, find
from emp.model.errors import StaleEpoch
from emp.model.volume import Attachment, VolumeType
from emp.volumes.nbd import NbdVolumeClaims, NbdVolumeDriver
from emp.volumes.server.__main__ import main
from emp.volumes.server.state import State
from emp.wire.pki import Identity, Role
from emp.wire.tls import mutual_client
from tests.nbd_pool import SERVER, NbdPool, endpoint_of

PORT = 19999
COMMAND = [sys.executable, "-m", "emp.volumes.server", "--config"]


class Daemon:
    """One volume service, started and killed as often as a test likes; always the same directory."""

    def __init__(self, directory: Path) -> None:
        self.pool = NbdPool(directory / "credentials")
        self.state_dir = directory / "state"
        self.config = directory / "config.json"
        self.config.write_text(self.pool.config(self.state_dir, PORT, (20000, 20031)).model_dump_json())
        self.client = self.pool.client(PORT, Identity(Role.CONTROLLER, "main"))
        self.driver = NbdVolumeDriver(self.client)
        self.log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen([*COMMAND, str(self.config)], stdout=log, stderr=log)
        async with asyncio.timeout(20):
            while True:
                assert self._process.poll() is None, self.log.read_text()
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", PORT)).close()
                    return
                await asyncio.sleep(0.02)

    def kill(self) -> None:
        assert self._process
        self._process.kill()
        self._process.wait()

    def terminate(self) -> int:
        assert self._process
        self._process.terminate()
        return self._process.wait(timeout=10)

    def export(self, attachment: Attachment) -> Process:
        """Return the qemu-nbd behind an attachment."""
        found = find(int((self.state_dir / "run" / f"{endpoint_of(attachment).export}.pid").read_text()))
        assert found
        return found

    async def until_open(self, attachment: Attachment) -> None:
        async with asyncio.timeout(10):
            while not self.pool.is_open(attachment):
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        await self.client.aclose()
        if self._process and self._process.poll() is None:
            self.terminate()
        for pid_file in (self.state_dir / "run").glob("*.pid"):
            if left := find(int(pid_file.read_text())):
                await left.stop(grace_s=0)


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    made = Daemon(tmp_path)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


async def attach_two(daemon: Daemon) -> tuple[Attachment, Attachment]:
    volume = await daemon.driver.create(type=VolumeType.IO2, size_bytes=64 << 20)
    first = await daemon.driver.attach(volume.id, node="n1", epoch=4)
    second = await daemon.driver.attach(volume.id, node="n2", epoch=5)
    return first, second


async def test_killed_exports_are_served_again_on_their_ports(daemon: Daemon) -> None:
    attachments = await attach_two(daemon)
    assert daemon.pool.io(attachments[0], "write -P 9 0 64k")
    for attachment in attachments:
        for _ in range(2):
            export = daemon.export(attachment)
            export.send(signal.SIGKILL)
            await export.ended()
            await daemon.until_open(attachment)
    assert daemon.pool.io(attachments[1], "read -P 9 0 64k")
    assert (await daemon.driver.describe(attachments[0].volume)).attachments == attachments


async def test_exports_outlive_a_killed_daemon_and_are_adopted(daemon: Daemon) -> None:
    attachments = await attach_two(daemon)
    exports = [daemon.export(attachment) for attachment in attachments]
    client = subprocess.Popen(
        daemon.pool.qemu_io(attachments[0], Identity(Role.QEMU, "n1")),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with client:
        assert client.stdin and client.stdout
        client.stdin.write(b"write -P 1 0 4k\n")
        client.stdin.flush()
        while b"wrote 4096" not in client.stdout.readline():
            pass
        daemon.kill()
        assert daemon.pool.io(attachments[1], "read -P 1 0 4k"), "with no daemon at all"
        await daemon.start()
        assert (await daemon.driver.describe(attachments[0].volume)).attachments == attachments
        assert [daemon.export(attachment) for attachment in attachments] == exports
        said, _ = client.communicate(b"read -P 1 0 4k\nquit\n", timeout=20)
    assert b"read 4096/4096" in said
    assert client.returncode == 0, "its connection was never touched"

    exports[1].send(signal.SIGKILL)
    await exports[1].ended()
    await daemon.until_open(attachments[1])
    await daemon.driver.detach(attachments[0].volume, node="n1", epoch=4)
    assert not exports[0].alive, "what was adopted can be ended"


async def test_after_a_kill_of_everything_all_is_as_before(daemon: Daemon) -> None:
    attachments = await attach_two(daemon)
    volume = attachments[0].volume
    await daemon.driver.fence(volume, epoch=4)
    assert daemon.pool.io(attachments[0], "write -P 3 1M 64k")
    exports = [daemon.export(attachment) for attachment in attachments]
    daemon.kill()
    for export in exports:
        export.send(signal.SIGKILL)
        await export.ended()

    await daemon.start()
    assert (await daemon.driver.describe(volume)).attachments == attachments
    assert daemon.pool.io(attachments[1], "read -P 3 1M 64k")
    assert await daemon.driver.attach(volume, node="n1", epoch=4) == attachments[0]
    with pytest.raises(StaleEpoch):
        await daemon.driver.attach(volume, node="n1", epoch=3)


async def test_a_claim_outlives_a_kill_and_the_log_tells_one_epoch_at_a_time(daemon: Daemon) -> None:
    first, second = await attach_two(daemon)
    agent = NbdVolumeClaims(mutual_client(daemon.pool.credentials(Identity(Role.AGENT, "n1"))))
    await agent.claim(first, epoch=9)
    await agent.aclose()
    daemon.kill()
    await daemon.start()
    await daemon.until_open(first)
    assert not daemon.pool.is_open(second)
    with pytest.raises(StaleEpoch):
        await daemon.driver.attach(first.volume, node="n2", epoch=8)

    lines = [json.loads(line) for line in (daemon.state_dir / "epochs.log").read_text().splitlines()]
    told = [(line["event"], line.get("node"), line.get("tag")) for line in lines]
    assert told == [
        *(("attach", "n1", first.epoch), ("attach", "n2", second.epoch)),
        *(("claim", "n1", 9), ("close", "n2", second.epoch)),
    ]
    assert [line["monotonic_s"] for line in lines] == sorted(line["monotonic_s"] for line in lines)


async def test_sigterm_ends_every_export_and_a_restart_serves_them_again(daemon: Daemon) -> None:
    attachments = await attach_two(daemon)
    exports = [daemon.export(attachment) for attachment in attachments]
    assert daemon.terminate() == 0
    assert not any(export.alive for export in exports)
    await daemon.start()
    for attachment in attachments:
        await daemon.until_open(attachment)


async def test_what_a_killed_daemon_had_taken_off_its_records_is_ended(daemon: Daemon) -> None:
    attachments = await attach_two(daemon)
    exports = [daemon.export(attachment) for attachment in attachments]
    daemon.kill()
    state = State(daemon.state_dir / "state.json")
    state.load()
    (volume,) = state.volumes.values()
    state.put(volume.model_copy(update={"attachments": volume.attachments[1:], "fence": 5}))

    await daemon.start()
    async with asyncio.timeout(10):
        await exports[0].ended()
    await daemon.until_open(attachments[1])
    assert exports[1].alive


async def test_a_pid_file_that_names_somebody_else_harms_nobody(daemon: Daemon) -> None:
    first, _ = await attach_two(daemon)
    export = daemon.export(first)
    daemon.kill()
    export.send(signal.SIGKILL)
    await export.ended()
    with subprocess.Popen(["sleep", "60"]) as somebody:
        for name in (endpoint_of(first).export, "stray"):
            (daemon.state_dir / "run" / f"{name}.pid").write_text(f"{somebody.pid}\n")
        await daemon.start()
        await daemon.until_open(first)
        assert somebody.poll() is None
        somebody.kill()


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({}, 4, "another volume server"),
        ({"port": PORT - 1}, 4, "already taken"),
        ({"nbd_ports": [9, 3]}, 2, "nbd_ports"),
        ({"nbd_ports": [1, PORT]}, 2, "port must lie outside"),
        ({"address": "10.9.9.9"}, 2, "10.9.9.9"),
        ({"address": "nowhere"}, 2, "address: 'nowhere' is not an IP address"),
        ({"pool": "q"}, 2, "not q"),
        ({"credentials": "/nowhere"}, 3, "/nowhere/identity.pem"),
        ({"bind": "0.0.0.0"}, 2, "bind: Extra inputs"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], code: int, words: str
) -> None:
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    config = json.loads(NbdPool(tmp_path / "credentials").config(state_dir, PORT, (20000, 20031)).model_dump_json())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | changes))
    with (state_dir / "lock").open("w") as lock, socket.create_server(("127.0.0.1", PORT - 1)):
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["--config", str(path)]) == code
    assert words in capsys.readouterr().err


def test_a_missing_or_unreadable_configuration_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    assert main(["--config", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    path.write_text('{"address": ')
    assert main(["--config", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


async def test_damaged_records_are_refused_and_left_as_they_are(daemon: Daemon) -> None:
    attachments = await attach_two(daemon)
    exports = [daemon.export(attachment) for attachment in attachments]
    daemon.kill()
    records = daemon.state_dir / "state.json"
    torn = records.read_bytes()[:-20]
    records.write_bytes(torn)
    ended = subprocess.run([*COMMAND, str(daemon.config)], capture_output=True, text=True, timeout=20, check=False)
    assert (ended.returncode, "state.json is damaged" in ended.stderr) == (10, True), ended
    assert records.read_bytes() == torn
    assert all(export.alive for export in exports), "who runs on them goes on"


async def test_it_tells_how_it_is_to_every_daemon_of_the_pool(daemon: Daemon) -> None:
    first, _ = await attach_two(daemon)
    export = daemon.export(first)
    export.send(signal.SIGKILL)
    await export.ended()
    await daemon.until_open(first)
    async with daemon.pool.client(PORT, Identity(Role.AGENT, "n1")) as client:
        assert await client.request("GET", "/healthz") == {"status": "ok"}
    told = subprocess.run(
        [
            *("curl", "--silent", "--fail", "--cacert", str(daemon.pool.credentials(SERVER) / "ca-cert.pem")),
            *("--cert", str(daemon.pool.credentials(Identity(Role.AGENT, "n1")) / "identity.pem")),
            *("--connect-to", f"{SERVER.cn}:{PORT}:127.0.0.1:{PORT}", f"https://{SERVER.cn}:{PORT}/metrics"),
        ],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    ).stdout
    figures = dict(line.split() for line in told.splitlines() if not line.startswith("#"))
    assert figures == {
        "emp_volumes": "1.0",
        "emp_volume_attachments": "2.0",
        "emp_volume_export_restarts_total": "1.0",
    }
