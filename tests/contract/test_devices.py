"""What every resolver of devices must do: the volume by its serial and size, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from emp.lab.cloud.daemon import serving
from emp.lab.cloud.face import Face
from emp.lab.cloud.knobs import Shown
from emp.model.errors import Refused, Unavailable
from emp.model.volume import HostDevice, NbdEndpoint, Volume, VolumeType
from emp.volumes.base import DeviceResolver
from emp.volumes.ebs import EbsVolumeDriver
from emp.volumes.nvme import NvmeResolver
from emp.wire.sockets import listen
from tests.cloud.served import GIB, CloudPool
from tests.unit.test_nvme_resolver import Sysfs

OTHER_SERIAL = "vol0fffffffffffffff0"


class World(Protocol):
    """One node, and a volume that may be attached to it."""

    @property
    def resolver(self) -> DeviceResolver: ...
    @property
    def volume(self) -> Volume: ...

    async def attach(self, *, serial: str | None = None, size_bytes: int | None = None) -> None:
        """Let the volume show, perhaps as something else than it is."""
        ...

    async def attach_other(self, *, serial: str | None = None) -> None:
        """Let another volume show as well."""
        ...

    async def detach(self) -> None: ...


class Metal:
    def __init__(self, directory: Path) -> None:
        self.sysfs = Sysfs(directory)
        self.resolver = NvmeResolver(sysfs=directory, dev=Path("/dev"))
        self.volume = Volume(
            id="vol-0123456789abcdef0", type=VolumeType.GP3, size_bytes=4 * GIB, serial="vol0123456789abcdef0"
        )

    async def attach(self, *, serial: str | None = None, size_bytes: int | None = None) -> None:
        self.sysfs.add("nvme1", serial or self.volume.serial, size_bytes=size_bytes or self.volume.size_bytes)

    async def attach_other(self, *, serial: str | None = None) -> None:
        self.sysfs.add("nvme2", serial or OTHER_SERIAL)

    async def detach(self) -> None:
        (self.sysfs.root / "class/nvme/nvme1/serial").write_text("\n")


class Cloud:
    def __init__(self, pool: CloudPool, face: Face, driver: EbsVolumeDriver, volume: Volume, other: Volume) -> None:
        self.pool = pool
        self.face = face
        self.driver = driver
        self.volume = volume
        self.other = other
        self.resolver = pool.resolver("n1")
        self.shown: dict[str, Shown] = {}

    async def attach(self, *, serial: str | None = None, size_bytes: int | None = None) -> None:
        self.shown[self.volume.id] = Shown(serial=serial, size_bytes=size_bytes)
        await self._attach(self.volume)

    async def attach_other(self, *, serial: str | None = None) -> None:
        self.shown[self.other.id] = Shown(serial=serial)
        await self._attach(self.other)

    async def _attach(self, volume: Volume) -> None:
        await self.pool.turn(shown=self.shown)
        await self.driver.attach(volume.id, node="n1", epoch=1)

    async def detach(self) -> None:
        await self.driver.detach(self.volume.id, node="n1", epoch=1)


@pytest.fixture(scope="session")
def access_key() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIASIMULATEDCLOUD00")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        yield "AKIASIMULATEDCLOUD00"


@contextlib.asynccontextmanager
async def cloud(directory: Path, access_key: str) -> AsyncIterator[Cloud]:
    with listen("127.0.0.1", 0) as socket:
        port = int(socket.getsockname()[1])
    pool = CloudPool(directory, access_key, port)
    async with serving(pool.cloud) as face:
        driver = pool.driver()
        volume, other = [await driver.create(type=VolumeType.IO2, size_bytes=4 * GIB) for _ in range(2)]
        made = Cloud(pool, face, driver, volume, other)
        yield made
        await made.resolver.aclose()
        await driver.aclose()


@pytest.fixture(params=["nvme", "service"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    if request.param == "nvme":
        yield Metal(tmp_path)
        return
    async with cloud(tmp_path, request.getfixturevalue("access_key")) as made:
        yield made


async def test_a_volume_is_found_while_it_is_attached(world: World) -> None:
    with pytest.raises(Unavailable, match=world.volume.serial):
        await world.resolver.resolve(world.volume)
    await world.attach_other()
    with pytest.raises(Unavailable, match=world.volume.serial):
        await world.resolver.resolve(world.volume)
    await world.attach()
    match await world.resolver.resolve(world.volume):
        case HostDevice(path=path, serial=serial, size_bytes=size_bytes):
            assert (path, serial, size_bytes) == ("/dev/nvme1n1", world.volume.serial, world.volume.size_bytes)
        case NbdEndpoint(export=export):
            assert export == f"{world.volume.id}.n1.1"
    await world.detach()
    with pytest.raises(Unavailable):
        await world.resolver.resolve(world.volume)


@pytest.mark.parametrize("size_bytes", [8 * GIB, 4 * GIB + 512, 4 * GIB - 512])
async def test_one_of_another_size_is_refused(world: World, size_bytes: int) -> None:
    await world.attach(size_bytes=size_bytes)
    with pytest.raises(Refused, match=f"{size_bytes} bytes") as caught:
        await world.resolver.resolve(world.volume)
    assert caught.value.field == "size_bytes"
    assert "do not open it" in str(caught.value.hint)


async def test_one_with_another_serial_is_not_the_volume(world: World) -> None:
    await world.attach(serial=OTHER_SERIAL)
    with pytest.raises(Unavailable, match=world.volume.serial):
        await world.resolver.resolve(world.volume)


async def test_two_of_one_serial_are_both_refused(world: World) -> None:
    await world.attach()
    await world.attach_other(serial=world.volume.serial)
    with pytest.raises(Refused, match="look at the node"):
        await world.resolver.resolve(world.volume)


async def test_a_device_that_shows_late_is_found_then(tmp_path: Path, access_key: str) -> None:
    """AWS says ``attached`` a moment before the node's kernel has the device."""
    async with cloud(tmp_path, access_key) as world:
        await world.pool.turn(device_lag_s=3600)
        await world.driver.attach(world.volume.id, node="n1", epoch=1)
        with pytest.raises(Unavailable):
            await world.resolver.resolve(world.volume)
        await world.driver.detach(world.volume.id, node="n1", epoch=1)
        await world.pool.turn(device_lag_s=0.3)
        await world.driver.attach(world.volume.id, node="n1", epoch=2)
        async with asyncio.timeout(5):
            while True:
                with contextlib.suppress(Unavailable):
                    await world.resolver.resolve(world.volume)
                    return
                await asyncio.sleep(0.02)
