"""Storage that every node reaches, over real NBD servers: how it becomes a volume, and what cannot be had of it.

What it has in common with other volumes is in ``test_volumes``.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from emp.hypervisor.qemu.rbd import rbd_options
from emp.model.errors import AlreadyExists, BadInput, NotFound, Refused, Unreachable
from emp.model.volume import RbdImage, VolumeType
from emp.volumes.nbd_probe import export_size_bytes
from emp.volumes.shared import SharedVolumeDriver
from emp.volumes.shared_url import parse_url
from emp.wire.identity import Identity, Role
from emp.wire.tls import mutual_client
from tests.nbd_pool import MemoryRegistry, NbdPool

CONTROLLER = Identity(Role.CONTROLLER, "main")
SIZE_BYTES = 16 << 20
AWAY = "nbds://127.0.0.1:1/disk"


@pytest.fixture
def pool(tmp_path: Path) -> NbdPool:
    return NbdPool(tmp_path / "credentials")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, SIZE_BYTES)
    return path


@pytest.fixture
def driver(pool: NbdPool) -> SharedVolumeDriver:
    tls = mutual_client(pool.credentials(CONTROLLER))
    return SharedVolumeDriver(MemoryRegistry(), lambda endpoint: export_size_bytes(endpoint, tls))


async def test_the_size_is_the_exports_own(driver: SharedVolumeDriver, pool: NbdPool, image: Path) -> None:
    with pool.serving(image) as url:
        with pytest.raises(Refused, match="16777216 bytes") as caught:
            await driver.register(url, size_bytes=SIZE_BYTES + 4096)
        assert caught.value.field == "size"
        assert await driver.list() == ()
        made = await driver.register(url, size_bytes=SIZE_BYTES)
    assert (made.type, made.size_bytes, made.url) == (VolumeType.SHARED, SIZE_BYTES, url)
    assert len(made.serial) <= 20


async def test_one_storage_is_one_volume(driver: SharedVolumeDriver, pool: NbdPool, image: Path) -> None:
    with pool.serving(image) as url:
        made = await driver.register(url)
        with pytest.raises(AlreadyExists, match=made.id):
            await driver.register(f"{url}?tls-hostname=volumes-store-disk")
        await driver.delete(made.id)
        assert (await driver.register(url)).id == made.id, "and the guest sees the serial that it knows"


async def test_an_export_that_is_not_there_is_refused_even_with_a_size(
    driver: SharedVolumeDriver, pool: NbdPool, image: Path
) -> None:
    with pool.serving(image) as url:
        with pytest.raises(Refused, match="no export 'disk2'") as caught:
            await driver.register(f"{url}2", size_bytes=SIZE_BYTES)
        assert caught.value.field == "url"


async def test_where_it_cannot_be_read_the_size_must_be_said(driver: SharedVolumeDriver) -> None:
    with pytest.raises(Unreachable) as caught:
        await driver.register(AWAY)
    assert caught.value.field == "url"
    assert "--size" in (caught.value.hint or "")
    assert (await driver.register(AWAY, size_bytes=SIZE_BYTES)).size_bytes == SIZE_BYTES
    with pytest.raises(BadInput) as bad:
        await driver.register("rbd:vms/web")
    assert bad.value.field == "size"
    for odd in (511, 1000):
        with pytest.raises(Refused, match="whole number of sectors"):
            await driver.register("rbd:vms/web", size_bytes=odd)


async def test_a_server_of_another_authority_or_name_is_not_believed(
    driver: SharedVolumeDriver, pool: NbdPool, image: Path, tmp_path: Path
) -> None:
    stranger = NbdPool(tmp_path / "stranger")
    with stranger.serving(image) as url, pytest.raises(Refused, match="is not believed"):
        await driver.register(url, size_bytes=SIZE_BYTES)
    with pool.serving(image, names=()) as url:
        with pytest.raises(Refused, match="is not believed"):
            await driver.register(url, size_bytes=SIZE_BYTES)
        made = await driver.register(f"{url}?tls-hostname=volumes-store-disk")
        attachment = await driver.attach(made.id, node="n1", epoch=1)
        assert pool.is_open(attachment), "QEMU verifies that very name"
        assert not stranger.is_open(attachment)


async def test_nobody_is_said_to_be_shut_out(driver: SharedVolumeDriver, pool: NbdPool, image: Path) -> None:
    with pool.serving(image) as url:
        made = await driver.register(url)
        assert not made.type.fenceable
        old = await driver.attach(made.id, node="n1", epoch=1)
        new = await driver.attach(made.id, node="n2", epoch=2)
        with pytest.raises(Refused, match="nothing can shut a node out") as caught:
            await driver.fence(made.id, epoch=2)
        assert "emp node fence" in (caught.value.hint or "")
        assert (await driver.describe(made.id)).attachments == (old, new)
        assert pool.io(old, "write -P 7 0 4k"), "which is so"
    with pytest.raises(NotFound):
        await driver.fence("shared-000000000000", epoch=2)


async def test_it_takes_over_the_size_that_it_has_grown_to(
    driver: SharedVolumeDriver, pool: NbdPool, image: Path
) -> None:
    with pool.serving(image) as url:
        made = await driver.register(url)
        with pytest.raises(BadInput, match="cannot shrink") as smaller:
            await driver.resize(made.id, SIZE_BYTES // 2)
        assert smaller.value.field == "size_bytes"
        with pytest.raises(Refused, match=f"has {SIZE_BYTES} bytes"):
            await driver.resize(made.id, 2 * SIZE_BYTES)
        assert (await driver.resize(made.id, SIZE_BYTES)).size_bytes == SIZE_BYTES
    ceph = await driver.register("rbd:vms/web", size_bytes=SIZE_BYTES)
    assert (await driver.resize(ceph.id, 2 * SIZE_BYTES)).size_bytes == 2 * SIZE_BYTES
    assert (await driver.describe(ceph.id)).size_bytes == 2 * SIZE_BYTES
    with pytest.raises(NotFound):
        await driver.resize("shared-000000000000", SIZE_BYTES)


# ------------------------------------------------------------------ Ceph: by command line, as there is no cluster here


def said_by_qemu(node: dict[str, object]) -> str:
    """Return what QEMU says to a ``-blockdev``: it checks all options before it looks for driver or cluster."""
    argv = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "none", "-blockdev", json.dumps(node)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, "there is no cluster to connect to"
    return done.stderr


async def test_qemu_knows_every_option_of_a_ceph_image(driver: SharedVolumeDriver) -> None:
    made = await driver.register("rbd:vms/team/web:id=emp:conf=/etc/ceph/b.conf", size_bytes=SIZE_BYTES)
    where = (await driver.attach(made.id, node="n1", epoch=1)).endpoint
    assert isinstance(where, RbdImage)
    assert where == parse_url(made.url or "")
    node = rbd_options(where) | {"node-name": "volume0-of-ceph", "cache": {"direct": True, "no-flush": False}}
    assert {key: node[key] for key in ("pool", "namespace", "image", "user", "conf")} == {
        "pool": "vms",
        "namespace": "team",
        "image": "web",
        "user": "emp",
        "conf": "/etc/ceph/b.conf",
    }
    said = said_by_qemu(node)
    assert "Unknown driver 'rbd'" in said or "error connecting" in said, said
    assert "is unexpected" in said_by_qemu({**node, "snapshots": "x"}), "or this test could not fail"
