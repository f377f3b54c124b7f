"""The simulated cloud as a daemon: an attached volume is readable at its node, at no other, and outlives a kill."""

# ruff: noqa: ASYNC110, ASYNC220 - the daemon is a process, and this loop has nothing else to do

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest

from emp.agent.devices import Devices
from emp.host.processes import Process, find
from emp.lab.checkers import epochs
from emp.lab.cloud.__main__ import main
from emp.lab.cloud.knobs import Fault, Harm, Latency, RemapDelay
from emp.lab.cloud.memory import MemoryFile
from emp.model.errors import (
    Conflict,
    Forbidden,
    HostError,
    NotFound,
    OutcomeUnknown,
    Refused,
    StaleEpoch,
    Unavailable,
)
from emp.model.orders import VolumeGrant
from emp.model.volume import NbdEndpoint, Volume, VolumeType
from emp.wire.pki import Identity, Role
from emp.wire.sockets import listen
from emp.wire.tls import mutual_client
from tests.cloud.interfaces import holder, new_eni, primary, show_eni, take
from tests.cloud.served import GIB, NODES, CloudPool, at

LONG = Latency(attach_s=2.0, detach_s=2.0, create_s=0.5, delete_s=2.0)
"""about what a cloud takes that is killed and started again"""


class Daemon:
    """One cloud, started and killed as often as a test likes; always the same directory."""

    def __init__(self, directory: Path, access_key: str) -> None:
        with listen("127.0.0.1", 0) as socket:
            port = int(socket.getsockname()[1])
        self.pool = CloudPool(directory, access_key, port)
        self.config = directory / "config.json"
        self.config.write_text(self.pool.cloud.model_dump_json())
        self.driver = self.pool.driver()
        self.log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            argv = [sys.executable, "-m", "emp.lab.cloud", "--config", str(self.config)]
            self._process = subprocess.Popen(argv, stdout=log, stderr=log)
        async with asyncio.timeout(20), self.pool.caller(Identity(Role.AGENT, "n1")) as caller:
            while True:
                assert self._process.poll() is None, self.log.read_text()
                with contextlib.suppress(Unavailable):
                    await caller.request("GET", "/healthz")
                    return
                await asyncio.sleep(0.02)

    def kill(self) -> None:
        assert self._process
        self._process.kill()
        self._process.wait()

    async def restart(self) -> None:
        self.kill()
        await self.start()

    async def volume(self, kind: VolumeType = VolumeType.IO2) -> Volume:
        return await self.driver.create(type=kind, size_bytes=4 * GIB)

    async def device(self, volume: Volume, node: str) -> NbdEndpoint:
        resolver = self.pool.resolver(node)
        try:
            return await resolver.resolve(volume)
        finally:
            await resolver.aclose()

    def export(self, endpoint: NbdEndpoint) -> Process:
        found = find(int((self.pool.cloud.state_dir / "run" / f"{endpoint.export}.pid").read_text()))
        assert found
        return found

    async def close(self) -> None:
        await self.driver.aclose()
        if self._process and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(timeout=10)
        for pid_file in (self.pool.cloud.state_dir / "run").glob("*.pid"):
            if left := find(int(pid_file.read_text())):
                await left.stop(grace_s=0)


@pytest.fixture
async def daemon(tmp_path: Path, access_key: str) -> AsyncIterator[Daemon]:
    made = Daemon(tmp_path, access_key)
    try:
        await made.start()
        yield made
    finally:
        await made.close()


