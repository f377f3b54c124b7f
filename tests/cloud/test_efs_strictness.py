"""The simulated EFS says no where AWS says no, and takes the time that AWS takes: through boto3, over HTTP."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from emp.lab.cloud.efs import Efs
from emp.lab.cloud.efs_records import EfsState, Life
from emp.lab.cloud.errors import CloudError
from emp.lab.cloud.knobs import AWS, Fault, Harm, Knobs, Latency, Limits
from tests.cloud.simulator import (
    BEGAN,
    CLOSED,
    FOREIGN_SUBNET,
    OPEN,
    OTHER_ZONE,
    SECOND_SUBNET,
    SUBNETS,
    ZONE,
    HandClock,
    Simulator,
    efs_model,
    network,
    simulated,
)
from tests.cloud.test_strictness import refused

_tokens = itertools.count(1)


def make(efs: Any, **more: Any) -> str:
    return str(efs.create_file_system(**({"CreationToken": f"token-{next(_tokens)}"} | more))["FileSystemId"])


def target(efs: Any, file_system: str, zone: str = ZONE, **more: Any) -> Any:
    return efs.create_mount_target(**({"FileSystemId": file_system, "SubnetId": SUBNETS[zone]} | more))


def life(efs: Any, file_system: str) -> str:
    (found,) = efs.describe_file_systems(FileSystemId=file_system)["FileSystems"]
    return str(found["LifeCycleState"])


# ------------------------------------------------------------------ the row of the libraries' comparison, by name


def test_efs_mount_target_second_in_the_same_zone_is_a_conflict(efs: Any) -> None:
    file_system = make(efs)
    first = target(efs, file_system)
    assert refused(lambda: target(efs, file_system)) == "MountTargetConflict"
    assert refused(lambda: target(efs, file_system, SubnetId=SECOND_SUBNET)) == "MountTargetConflict"
    second = target(efs, file_system, OTHER_ZONE)
    found = efs.describe_mount_targets(FileSystemId=file_system)["MountTargets"]
    assert [each["MountTargetId"] for each in found] == [first["MountTargetId"], second["MountTargetId"]]
    assert [each["AvailabilityZoneName"] for each in found] == [ZONE, OTHER_ZONE]


# ------------------------------------------------------------------ file systems


def test_a_creation_token_makes_one_file_system(efs: Any) -> None:
    file_system = make(efs, CreationToken="once")
    with pytest.raises(ClientError) as caught:
        make(efs, CreationToken="once")
    assert caught.value.response["Error"]["Code"] == "FileSystemAlreadyExists"
    assert caught.value.response["FileSystemId"] == file_system
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 409
    (found,) = efs.describe_file_systems(CreationToken="once")["FileSystems"]
    assert (found["FileSystemId"], found["LifeCycleState"]) == (file_system, "available")
    assert found["CreationTime"] == BEGAN


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"ThroughputMode": "provisioned"}, "BadRequest"),
        ({"ProvisionedThroughputInMibps": 10.0}, "BadRequest"),
        ({"AvailabilityZoneName": "eu-west-1z"}, "UnsupportedAvailabilityZone"),
        ({"AvailabilityZoneName": ZONE, "PerformanceMode": "maxIO"}, "BadRequest"),
        ({"KmsKeyId": "alias/mine"}, "BadRequest"),
        ({"CreationToken": "x" * 65}, "BadRequest"),
        ({"Tags": [{"Key": "aws:mine", "Value": "x"}]}, "BadRequest"),
        ({"Tags": [{"Key": "a<b", "Value": "x"}]}, "BadRequest"),
        ({"PerformanceMode": "fast"}, "BadRequest"),
    ],
)
def test_a_file_system_that_cannot_be_is_refused(efs: Any, parameters: dict[str, Any], code: str) -> None:
    efs.meta.events.unregister("before-parameter-build.efs")
    assert refused(lambda: make(efs, **parameters)) == code
    assert efs.describe_file_systems()["FileSystems"] == []


def test_states_creating_and_deleting_last(efs: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(latency=AWS)
    file_system = make(efs)
    assert life(efs, file_system) == "creating"
    assert refused(lambda: target(efs, file_system)) == "IncorrectFileSystemLifeCycleState"
    clock.advance(AWS.create_s)
    assert life(efs, file_system) == "available"
    made = target(efs, file_system)
    assert made["LifeCycleState"] == "creating"
    of = {"MountTargetId": made["MountTargetId"]}
    assert refused(lambda: efs.describe_mount_target_security_groups(**of)) == "IncorrectMountTargetState"
    clock.advance(AWS.attach_s)
    assert efs.describe_mount_targets(**of)["MountTargets"][0]["LifeCycleState"] == "available"
    assert efs.describe_mount_target_security_groups(**of)["SecurityGroups"] == [OPEN]
    efs.delete_mount_target(**of)
    assert efs.describe_mount_targets(**of)["MountTargets"][0]["LifeCycleState"] == "deleting"
    assert refused(lambda: efs.delete_file_system(FileSystemId=file_system)) == "FileSystemInUse"
    clock.advance(AWS.detach_s)
    assert refused(lambda: efs.describe_mount_targets(**of)) == "MountTargetNotFound"
    efs.delete_file_system(FileSystemId=file_system)
    assert life(efs, file_system) == "deleting"
    clock.advance(AWS.delete_s)
    assert refused(lambda: life(efs, file_system)) == "FileSystemNotFound"


def test_a_file_system_with_a_mount_target_cannot_be_deleted(efs: Any) -> None:
    file_system = make(efs)
    made = target(efs, file_system)
    assert refused(lambda: efs.delete_file_system(FileSystemId=file_system)) == "FileSystemInUse"
    efs.delete_mount_target(MountTargetId=made["MountTargetId"])
    assert efs.describe_mount_targets(FileSystemId=file_system)["MountTargets"] == []
    efs.delete_file_system(FileSystemId=file_system)
    assert refused(lambda: efs.delete_file_system(FileSystemId=file_system)) == "FileSystemNotFound"


# ------------------------------------------------------------------ mount targets


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"SubnetId": "subnet-0123456789abcdef0"}, "SubnetNotFound"),
        ({"SecurityGroups": ["sg-0123456789abcdef0"]}, "SecurityGroupNotFound"),
        ({"SecurityGroups": ["sg-0000000000000000f"]}, "SecurityGroupNotFound"),
        ({"SecurityGroups": [OPEN] * 6}, "SecurityGroupLimitExceeded"),
        ({"IpAddress": "10.99.0.1"}, "BadRequest"),
        ({"IpAddress": "10.77.0.3"}, "BadRequest"),
        ({"IpAddress": "10.77.0.999"}, "BadRequest"),
        ({"FileSystemId": "fs-0123456789abcdef0"}, "FileSystemNotFound"),
    ],
)
def test_a_mount_target_that_cannot_be_is_refused(efs: Any, parameters: dict[str, Any], code: str) -> None:
    file_system = make(efs)
    assert refused(lambda: target(efs, file_system, **parameters)) == code
    assert efs.describe_mount_targets(FileSystemId=file_system)["MountTargets"] == []


def test_two_mount_targets_do_not_have_one_address(efs: Any) -> None:
    assert target(efs, make(efs), IpAddress="10.77.0.9")["IpAddress"] == "10.77.0.9"
    assert refused(lambda: target(efs, make(efs), IpAddress="10.77.0.9")) == "IpAddressInUse"
    assert target(efs, make(efs))["IpAddress"] == "10.77.0.4", "the first that AWS does not keep"


def test_a_subnet_has_an_end(efs: Any) -> None:
    for _ in range(11):  # of 16 addresses AWS keeps five
        target(efs, make(efs), OTHER_ZONE)
    assert refused(lambda: target(efs, make(efs), OTHER_ZONE)) == "NoFreeAddressesInSubnet"


def test_all_mount_targets_are_in_one_vpc(efs: Any) -> None:
    file_system = make(efs)
    target(efs, file_system)
    assert refused(lambda: target(efs, file_system, SubnetId=FOREIGN_SUBNET)) == "MountTargetConflict"


def test_a_one_zone_file_system_has_its_mount_target_there(efs: Any) -> None:
    file_system = make(efs, AvailabilityZoneName=ZONE)
    assert refused(lambda: target(efs, file_system, OTHER_ZONE)) == "AvailabilityZonesMismatch"
    assert target(efs, file_system)["AvailabilityZoneName"] == ZONE


def test_mount_targets_are_described_by_one_thing(efs: Any) -> None:
    file_system = make(efs)
    made = target(efs, file_system, SecurityGroups=[CLOSED])["MountTargetId"]
    assert refused(efs.describe_mount_targets) == "BadRequest"
    assert refused(lambda: efs.describe_mount_targets(FileSystemId=file_system, MountTargetId=made)) == "BadRequest"
    assert efs.describe_mount_target_security_groups(MountTargetId=made)["SecurityGroups"] == [CLOSED]


# ------------------------------------------------------------------ access points


def test_an_access_point_lives_and_dies(efs: Any) -> None:
    file_system = make(efs)
    creation = {"OwnerUid": 1000, "OwnerGid": 1000, "Permissions": "0750"}
    asked = {
        "ClientToken": "one",
        "FileSystemId": file_system,
        "PosixUser": {"Uid": 1000, "Gid": 1000},
        "RootDirectory": {"Path": "/data/one", "CreationInfo": creation},
    }
    made = efs.create_access_point(**asked)
    with pytest.raises(ClientError) as caught:
        efs.create_access_point(**asked)
    assert caught.value.response["Error"]["Code"] == "AccessPointAlreadyExists"
    assert caught.value.response["AccessPointId"] == made["AccessPointId"]
    (found,) = efs.describe_access_points(FileSystemId=file_system)["AccessPoints"]
    assert (found["LifeCycleState"], found["RootDirectory"]) == ("available", asked["RootDirectory"])
    mount_target = target(efs, file_system)["MountTargetId"]
    (over,) = efs.describe_mount_targets(AccessPointId=made["AccessPointId"])["MountTargets"]
    assert over["MountTargetId"] == mount_target
    efs.delete_access_point(AccessPointId=made["AccessPointId"])
    assert efs.describe_access_points(FileSystemId=file_system)["AccessPoints"] == []
    assert refused(lambda: efs.delete_access_point(AccessPointId=made["AccessPointId"])) == "AccessPointNotFound"


@pytest.mark.parametrize(
    "root",
    [
        {"Path": "/a/b/c/d/e"},
        {"Path": "/a/../b"},
        {"Path": "/a", "CreationInfo": {"OwnerUid": 1, "OwnerGid": 1, "Permissions": "rwx"}},
    ],
)
def test_an_access_point_that_cannot_be_is_refused(efs: Any, root: dict[str, Any]) -> None:
    file_system = make(efs)
    assert refused(lambda: efs.create_access_point(FileSystemId=file_system, RootDirectory=root)) == "BadRequest"


# ------------------------------------------------------------------ the protocol, limits and faults


def test_what_the_service_does_not_know_is_refused(efs: Any) -> None:
    def altered(action: str, **parts: Any) -> None:
        efs.meta.events.register_first(f"before-call.efs.{action}", lambda params, **_: params.update(parts))

    altered("CreateFileSystem", body=b'{"CreationToken": "x", "Colour": "red"}')
    assert refused(lambda: make(efs)) == "BadRequest"
    altered("CreateFileSystem", body=b"{")
    assert refused(lambda: make(efs)) == "BadRequest"
    altered("DescribeFileSystems", url=efs.meta.endpoint_url + "/2015-02-01/file-systems?Colour=red")
    assert refused(efs.describe_file_systems) == "BadRequest"
    with pytest.raises(ClientError, match="no action"):
        efs.describe_account_preferences()


def test_pages_follow_each_other(efs: Any) -> None:
    made = [make(efs) for _ in range(5)]
    pages = efs.get_paginator("describe_file_systems").paginate(PaginationConfig={"PageSize": 2})
    sizes = [[each["FileSystemId"] for each in page["FileSystems"]] for page in pages]
    assert sizes == [made[:2], made[2:4], made[4:]]


def test_faults_and_limits_come_to_efs_too(efs: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(limits=Limits(change_bucket=2, change_per_s=1.0))
    make(efs), make(efs)
    with pytest.raises(ClientError) as caught:
        make(efs)
    assert caught.value.response["Error"]["Code"] == "ThrottlingException"
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 429
    clock.advance(1.0)
    make(efs)
    simulator.turn(faults=(Fault(harm=Harm.DENIED, action="CreateFileSystem"),))
    assert refused(lambda: make(efs)) == "AccessDeniedException"
    simulator.turn(faults=(Fault(harm=Harm.BROKEN, action="CreateFileSystem"),))
    assert refused(lambda: make(efs)) == "InternalServerError"
    assert len(efs.describe_file_systems()["FileSystems"]) == 3


def test_a_stranger_is_told_nothing(pki: Path, access_key: str) -> None:
    with simulated(pki / "cloud", access_key="AKIAOFANOTHERPOOL000") as elsewhere:
        stranger = elsewhere.efs_client()
        assert refused(stranger.describe_file_systems) == "UnrecognizedClientException"
        stranger.close()


def test_an_answer_or_an_error_that_the_model_does_not_have_is_a_defect() -> None:
    model = efs_model()
    answers: list[dict[str, Any]] = [{"FileSystems": [{}]}, {"FileSystems": "none"}, {"Fruit": []}]
    for answer in answers:
        with pytest.raises((TypeError, KeyError)):
            model.render("DescribeFileSystems", answer)
    with pytest.raises(TypeError, match="does not have the error"):
        model.error("DescribeFileSystems", CloudError("MountTargetConflict", "no"))


# ------------------------------------------------------------------ the network's facts, and records that last


def test_subnets_and_groups_are_described_by_ec2(ec2: Any) -> None:
    (subnet,) = ec2.describe_subnets(SubnetIds=[SUBNETS[ZONE]])["Subnets"]
    assert (subnet["AvailabilityZone"], subnet["CidrBlock"]) == (ZONE, "10.77.0.0/24")
    assert refused(lambda: ec2.describe_subnets(SubnetIds=["subnet-0123456789abcdef0"])) == "InvalidSubnetID.NotFound"
    open_, closed = ec2.describe_security_groups(GroupIds=[OPEN, CLOSED])["SecurityGroups"]
    assert open_["IpPermissions"][0]["IpRanges"] == [{"CidrIp": "10.77.0.0/16"}]
    assert closed["IpPermissions"] == []
    assert refused(lambda: ec2.describe_security_groups(GroupIds=["sg-0123456789abcdef0"])) == "InvalidGroup.NotFound"


def _efs(clock: Callable[[], float], state: EfsState | None = None) -> Efs:
    return Efs(network(), clock=clock, began=BEGAN, state=state, knobs=Knobs(latency=Latency(create_s=5.0)))


def test_records_that_were_written_down_go_on_where_they_were() -> None:
    clock = HandClock()
    efs = _efs(clock)
    made = efs.perform("CreateFileSystem", {"CreationToken": "t", "Tags": [{"Key": "Name", "Value": "n"}]})
    assert made is not None
    clock.advance(3.0)
    text = efs.state.to_json(clock())
    later = HandClock()
    later.now_s = 7.0
    again = _efs(later, EfsState.from_json(text, later()))
    (record,) = again.state.file_systems.values()
    assert (record.life, record.due_s, record.tags) == (Life.CREATING, 9.0, {"Name": "n"})
    later.advance(2.0)
    again.settle()
    assert record.life is Life.AVAILABLE


def test_a_mount_target_is_served_again_after_a_restart() -> None:
    clock = HandClock()
    efs = _efs(clock)
    made = efs.perform("CreateFileSystem", {"CreationToken": "t"})
    assert made is not None
    clock.advance(5.0)
    efs.perform("CreateMountTarget", {"FileSystemId": made["FileSystemId"], "SubnetId": SUBNETS[ZONE]})
    (change,) = efs.settle()
    efs.done(change)
    again = _efs(clock, EfsState.from_json(efs.state.to_json(clock()), clock()))
    assert again.due_s() is not None
    assert again.settle() == [change]
    again.done(change)
    assert again.settle() == []
    assert [each.life for each in again.state.mount_targets.values()] == [Life.AVAILABLE]


def test_records_that_cannot_be_written_are_told_as_a_failure(
    efs: Any, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(simulator.efs_face, "_changed", full)
    assert refused(lambda: make(efs)) == "InternalServerError"
