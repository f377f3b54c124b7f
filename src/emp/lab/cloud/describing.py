"""Answers as the service's model has them, and the filters of the Describe actions."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from emp.lab.cloud.attaching import ROOT_DEVICE
from emp.lab.cloud.eni_answers import of_instance_answer
from emp.lab.cloud.eni_records import LIMITS, Interface
from emp.lab.cloud.errors import CloudError
from emp.lab.cloud.records import Attachment, AttachmentState, Instance, Volume

Texts = list[str]
STATE_CODES = {"pending": 0, "running": 16, "stopping": 64, "stopped": 80}
"""https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_InstanceState.html"""


def attachment_answer(volume: Volume, attachment: Attachment) -> dict[str, Any]:
    return {
        "VolumeId": volume.id,
        "InstanceId": attachment.instance,
        "Device": attachment.device,
        "State": attachment.state.value,
        "AttachTime": attachment.at,
        "DeleteOnTermination": False,
    }


def volume_answer(volume: Volume, now_s: float) -> dict[str, Any]:
    return {
        "VolumeId": volume.id,
        "Size": volume.size_gib,
        "SnapshotId": "",
        "AvailabilityZone": volume.zone,
        "State": volume.state(now_s),
        "CreateTime": volume.created,
        "Attachments": [attachment_answer(volume, attachment) for attachment in volume.attachments.values()],
        "Tags": [{"Key": key, "Value": value} for key, value in sorted(volume.tags.items())],
        "VolumeType": volume.type,
        "Iops": volume.iops,
        "Throughput": volume.throughput,
        "Encrypted": volume.encrypted,
        "MultiAttachEnabled": volume.multi_attach,
    }


def created_answer(volume: Volume, now_s: float) -> dict[str, Any]:
    """CreateVolume answers without attachments: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CreateVolume.html"""
    return {key: value for key, value in volume_answer(volume, now_s).items() if key != "Attachments"}


def instance_answer(
    instance: Instance, volumes: Iterable[Volume], interfaces: Iterable[Interface], since: datetime
) -> dict[str, Any]:
    """An instance with its devices, each of which names the volume and the state of its attachment."""
    mappings = [
        {
            "DeviceName": attachment.device,
            "Ebs": {
                "VolumeId": volume.id,
                "Status": "detaching" if attachment.state is AttachmentState.BUSY else attachment.state.value,
                "AttachTime": attachment.at,
                "DeleteOnTermination": False,
            },
        }
        for volume in volumes
        if (attachment := volume.attachments.get(instance.id))
    ]
    return {
        "InstanceId": instance.id,
        "InstanceType": instance.type,
        "State": {"Code": STATE_CODES[instance.state], "Name": instance.state},
        "Placement": {"AvailabilityZone": instance.zone},
        "SubnetId": instance.subnet,
        "VpcId": instance.vpc,
        "SecurityGroups": [{"GroupId": group} for group in instance.groups],
        "LaunchTime": since,
        "RootDeviceName": ROOT_DEVICE,
        "RootDeviceType": "ebs",
        "BlockDeviceMappings": mappings,
        "PrivateIpAddress": instance.address,
        "NetworkInterfaces": [of_instance_answer(each) for each in interfaces],
    }


def instance_type_answer(instance: Instance) -> dict[str, Any]:
    """Only what it says of volumes and interfaces.

    https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_EbsInfo.html and ``API_NetworkInfo.html`` there.
    """
    limits = LIMITS[instance.type]
    return {
        "InstanceType": instance.type,
        "EbsInfo": {"MaximumEbsAttachments": instance.max_volumes, "AttachmentLimitType": "shared"},
        "NetworkInfo": {
            "MaximumNetworkInterfaces": limits.interfaces,
            "Ipv4AddressesPerInterface": limits.ipv4,
            "Ipv6AddressesPerInterface": limits.ipv6,
            "Ipv6Supported": True,
        },
    }


VOLUME_FILTERS: Mapping[str, Callable[[Mapping[str, Any]], Texts]] = {
    "attachment.device": lambda v: [a["Device"] for a in v["Attachments"]],
    "attachment.instance-id": lambda v: [a["InstanceId"] for a in v["Attachments"]],
    "attachment.status": lambda v: [a["State"] for a in v["Attachments"]],
    "availability-zone": lambda v: [v["AvailabilityZone"]],
    "encrypted": lambda v: [str(v["Encrypted"]).lower()],
    "multi-attach-enabled": lambda v: [str(v["MultiAttachEnabled"]).lower()],
    "size": lambda v: [str(v["Size"])],
    "status": lambda v: [v["State"]],
    "tag-key": lambda v: [tag["Key"] for tag in v["Tags"]],
    "volume-id": lambda v: [v["VolumeId"]],
    "volume-type": lambda v: [v["VolumeType"]],
}
"""https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeVolumes.html"""

INSTANCE_FILTERS: Mapping[str, Callable[[Mapping[str, Any]], Texts]] = {
    "availability-zone": lambda i: [i["Placement"]["AvailabilityZone"]],
    "block-device-mapping.volume-id": lambda i: [m["Ebs"]["VolumeId"] for m in i["BlockDeviceMappings"]],
    "instance-id": lambda i: [i["InstanceId"]],
    "instance-state-name": lambda i: [i["State"]["Name"]],
    "instance-type": lambda i: [i["InstanceType"]],
}
"""https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeInstances.html"""


def filtered(
    answers: Iterable[dict[str, Any]],
    filters: Sequence[Mapping[str, Any]],
    known: Mapping[str, Callable[[Mapping[str, Any]], Texts]],
) -> list[dict[str, Any]]:
    """Return what every filter lets through: a filter matches one of its values, ``*`` and ``?`` in it are wildcards.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Filtering.html. Raises InvalidParameterValue for a filter
    that is not known.
    """
    left = list(answers)
    for each in filters:
        name = each.get("Name", "")
        values: Callable[[Mapping[str, Any]], Texts]
        if name.startswith("tag:"):
            values = _values_of_tag(name.removeprefix("tag:"))
        elif name in known:
            values = known[name]
        else:
            raise CloudError("InvalidParameterValue", f"The filter '{name}' is invalid")
        patterns = [_pattern(text) for text in each.get("Values", ())]
        left = [a for a in left if any(p.fullmatch(value) for p in patterns for value in values(a))]
    return left


def _values_of_tag(key: str) -> Callable[[Mapping[str, Any]], Texts]:
    """A network interface's tags have a name of their own."""
    return lambda answer: [tag["Value"] for tag in answer.get("Tags", answer.get("TagSet", ())) if tag["Key"] == key]


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("".join({"*": ".*", "?": "."}.get(letter, re.escape(letter)) for letter in text), re.DOTALL)