async def test_an_attached_volume_is_open_to_its_node_alone(daemon: Daemon) -> None:
    pool, volume = daemon.pool, await daemon.volume()
    with pytest.raises(Unavailable, match=volume.serial):
        await daemon.device(volume, "n1")
    await daemon.driver.attach(volume.id, node="n1", epoch=7)
    first = await daemon.device(volume, "n1")
    assert first.export == f"{volume.id}.n1.1", "named by the cloud's own count, not by the pool's epoch"
    assert pool.io(at(first, "n1"), "write -P 5 0 64k")
    assert pool.is_open(at(first, "n1"), Identity(Role.AGENT, "n1"))
    for stranger in (Identity(Role.QEMU, "n2"), Identity(Role.AGENT, "n2"), Identity(Role.CONTROLLER, "main")):
        assert not pool.is_open(at(first, "n1"), stranger)
    with pytest.raises(Unavailable):
        await daemon.device(volume, "n2")

    await daemon.driver.attach(volume.id, node="n2", epoch=8)
    second = await daemon.device(volume, "n2")
    assert pool.io(at(second, "n2"), "read -P 5 0 64k"), "the same data"
    process = daemon.export(first)
    await daemon.driver.detach(volume.id, node="n1", epoch=7)
    assert not process.alive, "detaching ends the process"
    with pytest.raises(Unavailable):
        await daemon.device(volume, "n1")
    assert pool.io(at(second, "n2"), "read -P 5 0 64k")


async def test_a_volume_of_one_node_goes_from_one_to_the_next(daemon: Daemon) -> None:
    volume = await daemon.volume(VolumeType.GP3)
    await daemon.driver.attach(volume.id, node="n1", epoch=1)
    assert daemon.pool.io(at(await daemon.device(volume, "n1"), "n1"), "write -P 6 0 64k")
    with pytest.raises(Conflict, match="n1"):
        await daemon.driver.attach(volume.id, node="n2", epoch=2)
    await daemon.driver.detach(volume.id, node="n1", epoch=1)
    await daemon.driver.attach(volume.id, node="n2", epoch=2)
    moved = await daemon.device(volume, "n2")
    assert moved.export.endswith(".n2.2")
    assert daemon.pool.io(at(moved, "n2"), "read -P 6 0 64k")
    assert epochs.violations(daemon.pool.cloud.state_dir / "epochs.log", volume.id, single=True) == []


async def test_exports_outlive_a_killed_cloud_and_are_adopted(daemon: Daemon) -> None:
    volume = await daemon.volume()
    await daemon.driver.attach(volume.id, node="n1", epoch=3)
    endpoint = await daemon.device(volume, "n1")
    export = daemon.export(endpoint)
    described = await daemon.driver.describe(volume.id)
    daemon.kill()
    assert daemon.pool.io(at(endpoint, "n1"), "write -P 1 0 4k"), "with no cloud at all"
    await daemon.start()
    assert await daemon.driver.describe(volume.id) == described
    assert await daemon.device(volume, "n1") == endpoint
    assert daemon.export(endpoint) == export
    export.send(signal.SIGKILL)
    await export.ended()
    async with asyncio.timeout(10):
        while not daemon.pool.is_open(at(endpoint, "n1")):
            await asyncio.sleep(0.02)
    daemon.kill()
    export = daemon.export(endpoint)
    export.send(signal.SIGKILL)
    await export.ended()
    await daemon.start()
    assert daemon.pool.io(at(endpoint, "n1"), "read -P 1 0 4k"), "what had died meanwhile is served again"


async def test_what_is_under_way_goes_on_after_a_kill(daemon: Daemon) -> None:
    """Killed while the states last, with nobody to order it again: the answer was given, so it is done."""
    driver, state_dir = daemon.driver, daemon.pool.cloud.state_dir
    comes, goes, ends = [await daemon.volume() for _ in range(3)]
    for volume in (goes, ends):
        await driver.attach(volume.id, node="n1", epoch=4)
    await driver.detach(ends.id, node="n1", epoch=4)
    await daemon.pool.turn(latency=LONG)
    ordering = [
        asyncio.create_task(driver.attach(comes.id, node="n2", epoch=5)),
        asyncio.create_task(driver.detach(goes.id, node="n1", epoch=4)),
        asyncio.create_task(driver.delete(ends.id)),
    ]
    async with asyncio.timeout(5):
        while not ('"attaching"' in (text := (state_dir / "cloud.json").read_text()) and '"detaching"' in text
                   and len(re.findall(r'"deleted_s":[^n]', text)) == 1):  # fmt: skip
            await asyncio.sleep(0.01)
    daemon.kill()
    for order in ordering:
        order.cancel()
    await asyncio.gather(*ordering, return_exceptions=True)
    await daemon.start()
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(Unavailable):
                endpoint = await daemon.device(comes, "n2")
                break
            await asyncio.sleep(0.05)
        assert daemon.pool.is_open(at(endpoint, "n2"))
        while (await driver.describe(goes.id)).attachments:
            await asyncio.sleep(0.05)
        assert not list((state_dir / "run").glob(f"{goes.id}*.pid"))
        with pytest.raises(NotFound):
            while True:
                await driver.describe(ends.id)
                await asyncio.sleep(0.05)
        while list((state_dir / "images").glob(f"{ends.id}*")):
            await asyncio.sleep(0.05)


