"""Volumes that are made from an image: what is on them, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.model.errors import AlreadyExists, BadInput, NotFound
from emp.model.volume import VolumeType
from emp.volumes.server.config import Config
from emp.volumes.server.disk import copy_image
from emp.volumes.server.protocol import CreateVolume, new_volume_id
from emp.volumes.server.service import VolumeService
from emp.wire.pki import CertificateAuthority, Role

MIB = 1 << 20
CONTENT = b"a root file system" * 1000
ORDER = CreateVolume(type=VolumeType.IO2, size_bytes=4 * MIB, image="debian")


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[VolumeService]:
    """A service with the image `debian` of 2 MiB, of which the most is zeros."""
    disks = tmp_path / "disks"
    disks.mkdir()
    with (disks / "debian.raw").open("wb") as image:
        image.write(CONTENT)
        image.truncate(2 * MIB)
    config = Config(
        address="127.0.0.1",
        port=7450,
        nbd_ports=(20000, 20010),
        credentials=tmp_path / "pki",
        state_dir=tmp_path / "state",
        pool="images",
        images_dir=disks,
    )
    authority = CertificateAuthority.create(tmp_path / "ca", "images")
    made = VolumeService(config, authority.issue(Role.VOLUMES, "main"))
    await made.start()
    yield made
    await made.stop()


def data_of(tmp_path: Path, volume: str) -> Path:
    return tmp_path / "state" / "images" / f"{volume}.raw"


async def test_it_holds_the_image_and_then_zeros(service: VolumeService, tmp_path: Path) -> None:
    made = await service.create(new_volume_id(), ORDER)
    assert made.image == "debian"
    written = data_of(tmp_path, made.id).read_bytes()
    assert len(written) == ORDER.size_bytes
    assert written == CONTENT + bytes(ORDER.size_bytes - len(CONTENT))
    assert data_of(tmp_path, made.id).stat().st_blocks * 512 < MIB  # sparse


async def test_a_volume_is_a_copy(service: VolumeService, tmp_path: Path) -> None:
    one, other = [await service.create(new_volume_id(), ORDER) for _ in range(2)]
    with data_of(tmp_path, one.id).open("r+b") as data:
        data.write(b"changed")
    assert data_of(tmp_path, other.id).read_bytes().startswith(CONTENT)
    assert (tmp_path / "disks" / "debian.raw").read_bytes().startswith(CONTENT)


async def test_the_same_order_again_makes_nothing_and_another_image_is_refused(
    service: VolumeService, tmp_path: Path
) -> None:
    made = await service.create(new_volume_id(), ORDER)
    with data_of(tmp_path, made.id).open("r+b") as data:
        data.write(b"written by the guest")
    assert await service.create(made.id, ORDER) == made
    assert data_of(tmp_path, made.id).read_bytes().startswith(b"written by the guest")
    with pytest.raises(AlreadyExists):
        await service.create(made.id, ORDER.model_copy(update={"image": None}))


async def test_what_a_copy_that_was_cut_short_has_left_is_overwritten(service: VolumeService, tmp_path: Path) -> None:
    volume = new_volume_id()
    data_of(tmp_path, volume).write_bytes(b"half" * (2 * MIB))
    await service.create(volume, ORDER)
    assert data_of(tmp_path, volume).read_bytes() == CONTENT + bytes(ORDER.size_bytes - len(CONTENT))


async def test_an_image_that_is_not_there(service: VolumeService) -> None:
    with pytest.raises(NotFound, match="no image 'other'") as refused:
        await service.create(new_volume_id(), ORDER.model_copy(update={"image": "other"}))
    assert (refused.value.field, refused.value.hint) == ("image", "images here: debian")
    assert service.list() == ()


def test_an_image_that_does_not_fit(tmp_path: Path) -> None:
    source, path = tmp_path / "debian.raw", tmp_path / "volume.raw"
    source.write_bytes(bytes(2 * MIB))
    with pytest.raises(BadInput, match="less than the image debian needs") as refused:
        copy_image(source, path, MIB)
    assert refused.value.field == "size_bytes"
    assert not path.exists()
