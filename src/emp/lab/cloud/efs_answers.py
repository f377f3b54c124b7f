"""EFS's answers as the service's model has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emp.lab.cloud.efs_records import AccessPoint, EfsState, FileSystem, MountTarget
from emp.lab.cloud.errors import CloudError

OWNER = "000000000000"
LONGEST_PAGE = 100
"""https://docs.aws.amazon.com/efs/latest/ug/API_DescribeFileSystems.html"""


def file_system(record: FileSystem, state: EfsState) -> dict[str, Any]:
    return {
        "OwnerId": OWNER,
        "CreationToken": record.token,
        "FileSystemId": record.id,
        "CreationTime": record.created,
        "LifeCycleState": record.life.value,
        "Name": record.tags.get("Name"),
        "NumberOfMountTargets": sum(each.file_system == record.id for each in state.mount_targets.values()),
        "SizeInBytes": {"Value": 6144},  # what an empty one shows; nobody measures what is in it
        "PerformanceMode": record.performance,
        "Encrypted": record.encrypted,
        "ThroughputMode": record.throughput,
        "ProvisionedThroughputInMibps": record.provisioned_mibps,
        "AvailabilityZoneName": record.zone,
        "Tags": _tags(record.tags),
    }


def mount_target(record: MountTarget) -> dict[str, Any]:
    return {
        "OwnerId": OWNER,
        "MountTargetId": record.id,
        "FileSystemId": record.file_system,
        "SubnetId": record.subnet,
        "LifeCycleState": record.life.value,
        "IpAddress": record.address,
        "NetworkInterfaceId": record.interface,
        "AvailabilityZoneName": record.zone,
        "VpcId": record.vpc,
    }


def access_point(record: AccessPoint) -> dict[str, Any]:
    return {
        "ClientToken": record.token,
        "Name": record.tags.get("Name"),
        "Tags": _tags(record.tags),
        "AccessPointId": record.id,
        "FileSystemId": record.file_system,
        "PosixUser": record.user,
        "RootDirectory": {"Path": record.path, "CreationInfo": record.creation},
        "OwnerId": OWNER,
        "LifeCycleState": record.life.value,
    }


def page(
    name: str,
    items: list[dict[str, Any]],
    request: Mapping[str, Any],
    *,
    size: str = "MaxItems",
    token: str = "Marker",
    following: str = "NextMarker",
) -> dict[str, Any]:
    """Return one page and where the next begins. Raises BadRequest for a marker that was not given out."""
    marker = request.get(token, "0")
    if not marker.isdigit():
        raise CloudError("BadRequest", "The marker is invalid")
    begin = int(marker)
    end = begin + min(request.get(size, LONGEST_PAGE), LONGEST_PAGE)
    return {name: items[begin:end], following: str(end) if end < len(items) else None}


def _tags(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in sorted(tags.items())]
