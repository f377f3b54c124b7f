"""An EBS volume is found by its serial among NVMe devices, and nothing else is ever taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from emp.model.errors import Refused, Unavailable
from emp.model.volume import HostDevice, Volume, VolumeType
from emp.volumes.nvme import MODEL, NvmeResolver, find_device

GIB = 1 << 30
VOLUME = Volume(id="vol-0123456789abcdef0", type=VolumeType.GP3, size_bytes=8 * GIB, serial="vol0123456789abcdef0")


class Sysfs:
    """Files as the kernel lays them out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "class/nvme").mkdir(parents=True)
        (root / "class/block").mkdir()

    def add(self, name: str, serial: str, *, size_bytes: int | None = 8 * GIB, model: str = MODEL) -> None:
        controller = self.root / "class/nvme" / name
        controller.mkdir()
        (controller / "serial").write_text(f"{serial:<20}\n")
        (controller / "model").write_text(f"{model:<40}\n")
        if size_bytes is not None:
            block = self.root / f"class/block/{name}n1"
            block.mkdir()
            (block / "size").write_text(f"{size_bytes // 512}\n")

    def find(self, volume: Volume = VOLUME) -> HostDevice:
        return find_device(volume, sysfs=self.root, dev=Path("/dev"))


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


def test_the_device_is_the_one_with_the_serial_whatever_its_name(sysfs: Sysfs) -> None:
    sysfs.add("nvme0", "vol0fffffffffffffff0")
    sysfs.add("nvme10", VOLUME.serial)
    sysfs.add("nvme1", "AWS1234567890", model="Amazon EC2 NVMe Instance Storage")
    assert sysfs.find() == HostDevice(path="/dev/nvme10n1", serial=VOLUME.serial, size_bytes=8 * GIB)


def test_a_device_that_is_not_there_yet_is_to_be_asked_for_again(sysfs: Sysfs, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no NVMe device here has the serial vol0123456789abcdef0"):
        find_device(VOLUME, sysfs=tmp_path / "nothing", dev=Path("/dev"))
    sysfs.add("nvme0", "vol0123456789abcdef")
    with pytest.raises(Unavailable):
        sysfs.find()
    sysfs.add("nvme1", VOLUME.serial, size_bytes=None)
    with pytest.raises(Unavailable, match="no size yet"):
        sysfs.find()


@pytest.mark.parametrize("size_bytes", [4 * GIB, 8 * GIB + 512, 8 * GIB - 512])
def test_the_right_serial_with_the_wrong_size_is_refused(sysfs: Sysfs, size_bytes: int) -> None:
    sysfs.add("nvme1", VOLUME.serial, size_bytes=size_bytes)
    with pytest.raises(Refused, match=f"{size_bytes} bytes") as caught:
        sysfs.find()
    assert caught.value.field == "size_bytes"
    assert "do not open it" in str(caught.value.hint)


def test_the_right_serial_on_another_kind_of_device_is_refused(sysfs: Sysfs) -> None:
    sysfs.add("nvme1", VOLUME.serial, model="Somebody's SSD")
    with pytest.raises(Refused, match="is Somebody's SSD, not Amazon Elastic Block Store"):
        sysfs.find()


def test_two_devices_with_the_serial_are_refused(sysfs: Sysfs) -> None:
    sysfs.add("nvme1", VOLUME.serial)
    sysfs.add("nvme2", VOLUME.serial)
    with pytest.raises(Refused, match="nvme1, nvme2"):
        sysfs.find()


async def test_a_resolver_remembers_nothing(sysfs: Sysfs) -> None:
    resolver = NvmeResolver(sysfs=sysfs.root, dev=Path("/dev"))
    sysfs.add("nvme1", VOLUME.serial)
    assert (await resolver.resolve(VOLUME)).path == "/dev/nvme1n1"
    (sysfs.root / "class/nvme/nvme1/serial").write_text("vol0fffffffffffffff0\n")
    sysfs.add("nvme2", VOLUME.serial)
    assert (await resolver.resolve(VOLUME)).path == "/dev/nvme2n1"