async def test_tags_tokens_and_knobs_outlive_a_kill(daemon: Daemon) -> None:
    ec2: Any = daemon.driver._api._make()  # boto3's client, as the driver makes it
    request = {"AvailabilityZone": "eu-west-1a", "Size": 8, "VolumeType": "gp3", "ClientToken": "the same order"}
    made = (await asyncio.to_thread(ec2.create_volume, **request))["VolumeId"]
    await asyncio.to_thread(ec2.create_tags, Resources=[made], Tags=[{"Key": "owner", "Value": "me"}])
    await daemon.pool.turn(latency=LONG, faults=(Fault(harm=Harm.DENIED, times=None),))
    await daemon.restart()
    assert (await asyncio.to_thread(ec2.create_volume, **request))["VolumeId"] == made
    (found,) = (await asyncio.to_thread(ec2.describe_volumes, VolumeIds=[made]))["Volumes"]
    assert found["Tags"] == [{"Key": "owner", "Value": "me"}]
    async with daemon.pool.caller(Identity(Role.CONTROLLER, "main")) as controller:
        knobs = await controller.request("GET", "/knobs")
    assert (knobs["latency"]["attach_s"], knobs["faults"]) == (LONG.attach_s, [])
    ec2.close()


async def test_a_lost_reply_is_found_to_be_done(daemon: Daemon) -> None:
    volume = await daemon.volume()
    faults = tuple(Fault(harm=Harm.LOST_REPLY, action=action) for action in ("CreateTags", "AttachVolume"))
    await daemon.pool.turn(faults=faults)
    await daemon.driver.attach(volume.id, node="n1", epoch=1)
    assert [line["event"] for line in daemon.pool.log(volume.id)].count("attach") == 1


async def test_a_detach_that_is_stuck_goes_by_force_where_nothing_holds_it(daemon: Daemon) -> None:
    volume = await daemon.volume(VolumeType.GP3)
    await daemon.driver.attach(volume.id, node="n1", epoch=1)
    endpoint = await daemon.device(volume, "n1")
    await daemon.pool.turn(busy=frozenset({volume.id}))
    detaching = asyncio.create_task(daemon.driver.detach(volume.id, node="n1", epoch=1, unheld=True))
    await asyncio.sleep(0.5)  # half of the time that an orderly detach is given
    assert daemon.pool.is_open(at(endpoint, "n1")), "the node has it still"
    await daemon.restart()
    await detaching
    assert not daemon.pool.is_open(at(endpoint, "n1"))


