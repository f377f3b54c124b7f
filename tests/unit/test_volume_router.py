"""Several volume drivers as one: every order reaches the driver whose volume it is, and that one alone."""

from __future__ import annotations

import pytest

from emp.model.errors import BadInput, Unreachable
from emp.model.volume import Volume, VolumeType
from emp.volumes.base import VolumeDriver
from emp.volumes.router import VolumeRouter
from tests.fakes.volumes import FakeVolumes

SIZE_BYTES = 1 << 20


@pytest.fixture
def main() -> FakeVolumes:
    return FakeVolumes()


@pytest.fixture
def other() -> FakeVolumes:
    return FakeVolumes(prefix="shared-")


@pytest.fixture
def router(main: FakeVolumes, other: FakeVolumes) -> VolumeDriver:
    return VolumeRouter(main, {"shared-": other})


async def made(driver: VolumeDriver) -> Volume:
    return await driver.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES)


async def test_an_order_reaches_the_driver_of_its_volume_alone(
    router: VolumeDriver, main: FakeVolumes, other: FakeVolumes
) -> None:
    ours, theirs = await made(router), await made(other)
    for volume, mine, not_mine in ((ours, main, other), (theirs, other, main)):
        assert await router.describe(volume.id) == volume
        await router.expect(volume.id, node="n1", epoch=3)
        assert mine.expected[-1] == (volume.id, "n1", 3)
        attachment = await router.attach(volume.id, node="n1", epoch=3)
        assert mine.holders(volume.id) == {"n1": 3}
        await router.fence(volume.id, epoch=3, unheld=True)
        assert mine.log[-1] == ("fence", "", 3, True)
        assert mine.fences == {volume.id: 3}
        assert (await router.describe(volume.id)).attachments == (attachment,)
        await router.detach(volume.id, node="n1", epoch=3, unheld=True)
        assert mine.log[-1] == ("detach", "n1", 3, True)
        assert (await router.resize(volume.id, 2 * SIZE_BYTES)).size_bytes == 2 * SIZE_BYTES
        assert mine.holders(volume.id) == {}
        assert (volume.id in not_mine.volumes, volume.id in not_mine.fences) == (False, False)
        await router.delete(volume.id)
        assert mine.volumes == {}
        mine.fences.clear()


async def test_all_are_listed_or_none(router: VolumeDriver, main: FakeVolumes, other: FakeVolumes) -> None:
    ours, theirs = await made(main), await made(other)
    assert await router.list() == (ours, theirs)
    for away in (main, other):
        away.failing["list"] = Unreachable("it is away")
        with pytest.raises(Unreachable):
            await router.list()
        away.failing.clear()


async def test_what_the_pool_does_not_make_is_not_made(router: VolumeDriver, main: FakeVolumes) -> None:
    with pytest.raises(BadInput, match="not made by the pool") as caught:
        await router.create(type=VolumeType.SHARED, size_bytes=SIZE_BYTES)
    assert caught.value.field == "type"
    assert main.volumes == {}
