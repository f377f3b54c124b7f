"""The EBS driver when the cloud is slow, busy, silent or wrong: what it does, what it does not do, what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.aws.patience import Pace, Time
from emp.lab.cloud.knobs import AWS, Fault, Harm, Latency
from emp.lab.cloud.knobs import Limits as Buckets
from emp.model.errors import (
    Conflict,
    Forbidden,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from emp.model.volume import Volume, VolumeType
from emp.volumes.ebs import EbsVolumeDriver, Limits
from tests.cloud.simulator import NODES, POOL, REGION, ZONE, HandClock, Simulator, simulated
from tests.cloud.test_ebs_driver import SIZE_BYTES, driver_of, held

LIMITS = Limits(create_s=5.0, attach_s=3.0, detach_s=6.5, force_after_s=5.0, resize_s=2.0)
"""shorter than a pool's own, as every look is a real request"""
GROWING = Latency(modify_s=0.5, optimize_s=600.0)
NOTHING_DONE = [Harm.LOST_ORDER, Harm.BROKEN, Harm.THROTTLED]
LOSSES = [Harm.LOST_ORDER, Harm.LOST_REPLY, Harm.SILENT, Harm.BROKEN]


@pytest.fixture
async def driver(simulator: Simulator, clock: HandClock) -> AsyncIterator[EbsVolumeDriver]:
    made = driver_of(simulator, clock, read_s=0.25, limits=LIMITS)
    yield made
    await made.aclose()


@pytest.fixture
async def gp3(driver: EbsVolumeDriver) -> Volume:
    return await driver.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES)


# ------------------------------------------------------------------ lost answers


@pytest.mark.parametrize("harm", LOSSES)
@pytest.mark.parametrize(
    "action", ["CreateVolume", "CreateTags", "AttachVolume", "DetachVolume", "DescribeVolumes", "DeleteVolume"]
)
async def test_a_lost_answer_to_any_order_changes_nothing_for_the_caller(
    driver: EbsVolumeDriver, simulator: Simulator, harm: Harm, action: str
) -> None:
    simulator.turn(faults=[Fault(harm=harm, action=action)])
    volume = await driver.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES)
    await driver.attach(volume.id, node="n1", epoch=1)
    assert await held(driver, volume) == {"n1": 1}
    await driver.detach(volume.id, node="n1", epoch=1)
    await driver.attach(volume.id, node="n2", epoch=2)
    assert await held(driver, volume) == {"n2": 2}
    await driver.detach(volume.id, node="n2", epoch=2)
    await driver.delete(volume.id)
    assert await driver.list() == (), "and nothing was made twice"


@pytest.mark.parametrize("harm", [*LOSSES, Harm.THROTTLED])
@pytest.mark.parametrize("action", ["ModifyVolume", "DescribeVolumesModifications"])
async def test_a_lost_or_throttled_answer_does_not_hold_up_a_volume_that_grows(
    driver: EbsVolumeDriver, simulator: Simulator, clock: HandClock, gp3: Volume, harm: Harm, action: str
) -> None:
    simulator.turn(latency=GROWING, faults=[Fault(harm=harm, action=action)])
    began_s = clock()
    assert (await driver.resize(gp3.id, 2 * SIZE_BYTES)).size_bytes == 2 * SIZE_BYTES
    assert clock() - began_s < GROWING.modify_s + 2.0, "it does not wait for what AWS does for hours"
    done = len(simulator.asked("ModifyVolume"))
    assert done == (2 if action == "ModifyVolume" and harm in NOTHING_DONE else 1), "nor is it ordered twice"


async def test_a_volume_that_does_not_grow_is_not_waited_for_without_end(
    driver: EbsVolumeDriver, simulator: Simulator, clock: HandClock, gp3: Volume
) -> None:
    simulator.turn(latency=Latency(modify_s=3600.0))
    with pytest.raises(OutcomeUnknown, match="modifying"):
        await driver.resize(gp3.id, 2 * SIZE_BYTES)
    clock.advance(3600.0)
    assert (await driver.resize(gp3.id, 2 * SIZE_BYTES)).size_bytes == 2 * SIZE_BYTES
    assert len(simulator.asked("ModifyVolume")) == 1


