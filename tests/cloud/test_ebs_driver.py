"""What every volume driver must do, as far as EBS can do it: against the simulated cloud, and against AWS if asked to.

Against AWS: ``EMP_TEST_AWS=1``, credentials where boto3 finds them, ``EMP_TEST_AWS_ZONE``, and in
``EMP_TEST_AWS_INSTANCES`` the ids of two Nitro instances there (``i-...,i-...``). It makes a few volumes of 4 GiB, and
deletes them. Run it as an ordinary user: root's tests are in a network namespace of their own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from emp.aws.patience import Time
from emp.lab.cloud.knobs import Fault, Harm
from emp.model.errors import BadInput, Conflict, NotFound, Refused, StaleEpoch
from emp.model.volume import Volume, VolumeType
from emp.volumes.base import VolumeDriver
from emp.volumes.ebs import EbsVolumeDriver
from emp.volumes.ebs_view import TYPES
from tests.cloud.aws import WHY_NOT_AWS
from tests.cloud.simulator import FAR, NODES, OTHER_ZONE, POOL, REGION, ZONE, HandClock, Simulator

SIZE_BYTES = 4 << 30


@pytest.fixture(params=["simulator", "aws"])
async def driver(request: pytest.FixtureRequest) -> AsyncIterator[EbsVolumeDriver]:
    if request.param == "simulator":
        simulator: Simulator = request.getfixturevalue("simulator")
        clock: HandClock = request.getfixturevalue("clock")
        made = driver_of(simulator, clock)
    else:
        if WHY_NOT_AWS:
            pytest.skip(WHY_NOT_AWS)
        zone = os.environ["EMP_TEST_AWS_ZONE"]
        nodes = dict(zip(("n1", "n2"), os.environ["EMP_TEST_AWS_INSTANCES"].split(","), strict=True))
        made = EbsVolumeDriver(nodes, pool="emp-tests", region=zone[:-1], zone=zone)
    yield made
    if request.param == "aws":
        for volume in await made.list():
            await made.fence(volume.id, epoch=1 << 40)
            await made.delete(volume.id)
    await made.aclose()
    if request.param == "simulator":
        check_detaches(simulator)


def driver_of(simulator: Simulator, clock: HandClock, **more: Any) -> EbsVolumeDriver:
    """Return a driver as a controller has it, whose pauses take no time."""
    return EbsVolumeDriver(
        NODES | FAR, pool=POOL, region=REGION, zone=ZONE, endpoint_url=simulator.url, ca_file=simulator.ca_file,
        times=Time(clock=clock, sleep=clock.sleep), **more,
    )  # fmt: skip


def check_detaches(simulator: Simulator) -> None:
    """Every detach of every test named its instance, and none was forced."""
    for parameters in simulator.asked("DetachVolume"):
        assert parameters["InstanceId"].startswith("i-")
        assert parameters["Force"] == "false"


@pytest.fixture
async def io2(driver: EbsVolumeDriver) -> Volume:
    return await driver.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES)


@pytest.fixture
async def gp3(driver: EbsVolumeDriver) -> Volume:
    return await driver.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES)


async def held(driver: VolumeDriver, volume: Volume) -> dict[str, int]:
    return {found.node: found.epoch for found in (await driver.describe(volume.id)).attachments}


def test_it_is_a_volume_driver(driver: EbsVolumeDriver) -> None:
    def takes(driver: VolumeDriver) -> VolumeDriver:
        return driver

    assert takes(driver) is driver


@pytest.mark.parametrize("kind", TYPES)
async def test_a_volume_is_known_from_its_making_to_its_deletion(driver: EbsVolumeDriver, kind: VolumeType) -> None:
    made = await driver.create(type=kind, size_bytes=SIZE_BYTES)
    assert (made.type, made.size_bytes, made.attachments) == (kind, SIZE_BYTES, ())
    assert made.serial == made.id.replace("-", "")
    assert len(made.serial) <= 20, "a disk has room for no more"
    assert await driver.describe(made.id) == made
    assert made in await driver.list()

    await driver.delete(made.id)
    await driver.delete(made.id)
    assert made not in await driver.list()
    await driver.detach(made.id, node="n1", epoch=1)


async def test_a_volume_grows_where_it_is_attached(driver: EbsVolumeDriver, gp3: Volume) -> None:
    await driver.attach(gp3.id, node="n1", epoch=1)
    for _ in range(2):
        assert (await driver.resize(gp3.id, 2 * SIZE_BYTES)).size_bytes == 2 * SIZE_BYTES
    assert (await driver.describe(gp3.id)).size_bytes == 2 * SIZE_BYTES
    assert await held(driver, gp3) == {"n1": 1}
    await driver.attach(gp3.id, node="n1", epoch=2)
    assert await held(driver, gp3) == {"n1": 2}
    await driver.detach(gp3.id, node="n1", epoch=2)


async def test_a_size_that_cannot_be_is_refused(driver: EbsVolumeDriver, gp3: Volume) -> None:
    for size_bytes in (SIZE_BYTES // 2, SIZE_BYTES + 512):
        with pytest.raises(BadInput) as caught:
            await driver.resize(gp3.id, size_bytes)
        assert caught.value.field == "size_bytes"
    assert (await driver.describe(gp3.id)).size_bytes == SIZE_BYTES


async def test_a_volume_that_has_grown_grows_again_hours_later(driver: EbsVolumeDriver, gp3: Volume) -> None:
    await driver.resize(gp3.id, 2 * SIZE_BYTES)
    with pytest.raises(Refused) as caught:
        await driver.resize(gp3.id, 3 * SIZE_BYTES)
    assert caught.value.field == "volume"
    assert "six hours" in str(caught.value.hint) or "still works" in str(caught.value.hint)
    assert (await driver.describe(gp3.id)).size_bytes == 2 * SIZE_BYTES


async def test_a_volume_that_is_not_there_is_not_found(driver: EbsVolumeDriver) -> None:
    nowhere = "vol-0123456789abcdef0"
    for order in (
        driver.describe(nowhere),
        driver.attach(nowhere, node="n1", epoch=1),
        driver.fence(nowhere, epoch=1),
    ):
        with pytest.raises(NotFound, match=nowhere):
            await order
    await driver.detach(nowhere, node="n1", epoch=1)
    await driver.delete(nowhere)


async def test_bad_input_names_the_field(driver: EbsVolumeDriver, io2: Volume) -> None:
    for wrong in ("../x", "vol-1", "vol-" + "0" * 300, "a,b=c", ""):
        with pytest.raises(BadInput) as caught:
            await driver.describe(wrong)
        assert caught.value.field == "volume"
    for kind, size_bytes in ((VolumeType.IO2, 3 << 30), (VolumeType.GP3, (1 << 30) + 4096), (VolumeType.GP2, 0)):
        with pytest.raises(BadInput) as caught:
            await driver.create(type=kind, size_bytes=size_bytes)
        assert caught.value.field == "size_bytes"
    with pytest.raises(BadInput, match="no volumes of the type shared") as caught:
        await driver.create(type=VolumeType.SHARED, size_bytes=SIZE_BYTES)
    assert caught.value.field == "type"
    with pytest.raises(BadInput, match="no instance is named for node n99") as caught:
        await driver.attach(io2.id, node="n99", epoch=1)
    assert caught.value.field == "node"


@pytest.mark.parametrize("kind", [VolumeType.IO2, VolumeType.GP3])
async def test_the_same_order_gets_the_same_answer(driver: EbsVolumeDriver, kind: VolumeType) -> None:
    volume = await driver.create(type=kind, size_bytes=SIZE_BYTES)
    first = await driver.attach(volume.id, node="n1", epoch=3)
    assert await driver.attach(volume.id, node="n1", epoch=3) == first
    assert (first.volume, first.node, first.epoch, first.tag) == (volume.id, "n1", 3, 3)
    assert (first.endpoint, first.claim) == (None, None), "the node finds the device, and claims nothing"
    assert (await driver.describe(volume.id)).attachments == (first,)
    for _ in range(2):
        await driver.detach(volume.id, node="n1", epoch=3)
    assert await held(driver, volume) == {}


async def test_a_multi_attach_volume_is_at_both_nodes(driver: EbsVolumeDriver, io2: Volume) -> None:
    await driver.attach(io2.id, node="n1", epoch=3)
    await driver.attach(io2.id, node="n2", epoch=4)
    assert await held(driver, io2) == {"n1": 3, "n2": 4}
    await driver.detach(io2.id, node="n1", epoch=3)
    assert await held(driver, io2) == {"n2": 4}


async def test_a_single_attach_volume_is_at_one(driver: EbsVolumeDriver, gp3: Volume) -> None:
    await driver.attach(gp3.id, node="n1", epoch=3)
    with pytest.raises(Conflict, match="attached to n1") as caught:
        await driver.attach(gp3.id, node="n2", epoch=4)
    assert (caught.value.field, caught.value.hint) == ("node", "detach it there first")
    await driver.detach(gp3.id, node="n1", epoch=3)
    await driver.attach(gp3.id, node="n2", epoch=4)
    assert await held(driver, gp3) == {"n2": 4}


async def test_a_volume_that_is_expected_stays_where_it_is(driver: EbsVolumeDriver, gp3: Volume) -> None:
    await driver.attach(gp3.id, node="n1", epoch=3)
    for node, epoch in (("n2", 4), ("n1", 5)):
        await driver.expect(gp3.id, node=node, epoch=epoch)
        assert await held(driver, gp3) == {"n1": 3}
    await driver.detach(gp3.id, node="n1", epoch=3)
    assert await held(driver, gp3) == {}
    await driver.attach(gp3.id, node="n2", epoch=4)
    assert await held(driver, gp3) == {"n2": 4}


async def test_another_epochs_attachment_is_not_touched(driver: EbsVolumeDriver, io2: Volume) -> None:
    await driver.attach(io2.id, node="n1", epoch=5)
    for node, epoch in (("n1", 4), ("n1", 6), ("n2", 5)):
        await driver.detach(io2.id, node=node, epoch=epoch)
    assert await held(driver, io2) == {"n1": 5}


async def test_a_newer_epoch_takes_the_nodes_attachment_over(driver: EbsVolumeDriver, gp3: Volume) -> None:
    await driver.attach(gp3.id, node="n1", epoch=3)
    await driver.attach(gp3.id, node="n1", epoch=5)
    assert await held(driver, gp3) == {"n1": 5}
    with pytest.raises(StaleEpoch, match="newer than 4"):
        await driver.attach(gp3.id, node="n1", epoch=4)
    await driver.detach(gp3.id, node="n1", epoch=3)
    assert await held(driver, gp3) == {"n1": 5}


async def test_a_fence_closes_what_is_older_and_refuses_it_for_good(driver: EbsVolumeDriver, io2: Volume) -> None:
    await driver.attach(io2.id, node="n1", epoch=3)
    await driver.attach(io2.id, node="n2", epoch=4)
    await driver.fence(io2.id, epoch=4)
    await driver.fence(io2.id, epoch=2)
    assert await held(driver, io2) == {"n2": 4}
    for epoch in (1, 3):
        with pytest.raises(StaleEpoch, match="fenced"):
            await driver.attach(io2.id, node="n1", epoch=epoch)
    await driver.attach(io2.id, node="n1", epoch=4)


async def test_an_attached_volume_is_not_deleted(driver: EbsVolumeDriver, io2: Volume) -> None:
    await driver.attach(io2.id, node="n1", epoch=1)
    with pytest.raises(Conflict, match="n1"):
        await driver.delete(io2.id)
    assert await held(driver, io2) == {"n1": 1}
    await driver.detach(io2.id, node="n1", epoch=1)
    await driver.delete(io2.id)


# ------------------------------------------------------------------ the simulated cloud alone


@pytest.fixture
async def lab(simulator: Simulator, clock: HandClock) -> AsyncIterator[EbsVolumeDriver]:
    made = driver_of(simulator, clock)
    yield made
    await made.aclose()
    check_detaches(simulator)


async def test_attaching_what_was_expected_is_one_order(lab: EbsVolumeDriver, simulator: Simulator) -> None:
    volumes = [await lab.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES) for _ in range(12)]
    await asyncio.gather(*(lab.expect(volume.id, node="n1", epoch=3) for volume in volumes))
    before = [len(simulator.asked(action)) for action in ("CreateTags", "DescribeInstances")]
    await asyncio.gather(*(lab.attach(volume.id, node="n1", epoch=3) for volume in volumes))
    assert [len(simulator.asked(action)) for action in ("CreateTags", "DescribeInstances")] == before
    assert len(simulator.asked("AttachVolume")) == 12, "no two were to be the same device"
    assert all([await held(lab, volume) == {"n1": 3} for volume in volumes])


async def test_what_is_fenced_is_not_expected(lab: EbsVolumeDriver) -> None:
    volume = await lab.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES)
    await lab.fence(volume.id, epoch=4)
    with pytest.raises(StaleEpoch, match="fenced"):
        await lab.expect(volume.id, node="n1", epoch=3)


async def test_no_more_than_sixteen_nodes_at_once(lab: EbsVolumeDriver) -> None:
    volume = await lab.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES)
    for number in range(1, 17):
        await lab.attach(volume.id, node=f"n{number}", epoch=1)
    with pytest.raises(Conflict, match="16"):
        await lab.attach(volume.id, node="n17", epoch=1)


async def test_a_node_in_another_zone_is_refused_and_the_reason_said(lab: EbsVolumeDriver) -> None:
    volume = await lab.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES)
    with pytest.raises(Refused, match="availability zone") as caught:
        await lab.attach(volume.id, node="far", epoch=1)
    assert (caught.value.field, caught.value.hint) == (
        "node", "a volume stays in its Availability Zone; choose a node there",
    )  # fmt: skip


async def test_a_node_without_room_is_refused(lab: EbsVolumeDriver, simulator: Simulator) -> None:
    simulator.turn(limits=None)
    for _ in range(27):
        volume = await lab.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES)
        await lab.attach(volume.id, node="n1", epoch=1)
    one_more = await lab.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES)
    with pytest.raises(Refused, match="AttachmentLimitExceeded") as caught:
        await lab.attach(one_more.id, node="n1", epoch=1)
    assert caught.value.field == "node"


async def test_a_pool_lists_its_own_volumes_and_deletes_no_others(
    lab: EbsVolumeDriver, simulator: Simulator, clock: HandClock
) -> None:
    other = EbsVolumeDriver(
        NODES, pool="q", region=REGION, zone=ZONE, endpoint_url=simulator.url, ca_file=simulator.ca_file,
        times=Time(clock=clock, sleep=clock.sleep),
    )  # fmt: skip
    mine = [await lab.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES) for _ in range(3)]
    theirs = await other.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES)
    assert set(await lab.list()) == set(mine)
    with pytest.raises(Refused, match="was not made by the pool p"):
        await lab.delete(theirs.id)
    assert await other.list() == (theirs,)
    await other.aclose()


async def test_who_has_it_outside_the_pool_is_shown_and_can_be_sent_away(
    lab: EbsVolumeDriver, simulator: Simulator, clock: HandClock
) -> None:
    few = EbsVolumeDriver(
        {"n1": NODES["n1"]}, pool=POOL, region=REGION, zone=ZONE, endpoint_url=simulator.url,
        ca_file=simulator.ca_file, times=Time(clock=clock, sleep=clock.sleep),
    )  # fmt: skip
    volume = await few.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES)
    ec2: Any = simulator.client()
    ec2.attach_volume(VolumeId=volume.id, InstanceId=NODES["n2"], Device="/dev/sdf")
    ec2.close()
    assert await held(few, volume) == {NODES["n2"]: 0}
    with pytest.raises(Conflict, match=NODES["n2"]):
        await few.attach(volume.id, node="n1", epoch=1)
    await few.fence(volume.id, epoch=1)
    assert await held(few, volume) == {}
    await few.aclose()


# ------------------------------------------------------------------ before a migration


async def test_nothing_stands_in_the_way_of_a_node_in_the_zone_with_room(
    lab: EbsVolumeDriver, simulator: Simulator
) -> None:
    volumes = [await lab.create(type=kind, size_bytes=SIZE_BYTES) for kind in (VolumeType.IO2, VolumeType.GP3)]
    ids = [volume.id for volume in volumes]
    for volume in ids:
        await lab.attach(volume, node="n1", epoch=1)
    found = await lab.obstacles(ids, nodes=["n1", "n2"])
    assert found == {"n1": {}, "n2": {}}
    asked = len(simulator.asked("DescribeVolumes"))
    await lab.obstacles(ids, nodes=["n1", "n2"])
    assert len(simulator.asked("DescribeVolumes")) == asked + 1, "one question about all volumes"


async def test_what_stands_in_the_way_is_said_for_each_volume_and_node(
    lab: EbsVolumeDriver, simulator: Simulator
) -> None:
    simulator.turn(limits=None)
    moving = [(await lab.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES)).id for _ in range(3)]
    for _ in range(25):  # of 27
        held = await lab.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES)
        await lab.attach(held.id, node="n2", epoch=1)
    gone = "vol-0123456789abcdef0"
    found = await lab.obstacles([*moving, gone], nodes=["n1", "n2", "far", "n99"])
    unknown = {gone: "EC2 does not know it"}
    assert found["n1"] == unknown
    assert found["n2"] == unknown | {
        moving[2]: "n2 (m5.metal) takes 27 volumes: 25 are there and the EVM's others take the rest"
    }
    assert found["far"] == unknown | dict.fromkeys(moving, f"it is in {ZONE}, far in {OTHER_ZONE}")
    assert set(found["n99"].values()) == {"n99: no instance is named for it in the controller's configuration"}
    for volume in moving[:2]:
        await lab.attach(volume, node="n2", epoch=1)
    found = await lab.obstacles(moving, nodes=["n2"])
    assert found["n2"] == {moving[2]: "n2 (m5.metal) takes 27 volumes: 27 are there"}, "what is there needs no room"
    with pytest.raises(Refused, match="AttachmentLimitExceeded"):
        await lab.attach(moving[2], node="n2", epoch=1)


async def test_an_instance_that_is_gone_or_whose_limit_may_not_be_asked_stops_nothing_else(
    simulator: Simulator, clock: HandClock
) -> None:
    nodes = NODES | {"lost": "i-00000000000000bad"}
    driver = EbsVolumeDriver(
        nodes, pool=POOL, region=REGION, zone=ZONE, endpoint_url=simulator.url, ca_file=simulator.ca_file,
        times=Time(clock=clock, sleep=clock.sleep),
    )  # fmt: skip
    volume = (await driver.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES)).id
    simulator.turn(faults=(Fault(action="DescribeInstanceTypes", harm=Harm.DENIED, times=9),))
    found = await driver.obstacles([volume], nodes=["lost", "n1"])
    assert found == {
        "lost": {volume: "EC2 does not know i-00000000000000bad, the instance of lost"},
        "n1": {},
    }
    await driver.aclose()