async def test_the_history_speaks_of_the_owners_epochs(daemon: Daemon) -> None:
    volume = await daemon.volume()
    await daemon.driver.attach(volume.id, node="n1", epoch=11)
    await daemon.driver.attach(volume.id, node="n1", epoch=12)
    await daemon.driver.attach(volume.id, node="n2", epoch=13)
    await daemon.driver.fence(volume.id, epoch=13)
    noted = [
        (line["event"], line.get("node"), line.get("tag", line.get("epoch"))) for line in daemon.pool.log(volume.id)
    ]
    assert noted == [
        ("tag", "n1", 11), ("attach", "n1", 11), ("tag", "n1", 12), ("tag", "n2", 13), ("attach", "n2", 13),
        ("fence", None, 13), ("close", "n1", 12),
    ]  # fmt: skip
    log = daemon.pool.cloud.state_dir / "epochs.log"
    await daemon.restart()
    await daemon.driver.attach(volume.id, node="n2", epoch=14)
    assert [line["event"] for line in daemon.pool.log(volume.id)][len(noted) :] == ["fence", "tag"]
    assert epochs.violations(log, volume.id) == []
    assert epochs.violations(log, volume.id, single=True), "both had it for a while"
    with pytest.raises(StaleEpoch):
        await daemon.driver.attach(volume.id, node="n1", epoch=12)
    with log.open("a") as file:
        file.write(json.dumps({"event": "attach", "volume": volume.id, "node": "n1", "epoch": 12, "tag": 12}) + "\n")
    assert epochs.violations(log, volume.id) == [f"n1 got {volume.id} under epoch 12 after 13 had been claimed"]


async def test_only_a_node_of_the_cloud_asks_for_devices(daemon: Daemon) -> None:
    for identity, error in (
        (Identity(Role.CONTROLLER, "main"), Forbidden),
        (Identity(Role.QEMU, "n1"), Forbidden),
        (Identity(Role.AGENT, "n9"), NotFound),
    ):
        async with daemon.pool.caller(identity) as caller:
            with pytest.raises(error):
                await caller.request("GET", "/devices")


async def test_a_disk_that_is_full_is_no_answer_and_no_loss(daemon: Daemon, tmp_path: Path) -> None:
    """What cannot be remembered is not promised: the order's outcome is unknown, and given again it is done once."""
    volume = await daemon.volume()
    state = daemon.pool.cloud.state_dir
    hidden = state.with_name("hidden")
    state.rename(hidden)  # where nothing can be written
    refusal = asyncio.create_task(
        daemon.driver._api.ask("create_tags", Resources=[volume.id], Tags=[{"Key": "a", "Value": "b"}])
    )
    with pytest.raises(OutcomeUnknown, match="InternalError"):
        await refusal
    hidden.rename(state)
    await daemon.driver.attach(volume.id, node="n1", epoch=1)
    await daemon.restart()
    assert [a.node for a in (await daemon.driver.describe(volume.id)).attachments] == ["n1"]


async def test_metrics_count_what_is_there(daemon: Daemon) -> None:
    volume = await daemon.volume()
    await daemon.driver.attach(volume.id, node="n1", epoch=1)
    async with daemon.pool.caller(Identity(Role.CONTROLLER, "main")) as caller:
        assert await caller.request("GET", "/healthz") == {"status": "ok"}
    tls = mutual_client(daemon.pool.credentials(Identity(Role.AGENT, "n1")))
    with contextlib.closing(HTTPSConnection("127.0.0.1", daemon.pool.port, context=tls, timeout=10)) as plain:
        plain.request("GET", "/metrics")
        text = plain.getresponse().read().decode()
    assert "emp_cloud_volumes 1.0" in text
    assert "emp_cloud_exports 1.0" in text
    assert 'emp_cloud_requests_total{action="AttachVolume"} 1.0' in text


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"access_key": "short"}, "access_key"),
        ({"nodes": {}}, "nodes"),
        ({"nodes": {"n1": {"instance": "i-1", "zone": "a"}}}, "nodes.n1.instance"),
        ({"nodes": {n: {"instance": "i-" + "0" * 17, "zone": "a"} for n in ("n1", "n2")}}, "same instance"),
        ({"pool": "other"}, "credentials"),
    ],
)
def test_a_wrong_configuration_is_refused(
    tmp_path: Path, access_key: str, change: dict[str, Any], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = CloudPool(tmp_path, access_key, 19998)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(pool.cloud.model_dump_json()) | change))
    assert main(["--config", str(config)]) == 2
    assert field in capsys.readouterr().err


