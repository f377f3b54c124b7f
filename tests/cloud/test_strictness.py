"""The simulated cloud says no where AWS says no, and takes the time that AWS takes: through boto3, over HTTP.

The first part has the rows in which other simulators are laxer than AWS, by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from botocore.exceptions import ClientError

from emp.lab.cloud.knobs import AWS
from tests.cloud.interfaces import BY_HAND, addresses, assign, attach_eni, holder, new_eni, primary, show_eni, take
from tests.cloud.simulator import FAR, IPV6, NODES, SECOND_SUBNET, SMALL, SUBNETS, ZONE, HandClock, Simulator

ADDRESS = "10.77.0.60"
I1, I2, I3 = NODES["n1"], NODES["n2"], NODES["n3"]
SLOW = {"latency": AWS}


def refused(call: Callable[[], Any]) -> str:
    """Return the code with which ``call`` is refused."""
    with pytest.raises(ClientError) as caught:
        call()
    return str(caught.value.response["Error"]["Code"])


def create(ec2: Any, kind: str = "gp3", **more: Any) -> str:
    parameters: dict[str, Any] = {"AvailabilityZone": ZONE, "Size": 8, "VolumeType": kind}
    if kind in ("io1", "io2"):
        parameters |= {"Iops": 200, "MultiAttachEnabled": True}
    return str(ec2.create_volume(**(parameters | more))["VolumeId"])


def attach(ec2: Any, volume: str, instance: str, device: str = "/dev/xvdba") -> Any:
    return ec2.attach_volume(VolumeId=volume, InstanceId=instance, Device=device)


def show(ec2: Any, volume: str) -> Any:
    (found,) = ec2.describe_volumes(VolumeIds=[volume])["Volumes"]
    return found


def states(ec2: Any, volume: str) -> tuple[str, dict[str, str]]:
    found = show(ec2, volume)
    return found["State"], {each["InstanceId"]: each["State"] for each in found["Attachments"]}


# ------------------------------------------------------------------ rows in which others are laxer than AWS


@pytest.mark.parametrize("kind", ["gp2", "gp3"])
def test_create_gp3_with_multi_attach_is_refused(ec2: Any, kind: str) -> None:
    assert refused(lambda: create(ec2, kind, MultiAttachEnabled=True)) == "InvalidParameterCombination"
    assert ec2.describe_volumes()["Volumes"] == []


@pytest.mark.parametrize("kind", ["io1", "io2"])
def test_create_io2_with_multi_attach_keeps_the_flag(ec2: Any, kind: str) -> None:
    assert show(ec2, create(ec2, kind))["MultiAttachEnabled"] is True
    assert show(ec2, create(ec2, kind, MultiAttachEnabled=False))["MultiAttachEnabled"] is False


def test_attach_gp3_to_a_second_instance_is_volume_in_use(ec2: Any) -> None:
    volume = create(ec2)
    attach(ec2, volume, I1)
    assert refused(lambda: attach(ec2, volume, I2)) == "VolumeInUse"
    assert states(ec2, volume) == ("in-use", {I1: "attached"}), "it was not stolen"


def test_attach_io2_to_a_second_instance_makes_two_attachments(ec2: Any) -> None:
    volume = create(ec2, "io2")
    for instance in (I1, I2):
        attach(ec2, volume, instance)
    assert states(ec2, volume) == ("in-use", {I1: "attached", I2: "attached"})
    ec2.detach_volume(VolumeId=volume, InstanceId=I1)
    assert states(ec2, volume) == ("in-use", {I2: "attached"})


def test_states_attaching_detaching_and_busy_last(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(**SLOW)
    volume = create(ec2)
    assert states(ec2, volume) == ("creating", {})
    clock.advance(AWS.create_s)
    assert states(ec2, volume) == ("available", {})

    assert attach(ec2, volume, I1)["State"] == "attaching"
    clock.advance(AWS.attach_s - 0.1)
    assert states(ec2, volume) == ("in-use", {I1: "attaching"})
    clock.advance(0.2)
    assert states(ec2, volume) == ("in-use", {I1: "attached"})

    assert ec2.detach_volume(VolumeId=volume, InstanceId=I1)["State"] == "detaching"
    clock.advance(AWS.detach_s - 0.1)
    assert states(ec2, volume) == ("in-use", {I1: "detaching"})
    assert refused(lambda: attach(ec2, volume, I2)) == "VolumeInUse", "it is not free before it is detached"
    clock.advance(0.2)
    assert states(ec2, volume) == ("available", {})

    simulator.turn(busy=[volume])
    attach(ec2, volume, I1)
    ec2.detach_volume(VolumeId=volume, InstanceId=I1)
    clock.advance(3600)
    assert states(ec2, volume) == ("in-use", {I1: "busy"})
    simulator.turn()
    assert states(ec2, volume) == ("available", {}), "the node has let go"


def test_gp3_moves_in_about_seven_seconds() -> None:
    assert AWS.detach_s + AWS.attach_s == pytest.approx(7.0)


def test_attach_across_zones_is_a_zone_mismatch(ec2: Any) -> None:
    for kind in ("gp3", "io2"):
        volume = create(ec2, kind)
        assert refused(lambda volume=volume: attach(ec2, volume, FAR["far"])) == "InvalidVolume.ZoneMismatch"  # type: ignore[misc]
        assert states(ec2, volume) == ("available", {})


def test_detach_from_the_wrong_instance_is_refused(ec2: Any) -> None:
    for kind in ("gp3", "io2"):
        volume = create(ec2, kind)
        attach(ec2, volume, I1, f"/dev/{kind}".replace("gp3", "sdf").replace("io2", "sdg"))
        for force in (False, True):
            code = refused(lambda v=volume, f=force: ec2.detach_volume(VolumeId=v, InstanceId=I2, Force=f))  # type: ignore[misc]
            assert code == "InvalidAttachment.NotFound"
        assert states(ec2, volume) == ("in-use", {I1: "attached"})


def test_detach_twice_is_refused(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    volume = create(ec2)
    attach(ec2, volume, I1)
    simulator.turn(**SLOW)
    ec2.detach_volume(VolumeId=volume, InstanceId=I1)
    assert refused(lambda: ec2.detach_volume(VolumeId=volume, InstanceId=I1)) == "IncorrectState"
    clock.advance(AWS.detach_s)
    assert refused(lambda: ec2.detach_volume(VolumeId=volume, InstanceId=I1)) == "IncorrectState"


def test_detach_without_an_instance_by_force_is_fine_for_one_attachment(ec2: Any) -> None:
    volume = create(ec2)
    attach(ec2, volume, I1)
    assert ec2.detach_volume(VolumeId=volume, Force=True)["InstanceId"] == I1
    assert states(ec2, volume) == ("available", {})


def test_detach_multi_attach_without_an_instance_is_refused(ec2: Any) -> None:
    volume = create(ec2, "io2")
    attach(ec2, volume, I1)
    for force in (False, True):
        assert refused(lambda f=force: ec2.detach_volume(VolumeId=volume, Force=f)) == "MissingParameter"  # type: ignore[misc]


def test_dry_run_does_nothing(ec2: Any) -> None:
    volume, held = create(ec2), create(ec2)
    attach(ec2, held, I1)
    before = ec2.describe_volumes()["Volumes"]
    for call in (
        lambda: create(ec2, DryRun=True),
        lambda: ec2.attach_volume(VolumeId=volume, InstanceId=I2, Device="/dev/sdf", DryRun=True),
        lambda: ec2.detach_volume(VolumeId=held, InstanceId=I1, DryRun=True),
        lambda: ec2.delete_volume(VolumeId=volume, DryRun=True),
        lambda: ec2.describe_volumes(DryRun=True),
        lambda: ec2.describe_instances(DryRun=True),
        lambda: ec2.create_tags(Resources=[volume], Tags=[{"Key": "a", "Value": "b"}], DryRun=True),
        lambda: new_eni(ec2, DryRun=True),
    ):
        assert refused(call) == "DryRunOperation"
    assert ec2.describe_volumes()["Volumes"] == before


def test_attach_an_eni_twice_is_refused(ec2: Any) -> None:
    eni = new_eni(ec2)
    attach_eni(ec2, eni, I1)
    for instance in (I1, I2):
        call = lambda instance=instance: attach_eni(ec2, eni, instance, 2)  # noqa: E731
        assert refused(call) == "InvalidNetworkInterface.InUse"
    assert show_eni(ec2, eni)["Attachment"]["InstanceId"] == I1


def test_assign_a_taken_ip_without_reassignment_is_refused(ec2: Any) -> None:
    take(ec2, I1, ADDRESS)
    for more in ({}, {"AllowReassignment": False}):
        assert refused(lambda more=more: take(ec2, I2, ADDRESS, **more)) == "InvalidParameterValue"  # type: ignore[misc]
    assert holder(ec2, ADDRESS) == I1


def test_assign_a_taken_ip_with_reassignment_moves_it_asynchronously(
    ec2: Any, simulator: Simulator, clock: HandClock
) -> None:
    simulator.turn(remap=BY_HAND)
    source = take(ec2, I1, ADDRESS)
    target = take(ec2, I2, ADDRESS, AllowReassignment=True)
    clock.advance(1.9)
    assert holder(ec2, ADDRESS) == I1, "the old one answers until it has moved"
    assert addresses(ec2, target) == ["10.77.0.102"]
    clock.advance(0.2)
    assert addresses(ec2, source) == ["10.77.0.101"]
    assert addresses(ec2, target) == ["10.77.0.102", ADDRESS]


def test_an_ip_outside_the_subnet_is_refused(ec2: Any) -> None:
    for address in ("10.77.1.5", "10.77.2.5", "192.0.2.1", "10.77.0.3", "10.77.0.255"):
        call = lambda address=address: take(ec2, I1, address, AllowReassignment=True)  # noqa: E731
        assert refused(call) == "InvalidParameterValue"


def test_only_secondary_addresses_move(ec2: Any) -> None:
    assert refused(lambda: take(ec2, I1, "10.77.0.102", AllowReassignment=True)) == "InvalidParameterValue"
    assert holder(ec2, "10.77.0.102") == I2


def test_an_interface_has_as_many_slots_as_its_instance_type_says(ec2: Any, simulator: Simulator) -> None:
    simulator.turn(remap=BY_HAND)
    small = new_eni(ec2)
    attach_eni(ec2, small, SMALL)
    take(ec2, I1, ADDRESS, "10.77.0.61")
    assign(ec2, small, ADDRESS, AllowReassignment=True)
    more = lambda: assign(ec2, small, "10.77.0.61", AllowReassignment=True)  # noqa: E731
    assert refused(more) == "PrivateIpAddressLimitExceeded", "what is on its way to it counts"
    wide = new_eni(ec2, SecondaryPrivateIpAddressCount=2)
    assert refused(lambda: attach_eni(ec2, wide, SMALL, 2)) == "PrivateIpAddressLimitExceeded"
    attach_eni(ec2, wide, I1)
    ec2.assign_private_ip_addresses(NetworkInterfaceId=wide, SecondaryPrivateIpAddressCount=46)
    ec2.assign_private_ip_addresses(NetworkInterfaceId=wide, Ipv4PrefixCount=1)
    assert refused(lambda: assign(ec2, wide, "10.77.0.250")) == "PrivateIpAddressLimitExceeded", "50, a prefix is one"


def test_an_address_of_a_delegated_prefix_does_not_move_by_itself(ec2: Any) -> None:
    eni = primary(ec2, I1)["NetworkInterfaceId"]
    ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4Prefixes=["10.77.0.48/28"])
    for more in ({}, {"AllowReassignment": True}):
        assert refused(lambda more=more: take(ec2, I2, ADDRESS, **more)) == "InvalidParameterValue"  # type: ignore[misc]
    other = primary(ec2, I2)["NetworkInterfaceId"]
    whole = lambda: ec2.assign_private_ip_addresses(  # noqa: E731
        NetworkInterfaceId=other, Ipv4Prefixes=["10.77.0.48/28"], AllowReassignment=True
    )
    assert refused(whole) == "InvalidIPAddress.InUse", "nor does the prefix"
    assert show_eni(ec2, eni)["Ipv4Prefixes"] == [{"Ipv4Prefix": "10.77.0.48/28"}]


def test_an_ipv6_address_is_not_reassigned_but_unassigned_and_assigned(ec2: Any) -> None:
    one, two = (primary(ec2, instance)["NetworkInterfaceId"] for instance in (I1, I2))
    address = IPV6.replace("::/64", "::60")
    ec2.assign_ipv6_addresses(NetworkInterfaceId=one, Ipv6Addresses=[address])

    def call() -> Any:
        return ec2.assign_ipv6_addresses(NetworkInterfaceId=two, Ipv6Addresses=[address])

    assert refused(call) == "InvalidIPAddress.InUse"
    gone = ec2.unassign_ipv6_addresses(NetworkInterfaceId=one, Ipv6Addresses=[address])
    assert gone["UnassignedIpv6Addresses"] == [address]
    assert call()["AssignedIpv6Addresses"] == [address]
    assert [each["Ipv6Address"] for each in show_eni(ec2, two)["Ipv6Addresses"]] == [address]
    again = lambda: ec2.unassign_ipv6_addresses(NetworkInterfaceId=one, Ipv6Addresses=[address])  # noqa: E731
    assert refused(again) == "InvalidParameterValue"


def test_efs_second_mount_target_in_a_zone_is_a_conflict(efs: Any) -> None:
    of = efs.create_file_system(CreationToken="t")["FileSystemId"]
    efs.create_mount_target(FileSystemId=of, SubnetId=SUBNETS[ZONE])
    for subnet in (SUBNETS[ZONE], SECOND_SUBNET):
        call = lambda subnet=subnet: efs.create_mount_target(FileSystemId=of, SubnetId=subnet)  # noqa: E731
        assert refused(call) == "MountTargetConflict"


# ------------------------------------------------------------------ attaching and detaching


@pytest.mark.parametrize("kind", ["io1", "io2"])
def test_sixteen_instances_and_not_one_more(ec2: Any, kind: str) -> None:
    volume = create(ec2, kind)
    instances = list(NODES.values())
    for instance in instances[:16]:
        attach(ec2, volume, instance)
    assert refused(lambda: attach(ec2, volume, instances[16])) == "AttachmentLimitExceeded"
    ec2.detach_volume(VolumeId=volume, InstanceId=instances[0])
    attach(ec2, volume, instances[16])


def test_the_same_instance_twice_is_volume_in_use(ec2: Any) -> None:
    for kind, device in (("gp3", "/dev/sdf"), ("io2", "/dev/sdg")):
        volume = create(ec2, kind)
        attach(ec2, volume, I1, device)
        assert refused(lambda v=volume: attach(ec2, v, I1, "/dev/sdh")) == "VolumeInUse"  # type: ignore[misc]


def test_an_instance_takes_only_so_many_volumes(ec2: Any) -> None:
    devices = [f"/dev/xvdb{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + ["/dev/xvdca"]
    for device in devices:
        attach(ec2, create(ec2), I1, device)
    assert refused(lambda: attach(ec2, create(ec2), I1, "/dev/xvdcb")) == "AttachmentLimitExceeded"


def test_a_device_is_one_volumes_and_has_a_devices_name(ec2: Any) -> None:
    attach(ec2, create(ec2), I1, "/dev/sdf")
    other = create(ec2)
    for device in ("/dev/sdf", "sdf", "/dev/sdf1", "/dev/xvda", "/dev/nvme1n1", "x"):
        assert refused(lambda device=device: attach(ec2, other, I1, device)) == "InvalidParameterValue"  # type: ignore[misc]
    attach(ec2, other, I1, "/dev/sdg")


def test_an_order_for_a_state_that_is_not_there_is_refused(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(**SLOW)
    volume = create(ec2)
    assert refused(lambda: attach(ec2, volume, I1)) == "IncorrectState"
    assert refused(lambda: ec2.delete_volume(VolumeId=volume)) == "IncorrectState"
    clock.advance(AWS.create_s)
    assert refused(lambda: ec2.detach_volume(VolumeId=volume, InstanceId=I1)) == "IncorrectState"
    attach(ec2, volume, I1)
    assert refused(lambda: ec2.detach_volume(VolumeId=volume, InstanceId=I1)) == "IncorrectState"
    assert refused(lambda: ec2.delete_volume(VolumeId=volume)) == "VolumeInUse"
    clock.advance(AWS.attach_s)
    ec2.detach_volume(VolumeId=volume, InstanceId=I1)
    assert refused(lambda: ec2.delete_volume(VolumeId=volume)) == "VolumeInUse"
    clock.advance(AWS.detach_s)
    ec2.delete_volume(VolumeId=volume)
    assert states(ec2, volume) == ("deleting", {})
    assert refused(lambda: attach(ec2, volume, I1)) == "IncorrectState"
    clock.advance(AWS.delete_s)
    assert refused(lambda: show(ec2, volume)) == "InvalidVolume.NotFound"


def test_a_stuck_detach_ends_by_force_alone(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    volume = create(ec2)
    attach(ec2, volume, I1)
    simulator.turn(stuck=[volume], **SLOW)
    ec2.detach_volume(VolumeId=volume, InstanceId=I1)
    clock.advance(3600)
    assert states(ec2, volume) == ("in-use", {I1: "detaching"})
    ec2.detach_volume(VolumeId=volume, InstanceId=I1, Force=True)
    assert states(ec2, volume) == ("in-use", {I1: "detaching"})
    clock.advance(AWS.detach_s)
    assert states(ec2, volume) == ("available", {})


# ------------------------------------------------------------------ creating


def test_the_same_token_makes_one_volume(ec2: Any) -> None:
    first = create(ec2, ClientToken="t1")
    assert create(ec2, ClientToken="t1") == first
    assert create(ec2, ClientToken="t2") != first
    assert refused(lambda: create(ec2, ClientToken="t1", Size=9)) == "IdempotentParameterMismatch"
    assert refused(lambda: create(ec2, ClientToken="t" * 65)) == "InvalidParameterValue"
    assert len(ec2.describe_volumes()["Volumes"]) == 2


@pytest.mark.parametrize(
    ("kind", "more", "code"),
    [
        ("gp3", {"Size": 0}, "InvalidParameterValue"),
        ("gp2", {"Size": 16_385}, "InvalidParameterValue"),
        ("io2", {"Size": 3}, "InvalidParameterValue"),
        ("io2", {"Iops": 99}, "InvalidParameterValue"),
        ("io1", {"Size": 4, "Iops": 201}, "InvalidParameterValue"),
        ("gp2", {"Iops": 3000}, "InvalidParameterCombination"),
        ("gp2", {"Throughput": 200}, "InvalidParameterCombination"),
        ("gp3", {"Throughput": 124}, "InvalidParameterValue"),
        ("gp3", {"AvailabilityZone": "eu-west-1z"}, "InvalidZone.NotFound"),
        ("gp3", {"SnapshotId": "snap-0123456789abcdef0"}, "InvalidSnapshot.NotFound"),
        ("gp3", {"TagSpecifications": [{"ResourceType": "instance", "Tags": []}]}, "InvalidParameterValue"),
        ("gp3", {"KmsKeyId": "alias/x"}, "UnsupportedOperation"),
    ],
)
def test_a_volume_that_cannot_be_is_refused(ec2: Any, kind: str, more: dict[str, Any], code: str) -> None:
    assert refused(lambda: create(ec2, kind, **more)) == code


def test_what_must_be_said_must_be_said(ec2: Any) -> None:
    for missing in ({"Size": 4, "VolumeType": "io2"}, {"VolumeType": "gp3"}):
        assert refused(lambda m=missing: ec2.create_volume(AvailabilityZone=ZONE, **m)) == "MissingParameter"  # type: ignore[misc]
    assert refused(lambda: ec2.create_volume(Size=4)) == "MissingParameter"


def test_a_new_volume_may_not_be_seen_at_once(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(describe_lag_s=2.0)
    volume = create(ec2)
    assert refused(lambda: show(ec2, volume)) == "InvalidVolume.NotFound"
    assert refused(lambda: attach(ec2, volume, I1)) == "InvalidVolume.NotFound"
    assert ec2.describe_volumes()["Volumes"] == []
    clock.advance(2.0)
    assert states(ec2, volume) == ("available", {})
    attach(ec2, volume, I1)


# ------------------------------------------------------------------ growing


def grow(ec2: Any, volume: str, size: int, **more: Any) -> Any:
    return ec2.modify_volume(VolumeId=volume, Size=size, **more)["VolumeModification"]


def last_modification(ec2: Any, volume: str) -> Any:
    (found,) = ec2.describe_volumes_modifications(VolumeIds=[volume])["VolumesModifications"]
    return found


def test_states_modifying_and_optimizing_last(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    volume = create(ec2)
    simulator.turn(**SLOW)
    begun = grow(ec2, volume, 9)
    assert (begun["ModificationState"], begun["OriginalSize"], begun["TargetSize"]) == ("modifying", 8, 9)
    clock.advance(AWS.modify_s - 0.1)
    assert (last_modification(ec2, volume)["ModificationState"], show(ec2, volume)["Size"]) == ("modifying", 8)
    clock.advance(0.2)
    show(ec2, volume)
    assert (last_modification(ec2, volume)["ModificationState"], show(ec2, volume)["Size"]) == ("optimizing", 9)
    assert refused(lambda: grow(ec2, volume, 10)) == "IncorrectModificationState"
    clock.advance(AWS.optimize_s)
    found = last_modification(ec2, volume)
    assert (found["ModificationState"], found["Progress"]) == ("completed", 100)
    assert found["EndTime"] > found["StartTime"]


def test_six_hours_are_between_two_modifications(ec2: Any, clock: HandClock) -> None:
    volume = create(ec2)
    grow(ec2, volume, 9)
    clock.advance(6 * 3600 - 1.0)
    show(ec2, volume)
    assert refused(lambda: grow(ec2, volume, 10)) == "VolumeModificationRateExceeded"
    clock.advance(1.0)
    grow(ec2, volume, 10)
    assert show(ec2, volume)["Size"] == 10


def test_a_modification_that_cannot_be_is_refused(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    volume, shared = create(ec2), create(ec2, "io1")
    for call, code in (
        (lambda: grow(ec2, volume, 7), "InvalidParameterValue"),
        (lambda: grow(ec2, volume, 8), "InvalidParameterValue"),
        (lambda: grow(ec2, volume, 65_537), "InvalidParameterValue"),
        (lambda: grow(ec2, volume, 9, VolumeType="gp2"), "UnsupportedOperation"),
        (lambda: grow(ec2, volume, 9, Iops=4000), "UnsupportedOperation"),
        (lambda: ec2.modify_volume(VolumeId=volume), "MissingParameter"),
        (lambda: grow(ec2, volume, 9, DryRun=True), "DryRunOperation"),
        (lambda: grow(ec2, "vol-0123456789abcdef0", 9), "InvalidVolume.NotFound"),
        (lambda: grow(ec2, shared, 9), "InvalidParameterCombination"),
        (lambda: last_modification(ec2, volume), "InvalidVolumeModification.NotFound"),
    ):
        assert refused(call) == code
    assert show(ec2, volume)["Size"] == 8
    assert ec2.describe_volumes_modifications()["VolumesModifications"] == []
    simulator.turn(**SLOW)
    young = create(ec2)
    assert refused(lambda: grow(ec2, young, 9)) == "IncorrectState"
    clock.advance(AWS.create_s)
    grow(ec2, young, 9)
    filters = [{"Name": "modification-state", "Values": ["modifying"]}]
    (found,) = ec2.describe_volumes_modifications(Filters=filters)["VolumesModifications"]
    assert found["VolumeId"] == young


# ------------------------------------------------------------------ describing


def test_an_answer_has_all_that_was_asked_for(ec2: Any, clock: HandClock) -> None:
    clock.advance(60)
    tags = [{"Key": "emp:pool", "Value": "p"}, {"Key": "plain", "Value": ""}]
    volume = create(ec2, "io2", Size=9, TagSpecifications=[{"ResourceType": "volume", "Tags": tags}])
    attached = attach(ec2, volume, I1, "/dev/sdf")
    found = show(ec2, volume)
    assert found | {"Attachments": []} == {
        "VolumeId": volume, "VolumeType": "io2", "Size": 9, "Iops": 200, "State": "in-use", "AvailabilityZone": ZONE,
        "Encrypted": False, "MultiAttachEnabled": True, "SnapshotId": "", "Tags": tags, "Attachments": [],
        "CreateTime": found["CreateTime"],
    }  # fmt: skip
    assert found["CreateTime"].isoformat() == "2026-01-02T03:05:05+00:00"
    attached.pop("ResponseMetadata")
    assert found["Attachments"] == [attached | {"State": "attached"}]


def test_filters_and_pages(ec2: Any) -> None:
    volumes = [create(ec2) for _ in range(7)]
    attach(ec2, volumes[3], I1)
    ec2.create_tags(Resources=volumes[:2], Tags=[{"Key": "emp:pool", "Value": "p"}])

    def found(name: str, *values: str) -> list[str]:
        answer = ec2.describe_volumes(Filters=[{"Name": name, "Values": list(values)}])
        return [volume["VolumeId"] for volume in answer["Volumes"]]

    assert found("attachment.instance-id", I1, I2) == [volumes[3]]
    assert found("status", "in-use") == [volumes[3]]
    assert found("tag:emp:pool", "p") == volumes[:2]
    assert found("tag-key", "emp:*") == volumes[:2]
    assert found("tag:emp:pool", "q") == []
    assert refused(lambda: found("no-such-filter", "x")) == "InvalidParameterValue"

    first = ec2.describe_volumes(MaxResults=5)
    rest = ec2.describe_volumes(MaxResults=5, NextToken=first["NextToken"])
    assert [v["VolumeId"] for v in first["Volumes"] + rest["Volumes"]] == volumes
    assert "NextToken" not in rest
    assert refused(lambda: ec2.describe_volumes(MaxResults=4)) == "InvalidParameterValue"
    assert refused(lambda: ec2.describe_volumes(MaxResults=5, VolumeIds=volumes)) == "InvalidParameterCombination"
    assert refused(lambda: ec2.describe_volumes(NextToken="?")) == "InvalidParameterValue"


def test_instances_and_their_devices(ec2: Any) -> None:
    volume = create(ec2)
    attach(ec2, volume, I2, "/dev/sdf")
    reservations = ec2.describe_instances(InstanceIds=[I1, I2])["Reservations"]
    one, two = (instance for reservation in reservations for instance in reservation["Instances"])
    assert (one["InstanceId"], one["State"]["Name"], one["Placement"]["AvailabilityZone"]) == (I1, "running", ZONE)
    assert one["BlockDeviceMappings"] == []
    (mapping,) = two["BlockDeviceMappings"]
    assert mapping["DeviceName"] == "/dev/sdf"
    assert (mapping["Ebs"]["VolumeId"], mapping["Ebs"]["Status"]) == (volume, "attached")
    filters = [{"Name": "availability-zone", "Values": ["eu-west-1b"]}]
    (far,) = ec2.describe_instances(Filters=filters)["Reservations"]
    assert far["Instances"][0]["InstanceId"] == FAR["far"]


def test_an_instance_type_says_how_many_volumes_it_takes(ec2: Any) -> None:
    (kind,) = ec2.describe_instance_types(InstanceTypes=["m5.metal"])["InstanceTypes"]
    assert (kind["InstanceType"], kind["EbsInfo"]["MaximumEbsAttachments"]) == ("m5.metal", 27)
    assert refused(lambda: ec2.describe_instance_types(InstanceTypes=["m5.metal", "m5.large"])) == "InvalidInstanceType"


def test_what_is_not_there_is_not_found_and_what_is_no_id_is_malformed(ec2: Any) -> None:
    volume = create(ec2)
    nowhere, nobody = "vol-0123456789abcdef0", "i-0123456789abcdef0"
    for call, code in (
        (lambda: show(ec2, nowhere), "InvalidVolume.NotFound"),
        (lambda: ec2.delete_volume(VolumeId=nowhere), "InvalidVolume.NotFound"),
        (lambda: attach(ec2, nowhere, I1), "InvalidVolume.NotFound"),
        (lambda: ec2.create_tags(Resources=[nowhere], Tags=[{"Key": "a"}]), "InvalidVolume.NotFound"),
        (lambda: attach(ec2, volume, nobody), "InvalidInstanceID.NotFound"),
        (lambda: ec2.describe_instances(InstanceIds=[nobody]), "InvalidInstanceID.NotFound"),
        (lambda: show(ec2, "vol-1"), "InvalidVolumeID.Malformed"),
        (lambda: attach(ec2, volume, "n1"), "InvalidInstanceID.Malformed"),
    ):
        assert refused(call) == code


def test_tags_are_put_and_taken(ec2: Any) -> None:
    volume = create(ec2)
    ec2.create_tags(Resources=[volume], Tags=[{"Key": "a", "Value": "1"}, {"Key": "b", "Value": "2"}])
    ec2.create_tags(Resources=[volume], Tags=[{"Key": "a", "Value": "3"}])
    ec2.delete_tags(Resources=[volume], Tags=[{"Key": "b", "Value": "other"}])
    assert show(ec2, volume)["Tags"] == [{"Key": "a", "Value": "3"}, {"Key": "b", "Value": "2"}]
    ec2.delete_tags(Resources=[volume], Tags=[{"Key": "b"}])
    assert show(ec2, volume)["Tags"] == [{"Key": "a", "Value": "3"}]
    many = [{"Key": f"k{number}", "Value": ""} for number in range(50)]
    assert refused(lambda: ec2.create_tags(Resources=[volume], Tags=many)) == "TagLimitExceeded"
    assert refused(lambda: ec2.create_tags(Resources=[volume], Tags=[{"Key": "aws:x"}])) == "InvalidParameterValue"