def page(
    answers: list[dict[str, Any]], request: Mapping[str, Any], *, ids: str
) -> tuple[list[dict[str, Any]], str | None]:
    """Return one page and the token of the next.

    ``MaxResults`` is 5 to 1000 and does not go with ids (``ids`` is that parameter's name):
    https://docs.aws.amazon.com/AWSEC2/latest/APIReference/Query-Requests.html#api-pagination
    """
    size, token = request.get("MaxResults"), request.get("NextToken")
    if (size is not None or token is not None) and ids in request:
        message = f"The parameter {ids[0].lower()}{ids[1:]} cannot be used with the parameter maxResults"
        raise CloudError("InvalidParameterCombination", message)
    if size is not None and not 5 <= size <= 1000:
        raise CloudError("InvalidParameterValue", f"Value ( {size} ) for parameter maxResults is invalid.")
    begin = _begin(token) if token is not None else 0
    end = begin + (size or 1000)
    following = base64.urlsafe_b64encode(str(end).encode()).decode() if end < len(answers) else None
    return answers[begin:end], following


def _begin(token: str) -> int:
    try:
        return int(base64.urlsafe_b64decode(token.encode()))
    except (ValueError, binascii.Error):
        raise CloudError("InvalidParameterValue", "The pagination token is invalid") from None
