"""The simulated cloud's HTTP face: the protocol, limits, faults, knobs, and the data plane behind it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from emp.lab.cloud.knobs import Fault, Harm, Knobs, Latency, Limits
from emp.lab.cloud.plane import PlaneVolume
from emp.model.errors import Forbidden, Unauthenticated
from emp.wire.http import WireClient
from emp.wire.identity import Identity, Role
from emp.wire.tls import mutual_client, public_client
from tests.cloud.simulator import NODES, HandClock, Simulator, simulated
from tests.cloud.test_strictness import attach, create, refused, show, states

I1, I2 = NODES["n1"], NODES["n2"]
CLOUD = Identity(Role.VOLUMES, "cloud")


def altered(ec2: Any, action: str, **parameters: str) -> None:
    """Have boto3 send ``parameters`` with every request of ``action``, past its own checks."""
    ec2.meta.events.register(f"before-call.ec2.{action}", lambda params, **_: params["body"].update(parameters))


# ------------------------------------------------------------------ the protocol


def test_a_parameter_that_the_service_has_not_is_refused(ec2: Any) -> None:
    altered(ec2, "DescribeVolumes", VolumeIdd="vol-1")
    with pytest.raises(ClientError, match="VolumeIdd") as caught:
        ec2.describe_volumes()
    assert caught.value.response["Error"]["Code"] == "UnknownParameter"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 400


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"Action": "RebootWorld"}, "InvalidAction"),
        ({"Action": "RunInstances"}, "InvalidAction"),
        ({"Action": ""}, "MissingAction"),
        ({"Version": "2011-01-01"}, "NoSuchVersion"),
        ({"DryRun": "maybe"}, "InvalidParameterValue"),
        ({"MaxResults": "many"}, "InvalidParameterValue"),
        ({"VolumeId": "vol-0123456789abcdef0"}, "UnknownParameter"),
        ({"Filter.1.Nome": "status"}, "UnknownParameter"),
    ],
)
def test_a_request_that_is_none_is_refused(ec2: Any, parameters: dict[str, str], code: str) -> None:
    altered(ec2, "DescribeVolumes", **parameters)
    assert refused(ec2.describe_volumes) == code


def test_a_type_that_the_service_has_not_is_refused(ec2: Any) -> None:
    altered(ec2, "CreateVolume", VolumeType="gp4")
    assert refused(lambda: create(ec2)) == "InvalidParameterValue"


def test_a_caller_without_the_key_is_refused(simulator: Simulator, ec2: Any) -> None:
    def sign_as_another(request: Any, **_: Any) -> None:
        request.headers["Authorization"] = request.headers["Authorization"].replace(b"Credential=", b"Credential=NO")

    ec2.meta.events.register("before-send.ec2", sign_as_another)
    assert refused(ec2.describe_volumes) == "AuthFailure"


# ------------------------------------------------------------------ limits and faults


def test_more_requests_than_the_bucket_holds_are_throttled(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(limits=Limits(describe_bucket=3, describe_per_s=1.0, change_bucket=1, change_per_s=0.5))
    for _ in range(3):
        ec2.describe_volumes()
    with pytest.raises(ClientError) as caught:
        ec2.describe_volumes()
    assert caught.value.response["Error"]["Code"] == "RequestLimitExceeded"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 503
    ec2.describe_instances()
    create(ec2)
    assert refused(lambda: create(ec2)) == "RequestLimitExceeded"
    clock.advance(1.0)
    assert len(ec2.describe_volumes()["Volumes"]) == 1, "what was throttled was not done"
    assert refused(ec2.describe_volumes) == "RequestLimitExceeded"


@pytest.mark.parametrize(
    ("harm", "code"),
    [
        (Harm.THROTTLED, "RequestLimitExceeded"),
        (Harm.DENIED, "UnauthorizedOperation"),
        (Harm.BROKEN, "InternalError"),
    ],
)
def test_a_fault_that_refuses_does_nothing_and_passes(ec2: Any, simulator: Simulator, harm: Harm, code: str) -> None:
    volume = create(ec2)
    simulator.turn(faults=[Fault(harm=harm, action="AttachVolume", times=2)])
    for _ in range(2):
        assert refused(lambda: attach(ec2, volume, I1)) == code
        assert states(ec2, volume) == ("available", {})
    attach(ec2, volume, I1)


@pytest.mark.parametrize(("harm", "done"), [(Harm.LOST_ORDER, False), (Harm.LOST_REPLY, True), (Harm.SILENT, True)])
def test_an_answer_that_is_lost_says_nothing_of_the_order(simulator: Simulator, harm: Harm, done: bool) -> None:
    ec2 = simulator.client(read_s=0.3)
    volume = create(ec2)
    simulator.turn(faults=[Fault(harm=harm, action="AttachVolume")])
    with pytest.raises((BotoCoreError, ResponseParserError)):
        attach(ec2, volume, I1)
    assert states(ec2, volume) == (("in-use", {I1: "attached"}) if done else ("available", {}))
    ec2.close()


def test_a_slow_answer_is_late(ec2: Any, simulator: Simulator) -> None:
    simulator.turn(faults=[Fault(harm=Harm.SLOW, delay_s=0.2)])
    began_s = time.monotonic()
    ec2.describe_volumes()
    assert time.monotonic() - began_s >= 0.2


async def test_the_knobs_obey_the_controller_alone(simulator: Simulator, pki: Path) -> None:
    wanted = Knobs(latency=Latency(attach_s=1.0), faults=(Fault(harm=Harm.DENIED),))
    async with WireClient(simulator.url, tls=mutual_client(pki / "controller"), server=CLOUD) as controller:
        assert await controller.request("PUT", "/knobs", wanted, response_model=Knobs) == wanted
        assert await controller.request("GET", "/knobs", response_model=Knobs) == wanted
    async with WireClient(simulator.url, tls=mutual_client(pki / "agent"), server=CLOUD) as agent:
        with pytest.raises(Forbidden):
            await agent.request("GET", "/knobs")
    async with WireClient(simulator.url, tls=public_client(simulator.ca_file), server=CLOUD) as nobody:
        with pytest.raises(Unauthenticated):
            await nobody.request("PUT", "/knobs", wanted)


# ------------------------------------------------------------------ the data plane


class Notebook:
    """A data plane that writes down what it is told. ``gate`` holds it up, ``failing`` makes so many calls fail."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, int]] = []
        self.failing = 0
        self.changed = threading.Condition()

    async def on_attached(self, volume: PlaneVolume, instance: str, epoch: int) -> None:
        self._note("open", instance, epoch)

    async def on_detached(self, volume: PlaneVolume, instance: str, epoch: int) -> None:
        self._note("close", instance, epoch)

    async def on_deleted(self, volume: PlaneVolume) -> None:
        self._note("delete", "", 0)

    async def on_grown(self, volume: PlaneVolume, exports: Sequence[tuple[str, int]]) -> None:
        for instance, epoch in exports:
            self._note(f"grow to {volume.size_bytes >> 30}", instance, epoch)

    def on_tagged(self, volume: PlaneVolume) -> None: ...

    def _note(self, verb: str, instance: str, epoch: int) -> None:
        if self.failing:
            self.failing -= 1
            raise OSError("no room")
        with self.changed:
            self.told.append((verb, instance, epoch))
            self.changed.notify_all()

    def wait_for(self, what: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(what, timeout=5), self.told


def test_the_data_plane_hears_of_each_attachment_under_an_epoch_of_its_own(pki: Path, access_key: str) -> None:
    plane = Notebook()
    with simulated(pki / "cloud", plane=plane, access_key=access_key) as simulator:
        ec2 = simulator.client()
        volume = create(ec2, "io2")
        for instance in (I1, I2):
            attach(ec2, volume, instance)
        ec2.detach_volume(VolumeId=volume, InstanceId=I1)
        attach(ec2, volume, I1)
        for instance in (I1, I2):
            ec2.detach_volume(VolumeId=volume, InstanceId=instance)
        ec2.delete_volume(VolumeId=volume)
        assert refused(lambda: show(ec2, volume)) == "InvalidVolume.NotFound"
        assert plane.told == [
            ("open", I1, 1), ("open", I2, 2), ("close", I1, 1), ("open", I1, 3), ("close", I1, 3), ("close", I2, 2),
            ("delete", "", 0),
        ]  # fmt: skip
        ec2.close()


def test_a_volume_is_attached_only_when_the_data_plane_has_opened_it(
    pki: Path, access_key: str, clock: HandClock
) -> None:
    plane = Notebook()
    with simulated(pki / "cloud", plane=plane, clock=clock, access_key=access_key) as simulator:
        ec2 = simulator.client()
        volume = create(ec2)
        plane.failing = 1
        attach(ec2, volume, I1)
        assert states(ec2, volume) == ("in-use", {I1: "attaching"})
        clock.advance(1.0)
        assert states(ec2, volume) == ("in-use", {I1: "attached"}), "it was asked again"
        plane.failing = 1
        ec2.detach_volume(VolumeId=volume, InstanceId=I1)
        assert states(ec2, volume) == ("in-use", {I1: "detaching"})
        clock.advance(1.0)
        assert states(ec2, volume) == ("available", {})
        ec2.close()


def test_what_is_due_happens_though_nobody_asks(pki: Path, access_key: str) -> None:
    plane = Notebook()
    with simulated(pki / "cloud", plane=plane, clock=time.monotonic, access_key=access_key) as simulator:
        simulator.turn(latency=Latency(attach_s=0.05, detach_s=0.05))
        ec2 = simulator.client()
        volume = create(ec2)
        attach(ec2, volume, I1)
        plane.wait_for(lambda: plane.told == [("open", I1, 1)])
        ec2.detach_volume(VolumeId=volume, InstanceId=I1)
        plane.wait_for(lambda: ("close", I1, 1) in plane.told)
        ec2.close()


def test_the_data_plane_grows_what_is_attached_before_the_cloud_says_so(
    pki: Path, access_key: str, clock: HandClock
) -> None:
    plane = Notebook()
    with simulated(pki / "cloud", plane=plane, clock=clock, access_key=access_key) as simulator:
        ec2 = simulator.client()
        volume = create(ec2)
        attach(ec2, volume, I1)
        show(ec2, volume)
        plane.failing = 1
        ec2.modify_volume(VolumeId=volume, Size=9)
        assert show(ec2, volume)["Size"] == 8, "it could not"
        clock.advance(1.0)
        show(ec2, volume)
        assert show(ec2, volume)["Size"] == 9
        (_, (verb, instance, epoch)) = plane.told
        assert (verb, instance, epoch) == ("grow to 9", I1, 3), "the one that failed has used up a number"
        ec2.detach_volume(VolumeId=volume, InstanceId=I1)
        show(ec2, volume)
        assert plane.told[-1] == ("close", I1, 3)
        ec2.close()