def test_a_damaged_memory_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "cloud.json"
    assert MemoryFile(path).read() is None
    path.write_text("{")
    path.chmod(0o600)
    with pytest.raises(HostError, match="damaged"):
        MemoryFile(path).read()


async def test_an_address_that_moves_arrives_though_the_cloud_was_killed(daemon: Daemon) -> None:
    await daemon.pool.turn(remap=RemapDelay(least_s=2.0))
    ec2 = daemon.pool.boto()

    def order() -> str:
        take(ec2, NODES["n1"], "10.77.3.7")
        spare = new_eni(ec2, SubnetId=primary(ec2, NODES["n1"])["SubnetId"])
        take(ec2, NODES["n2"], "10.77.3.7", AllowReassignment=True)
        return spare

    spare = await asyncio.to_thread(order)
    assert await asyncio.to_thread(holder, ec2, "10.77.3.7") == NODES["n1"]
    await daemon.restart()
    assert (await asyncio.to_thread(show_eni, ec2, spare))["PrivateIpAddress"] == "10.77.251.4"
    async with asyncio.timeout(10):
        while await asyncio.to_thread(holder, ec2, "10.77.3.7") != NODES["n2"]:
            await asyncio.sleep(0.05)
    ec2.close()


async def test_a_volume_grows_under_its_node_and_shows_it_a_moment_later(daemon: Daemon) -> None:
    pool, driver = daemon.pool, daemon.driver
    await pool.turn(device_lag_s=1.0)
    volume = await daemon.volume(VolumeType.GP3)
    await driver.attach(volume.id, node="n1", epoch=1)
    async with asyncio.timeout(10):
        while True:
            with contextlib.suppress(Unavailable):
                before = await daemon.device(volume, "n1")
                break
            await asyncio.sleep(0.05)
    assert pool.io(at(before, "n1"), "write -P 9 0 4k", "flush")
    grown = await driver.resize(volume.id, 8 * GIB)
    assert await daemon.device(volume, "n1") == before, "the node still sees it as it was"
    with pytest.raises(Refused):
        await daemon.device(grown, "n1")
    devices = Devices(pool.resolver("n1"))
    grant = VolumeGrant(volume=grown, attachment=await driver.attach(volume.id, node="n1", epoch=2))
    opened = await devices.open(grant, was_bytes=volume.size_bytes)
    await devices.aclose()
    assert isinstance(opened.source, NbdEndpoint)
    assert pool.io(at(opened.source, "n1"), "read -P 9 0 4k", f"read -P 0 {8 * GIB - 4096} 4k"), "all of it"
    assert pool.io(at(before, "n1"), "read -P 9 0 4k"), "what was open stays open"
    exports = [daemon.export(each) for each in (before, opened.source)]
    await daemon.restart()
    assert await daemon.device(grown, "n1") == opened.source
    await driver.fence(volume.id, epoch=2)
    await driver.detach(volume.id, node="n1", epoch=2)
    assert not any(export.alive for export in exports), "both go with the attachment"
    assert epochs.violations(pool.cloud.state_dir / "epochs.log", volume.id, single=True) == []
    await driver.attach(volume.id, node="n2", epoch=3)


async def test_a_cloud_that_is_killed_as_a_volume_grows_goes_on(daemon: Daemon) -> None:
    await daemon.pool.turn(latency=Latency(modify_s=1.0, optimize_s=600.0))
    volume = await daemon.volume(VolumeType.GP3)
    await daemon.driver.attach(volume.id, node="n1", epoch=1)
    growing = asyncio.create_task(daemon.driver.resize(volume.id, 8 * GIB))
    ec2 = daemon.pool.boto()
    async with asyncio.timeout(10):
        while not (await asyncio.to_thread(ec2.describe_volumes_modifications))["VolumesModifications"]:
            await asyncio.sleep(0.02)
    ec2.close()
    await daemon.restart()
    assert (await growing).size_bytes == 8 * GIB
    await daemon.device(await growing, "n1")