async def test_an_order_whose_answer_is_lost_is_looked_at_before_it_is_given_again(
    driver: EbsVolumeDriver, simulator: Simulator, gp3: Volume
) -> None:
    simulator.turn(faults=[Fault(harm=Harm.LOST_REPLY, action="AttachVolume")])
    await driver.attach(gp3.id, node="n1", epoch=1)
    simulator.turn(faults=[Fault(harm=Harm.LOST_REPLY, action="DetachVolume")])
    await driver.detach(gp3.id, node="n1", epoch=1)
    assert len(simulator.asked("AttachVolume")) == len(simulator.asked("DetachVolume")) == 1


async def test_orders_that_are_never_answered_leave_it_open(
    driver: EbsVolumeDriver, simulator: Simulator, gp3: Volume
) -> None:
    simulator.turn(faults=[Fault(harm=Harm.LOST_ORDER, action="AttachVolume", times=None)])
    with pytest.raises(OutcomeUnknown, match="not attached") as caught:
        await driver.attach(gp3.id, node="n1", epoch=1)
    assert caught.value.field == "volume"
    assert caught.value.hint == "the order stands; give it again to go on waiting"
    simulator.turn()
    await driver.attach(gp3.id, node="n1", epoch=1)


# ------------------------------------------------------------------ throttled, denied, out of reach


async def test_throttling_is_survived(simulator: Simulator, clock: HandClock) -> None:
    driver = driver_of(simulator, clock, limits=Limits(create_s=600.0, attach_s=600.0))
    simulator.turn(limits=Buckets(describe_bucket=2, describe_per_s=0.5, change_bucket=1, change_per_s=0.2))
    volumes = await asyncio.gather(*(driver.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES) for _ in range(4)))
    await asyncio.gather(*(driver.attach(volume.id, node="n1", epoch=1) for volume in volumes))
    for volume in volumes:
        assert await held(driver, volume) == {"n1": 1}
    assert len(await driver.list()) == 4
    await driver.aclose()


async def test_throttling_without_end_is_said_and_nothing_was_done(
    driver: EbsVolumeDriver, simulator: Simulator, gp3: Volume
) -> None:
    simulator.turn(faults=[Fault(harm=Harm.THROTTLED, action="AttachVolume", times=None)])
    with pytest.raises(Unavailable, match="throttles attach_volume") as caught:
        await driver.attach(gp3.id, node="n1", epoch=1)
    assert caught.value.hint == "ask again later; nothing was done"
    assert await held(driver, gp3) == {}


async def test_pauses_grow_and_differ(clock: HandClock) -> None:
    slept: list[float] = []

    async def sleep(for_s: float) -> None:
        slept.append(for_s)
        await clock.sleep(for_s)

    patience = Time(clock=clock, sleep=sleep).patience(60.0, Pace(first_s=0.25, share=0.5))
    with pytest.raises(Unavailable, match="enough"):
        while True:
            await patience.pause(Unavailable("enough"))
    assert len(slept) < 30
    assert slept[0] < 0.5 < slept[-1] < 7
    assert len(set(slept)) == len(slept)


async def test_what_is_not_allowed_is_forbidden(driver: EbsVolumeDriver, simulator: Simulator, gp3: Volume) -> None:
    for action, order in (
        ("AttachVolume", lambda: driver.attach(gp3.id, node="n1", epoch=1)),
        ("DescribeVolumes", lambda: driver.describe(gp3.id)),
        ("DeleteVolume", lambda: driver.delete(gp3.id)),
    ):
        simulator.turn(faults=[Fault(harm=Harm.DENIED, action=action)])
        with pytest.raises(Forbidden, match="UnauthorizedOperation") as caught:
            await order()
        assert caught.value.field == "credentials"


async def test_a_key_that_the_cloud_does_not_know_is_said(pki: Path, clock: HandClock, access_key: str) -> None:
    with simulated(pki / "cloud", clock=clock, access_key=f"not-{access_key}") as simulator:
        driver = driver_of(simulator, clock)
        with pytest.raises(Unauthenticated, match="AuthFailure") as caught:
            await driver.list()
        assert caught.value.field == "credentials"
        await driver.aclose()


