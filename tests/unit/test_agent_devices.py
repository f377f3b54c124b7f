"""A node opens the volume that it was told to open, waits for it, and opens nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emp.agent.devices import Devices, GrantProbe, Source
from emp.model.errors import EmpError, HostError, Refused, Unavailable, Unreachable
from emp.model.orders import VolumeGrant
from emp.model.volume import Attachment, HostDevice, NbdEndpoint, Volume, VolumeType
from emp.volumes import device_probe
from emp.volumes.base import VolumeProbe
from emp.volumes.device_probe import DeviceProbe

MIB = 1 << 20
ENDPOINT = NbdEndpoint(host="10.77.0.3", port=10900, export="vol-1.n1.7", tls_hostname="volumes-main")


def volume(name: str = "vol-1") -> Volume:
    return Volume(id=name, type=VolumeType.GP3, size_bytes=8 * MIB, serial=name.replace("-", ""))


def grant(name: str = "vol-1", endpoint: NbdEndpoint | None = None) -> VolumeGrant:
    return VolumeGrant(volume=volume(name), attachment=Attachment(volume=name, node="n1", epoch=7, endpoint=endpoint))


class Resolver:
    """Raises each of ``failures`` once, then finds the device."""

    def __init__(self, *failures: EmpError, found: Source | None = None, always: EmpError | None = None) -> None:
        self.failures = list(failures)
        self.found = found or HostDevice(path="/dev/nvme1n1", serial="vol1", size_bytes=8 * MIB)
        self.always = always
        self.asked: list[str] = []

    async def resolve(self, volume: Volume) -> Source:
        self.asked.append(volume.id)
        if self.failures:
            raise self.failures.pop(0)
        if self.always:
            raise self.always
        return self.found

    async def aclose(self) -> None: ...


def gone(reason: str = "not there yet") -> Unavailable:
    return Unavailable(reason)


async def test_an_endpoint_is_opened_as_it_was_told() -> None:
    resolver = Resolver()
    opened = await Devices(resolver).open(grant(endpoint=ENDPOINT))
    assert (opened.volume, opened.serial, opened.size_bytes, opened.source) == ("vol-1", "vol1", 8 * MIB, ENDPOINT)
    assert resolver.asked == []


async def test_the_relay_of_the_node_that_has_it_is_opened() -> None:
    relayed = VolumeGrant(volume=volume(), relay=ENDPOINT)
    assert (await Devices(Resolver()).open(relayed)).source == ENDPOINT


async def test_a_device_is_waited_for() -> None:
    resolver = Resolver(gone(), Unreachable("the service is away"), gone())
    assert (await Devices(resolver, patience_s=5.0).open(grant())).source == resolver.found
    assert len(resolver.asked) == 4


async def test_patience_ends_and_says_why() -> None:
    devices = Devices(Resolver(always=gone("no NVMe device here has the serial vol1")), patience_s=0.15)
    with pytest.raises(HostError, match="vol-1 does not show on this node: no NVMe device here") as caught:
        await devices.open(grant())
    assert caught.value.field == "volumes"


async def test_all_devices_of_an_evm_share_one_patience() -> None:
    devices = Devices(Resolver(always=gone()), patience_s=0.3)
    began_s = time.monotonic()
    with pytest.raises(HostError):
        await devices.open_all([grant(f"vol-{number}") for number in range(8)])
    assert time.monotonic() - began_s < 1.5


async def test_what_is_refused_is_not_asked_for_again() -> None:
    resolver = Resolver(Refused("two devices have the serial"))
    with pytest.raises(Refused, match="two devices"):
        await Devices(resolver).open(grant())
    assert len(resolver.asked) == 1


class Growing(Resolver):
    """A device that shows its old size for so many looks."""

    def __init__(self, looks: int, *, before_bytes: int = 4 * MIB) -> None:
        super().__init__()
        self.left, self.before_bytes = looks, before_bytes

    async def resolve(self, volume: Volume) -> Source:
        self.asked.append(volume.id)
        self.left -= 1
        size_bytes = self.before_bytes if self.left >= 0 else 8 * MIB
        if size_bytes != volume.size_bytes:
            raise Refused(f"it has {size_bytes}", field="size_bytes")
        return self.found.model_copy(update={"size_bytes": size_bytes})


@pytest.mark.parametrize("looks", range(6))
async def test_a_device_that_has_not_grown_yet_is_waited_for(looks: int) -> None:
    """Whichever of its looks meets the new size first."""
    opened = await Devices(Growing(looks), patience_s=5.0).open(grant(), was_bytes=4 * MIB)
    assert isinstance(opened.source, HostDevice)
    assert (opened.size_bytes, opened.source.size_bytes) == (8 * MIB, 8 * MIB)


async def test_a_device_of_a_third_size_is_not_waited_for() -> None:
    resolver = Growing(1000, before_bytes=5 * MIB)
    with pytest.raises(Refused, match="it has"):
        await Devices(resolver, patience_s=5.0).open(grant(), was_bytes=4 * MIB)
    assert len(resolver.asked) == 3


async def test_patience_with_a_device_that_does_not_grow_ends() -> None:
    with pytest.raises(Refused, match="it has"):
        await Devices(Growing(1000), patience_s=0.15).open(grant(), was_bytes=4 * MIB)


@pytest.mark.parametrize(
    "found",
    [
        HostDevice(path="/dev/nvme1n1", serial="vol2", size_bytes=8 * MIB),
        HostDevice(path="/dev/nvme1n1", serial="vol1", size_bytes=9 * MIB),
    ],
)
async def test_a_wrong_device_is_not_opened_whoever_found_it(found: HostDevice) -> None:
    with pytest.raises(Refused, match="not vol1 of 8 MiB"):
        await Devices(Resolver(found=found)).open(grant())


# ---------------------------------------------------------------- reading them


class Probe:
    def __init__(self) -> None:
        self.reads, self.closed, self.broken = 0, 0, False

    async def read(self) -> None:
        self.reads += 1
        if self.broken:
            raise Unreachable("broken")

    async def close(self) -> None:
        self.closed += 1


async def test_a_probe_finds_its_device_and_keeps_it_until_a_read_fails() -> None:
    made: list[Probe] = []

    def make(source: Source) -> VolumeProbe:
        made.append(Probe())
        return made[-1]

    resolver = Resolver(gone())
    probe = GrantProbe(Devices(resolver), grant(), make)
    with pytest.raises(EmpError):
        await probe.read()
    await probe.read()
    await probe.read()
    assert (len(made), made[0].reads, len(resolver.asked)) == (1, 2, 2)
    made[0].broken = True
    with pytest.raises(Unreachable):
        await probe.read()
    assert made[0].closed == 1
    await probe.read()
    assert (len(made), len(resolver.asked)) == (2, 3)
    await probe.close()
    await probe.close()
    assert made[1].closed == 1


def host_device(path: Path | str) -> HostDevice:
    return HostDevice(path=str(path), serial="vol1", size_bytes=8 * MIB)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[str]:
    """Give a block device of this machine's kernel."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("a loop device needs root, and a kernel with loop devices")
    image = tmp_path / "image"
    image.write_bytes(b"\0" * 8 * MIB)
    made = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield made.stdout.strip()
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