async def test_a_cloud_out_of_reach_is_unreachable(clock: HandClock, access_key: str) -> None:
    driver = EbsVolumeDriver(
        NODES, pool=POOL, region=REGION, zone=ZONE, endpoint_url="https://127.0.0.1:1",
        times=Time(clock=clock, sleep=clock.sleep),
    )  # fmt: skip
    with pytest.raises(Unreachable, match="out of reach") as caught:
        await driver.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES)
    assert "nothing was done" in str(caught.value.hint)
    await driver.aclose()


async def test_a_cloud_with_another_authority_is_not_spoken_to(
    simulator: Simulator, clock: HandClock, access_key: str
) -> None:
    driver = EbsVolumeDriver(
        NODES, pool=POOL, region=REGION, zone=ZONE, endpoint_url=simulator.url,
        times=Time(clock=clock, sleep=clock.sleep),
    )  # fmt: skip
    with pytest.raises(Refused, match="is not trusted") as caught:
        await driver.list()
    assert caught.value.field == "ca_file"
    assert not simulator.face.calls
    await driver.aclose()


# ------------------------------------------------------------------ states that last


async def test_with_latency_as_on_aws_all_goes_as_without(
    driver: EbsVolumeDriver, simulator: Simulator, clock: HandClock
) -> None:
    simulator.turn(latency=AWS, describe_lag_s=1.0)
    volume = await driver.create(type=VolumeType.GP3, size_bytes=SIZE_BYTES)
    await driver.attach(volume.id, node="n1", epoch=1)
    began_s = clock()
    await driver.detach(volume.id, node="n1", epoch=1)
    await driver.attach(volume.id, node="n2", epoch=2)
    assert 7.0 <= clock() - began_s <= 7.5, "the cloud's seven seconds, and what polling adds"
    assert len(simulator.asked("AttachVolume")) == 2


async def test_attaching_waits_until_it_has_left_the_node(
    driver: EbsVolumeDriver, simulator: Simulator, gp3: Volume
) -> None:
    await driver.attach(gp3.id, node="n1", epoch=1)
    simulator.turn(latency=Latency(detach_s=1.0, attach_s=1.0))
    ec2: Any = simulator.client()
    ec2.detach_volume(VolumeId=gp3.id, InstanceId=NODES["n1"])
    ec2.close()
    await driver.attach(gp3.id, node="n1", epoch=2)
    assert await held(driver, gp3) == {"n1": 2}


async def test_sixteen_volumes_to_one_node_at_the_same_time(driver: EbsVolumeDriver, simulator: Simulator) -> None:
    volumes = await asyncio.gather(*(driver.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES) for _ in range(16)))
    await asyncio.gather(*(driver.attach(volume.id, node="n1", epoch=1) for volume in volumes))
    assert [await held(driver, volume) for volume in volumes] == [{"n1": 1}] * 16
    named = [sum(key.startswith("VolumeId.") for key in asked) for asked in simulator.asked("DescribeVolumes")]
    assert max(named) >= 8, "they share their looks"


async def test_a_look_that_is_shared_tells_each_about_its_own(driver: EbsVolumeDriver, gp3: Volume) -> None:
    nowhere = "vol-0123456789abcdef0"
    looks = await asyncio.gather(*(driver.describe(v) for v in (gp3.id, nowhere, gp3.id)), return_exceptions=True)
    assert looks[0] == looks[2] == gp3
    assert isinstance(looks[1], NotFound)
    assert nowhere in str(looks[1])
    hasty = asyncio.create_task(driver.describe(gp3.id))
    await asyncio.sleep(0)
    hasty.cancel()
    assert await driver.describe(gp3.id) == gp3


async def test_tags_of_nodes_that_have_left_do_not_pile_up(driver: EbsVolumeDriver, simulator: Simulator) -> None:
    volume = await driver.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES)
    for epoch, node in enumerate(NODES, start=1):
        await driver.attach(volume.id, node=node, epoch=epoch)
        await driver.detach(volume.id, node=node, epoch=epoch)
    await driver.attach(volume.id, node="n1", epoch=99)
    ec2: Any = simulator.client()
    (found,) = ec2.describe_volumes(VolumeIds=[volume.id])["Volumes"]
    ec2.close()
    assert len(found["Tags"]) < 16
    assert {"Key": f"emp:epoch:{NODES['n1']}", "Value": "99"} in found["Tags"]


async def test_a_volume_deleted_meanwhile_is_said(driver: EbsVolumeDriver, simulator: Simulator, gp3: Volume) -> None:
    simulator.turn(latency=AWS)
    ec2: Any = simulator.client()
    ec2.delete_volume(VolumeId=gp3.id)
    ec2.close()
    with pytest.raises(Conflict, match="is deleting"):
        await driver.attach(gp3.id, node="n1", epoch=1)


# ------------------------------------------------------------------ detaching that does not end


def forced(simulator: Simulator) -> list[bool]:
    return [parameters["Force"] == "true" for parameters in simulator.asked("DetachVolume")]


@pytest.mark.parametrize("knob", ["stuck", "busy"])
async def test_a_stuck_detach_is_never_forced_by_itself(
    driver: EbsVolumeDriver, simulator: Simulator, gp3: Volume, knob: str
) -> None:
    await driver.attach(gp3.id, node="n1", epoch=1)
    simulator.turn(**{knob: [gp3.id]})
    with pytest.raises(OutcomeUnknown, match=r"is still (detaching|busy) at n1") as caught:
        await driver.detach(gp3.id, node="n1", epoch=1)
    assert "see that nothing on the node has it open" in str(caught.value.hint)
    with pytest.raises(OutcomeUnknown):
        await driver.fence(gp3.id, epoch=2)
    assert forced(simulator) == [False], "and it is ordered once"
    simulator.turn()
    await driver.detach(gp3.id, node="n1", epoch=1)
    assert await held(driver, gp3) == {}


@pytest.mark.parametrize("knob", ["stuck", "busy"])
async def test_what_nothing_holds_is_forced_after_it_was_tried_in_order(
    driver: EbsVolumeDriver, simulator: Simulator, clock: HandClock, gp3: Volume, knob: str
) -> None:
    await driver.attach(gp3.id, node="n1", epoch=1)
    simulator.turn(**{knob: [gp3.id]})
    began_s = clock()
    await driver.detach(gp3.id, node="n1", epoch=1, unheld=True)
    assert forced(simulator) == [False, True]
    assert clock() - began_s >= LIMITS.force_after_s
    assert await held(driver, gp3) == {}

    simulator.turn()
    await driver.attach(gp3.id, node="n2", epoch=2)
    simulator.turn(**{knob: [gp3.id]})
    await driver.fence(gp3.id, epoch=3, unheld=True)
    assert forced(simulator) == [False, True, False, True]
    assert await held(driver, gp3) == {}


async def test_one_stuck_attachment_does_not_keep_a_fence_from_the_others(
    driver: EbsVolumeDriver, simulator: Simulator
) -> None:
    volume = await driver.create(type=VolumeType.IO2, size_bytes=SIZE_BYTES)
    for node in ("n1", "n2"):
        await driver.attach(volume.id, node=node, epoch=1)
    simulator.turn(faults=[Fault(harm=Harm.DENIED, action="DetachVolume")])
    with pytest.raises(Forbidden):
        await driver.fence(volume.id, epoch=2)
    assert len(await held(driver, volume)) == 1
    await driver.fence(volume.id, epoch=1)
    assert await held(driver, volume) == {}, "a fence only rises: the one of before holds"


@pytest.mark.parametrize("kind", [VolumeType.IO2, VolumeType.GP3])
async def test_a_fence_beside_an_attach_leaves_nothing_older(
    driver: EbsVolumeDriver, simulator: Simulator, kind: VolumeType
) -> None:
    volume = await driver.create(type=kind, size_bytes=SIZE_BYTES)
    simulator.turn(latency=AWS)
    attaching = asyncio.create_task(driver.attach(volume.id, node="n1", epoch=5))
    await asyncio.sleep(0)
    await driver.fence(volume.id, epoch=6)
    await asyncio.gather(attaching, return_exceptions=True)
    assert await held(driver, volume) == {}


# ------------------------------------------------------------------ the event loop


async def test_a_slow_cloud_holds_nobody_up(driver: EbsVolumeDriver, simulator: Simulator, gp3: Volume) -> None:
    simulator.turn(faults=[Fault(harm=Harm.SLOW, action="DescribeVolumes", delay_s=0.2)])
    waiting = asyncio.create_task(driver.describe(gp3.id))
    turns = 0
    while not waiting.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns >= 3, "the event loop went on meanwhile"
    await waiting