async def test_a_block_device_is_read_past_the_page_cache(loop_device: str) -> None:
    probe = DeviceProbe(host_device(loop_device))
    before = reads_of(loop_device)
    await probe.read()
    await probe.read()
    assert reads_of(loop_device) == before + 2, "each read is one of the device"
    await probe.close()


def reads_of(device: str) -> int:
    """Return how many reads the kernel has had the device do (Documentation/ABI/stable/sysfs-block, stat)."""
    return int(Path(f"/sys/class/block/{Path(device).name}/stat").read_text().split()[0])


async def test_a_device_that_is_gone_or_empty_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="No such file"):
        await DeviceProbe(host_device(tmp_path / "nothing")).read()
    empty = Path("/var/tmp") / f"empty-{os.getpid()}"  # on a file system that has O_DIRECT
    empty.touch()
    try:
        with pytest.raises(Unreachable):
            await DeviceProbe(host_device(empty)).read()
    finally:
        empty.unlink()


async def test_a_read_that_hangs_is_told_and_no_other_is_begun_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, begun = threading.Event(), []

    def hang(path: str) -> None:
        begun.append(path)
        may_end.wait(10)

    monkeypatch.setattr(device_probe, "_read_block", hang)
    monkeypatch.setattr(device_probe, "TIMEOUT_S", 0.05)
    probe = DeviceProbe(host_device("/dev/nvme1n1"))
    for _ in range(3):
        with pytest.raises(Unreachable, match="no answer in"):
            await probe.read()
    assert len(begun) == 1
    may_end.set()
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(Unreachable):
                await probe.read()
                break
    await probe.close()
