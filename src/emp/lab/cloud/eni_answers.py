"""Network interfaces as the service's model has them, and the filters of DescribeNetworkInterfaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from emp.lab.cloud.eni_records import EniAttachment, Interface


def attachment_answer(held: EniAttachment) -> dict[str, Any]:
    return {
        "AttachmentId": held.id,
        "DeviceIndex": held.index,
        "NetworkCardIndex": 0,
        "Status": held.state.value,
        "AttachTime": held.at,
        "DeleteOnTermination": held.delete_on_termination,
    }


def interface_answer(eni: Interface) -> dict[str, Any]:
    attachment = eni.attachment and attachment_answer(eni.attachment) | {"InstanceId": eni.attachment.instance}
    return {
        **_common(eni),
        "Attachment": attachment,
        "AvailabilityZone": eni.zone,
        "Ipv6Addresses": [{"Ipv6Address": address} for address in eni.ipv6],
        "RequesterManaged": False,
        "TagSet": [{"Key": key, "Value": value} for key, value in sorted(eni.tags.items())],
    }


def of_instance_answer(eni: Interface) -> dict[str, Any]:
    """As DescribeInstances shows it: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_InstanceNetworkInterface.html"""
    return {
        **_common(eni),
        "Attachment": eni.attachment and attachment_answer(eni.attachment),
        "Ipv6Addresses": [{"Ipv6Address": address} for address in eni.ipv6],
    }


def _common(eni: Interface) -> dict[str, Any]:
    return {
        "NetworkInterfaceId": eni.id,
        "Description": eni.description,
        "Groups": [{"GroupId": group} for group in eni.groups],
        "InterfaceType": "interface",
        "MacAddress": eni.mac,
        "PrivateIpAddress": eni.addresses[0],
        "PrivateIpAddresses": [
            {"PrivateIpAddress": address, "Primary": number == 0} for number, address in enumerate(eni.addresses)
        ],
        "Ipv4Prefixes": [{"Ipv4Prefix": prefix} for prefix in eni.prefixes],
        "SourceDestCheck": eni.source_dest_check,
        "Status": eni.status,
        "SubnetId": eni.subnet,
        "VpcId": eni.vpc,
    }


def _of_attachment(key: str) -> Callable[[Mapping[str, Any]], list[str]]:
    return lambda eni: [str(eni["Attachment"][key])] if eni["Attachment"] else []


FILTERS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "addresses.private-ip-address": lambda e: [a["PrivateIpAddress"] for a in e["PrivateIpAddresses"]],
    "attachment.attachment-id": _of_attachment("AttachmentId"),
    "attachment.device-index": _of_attachment("DeviceIndex"),
    "attachment.instance-id": _of_attachment("InstanceId"),
    "attachment.status": _of_attachment("Status"),
    "availability-zone": lambda e: [e["AvailabilityZone"]],
    "group-id": lambda e: [group["GroupId"] for group in e["Groups"]],
    "ipv6-addresses.ipv6-address": lambda e: [a["Ipv6Address"] for a in e["Ipv6Addresses"]],
    "mac-address": lambda e: [e["MacAddress"]],
    "network-interface-id": lambda e: [e["NetworkInterfaceId"]],
    "private-ip-address": lambda e: [e["PrivateIpAddress"]],
    "source-dest-check": lambda e: [str(e["SourceDestCheck"]).lower()],
    "status": lambda e: [e["Status"]],
    "subnet-id": lambda e: [e["SubnetId"]],
    "tag-key": lambda e: [tag["Key"] for tag in e["TagSet"]],
    "vpc-id": lambda e: [e["VpcId"]],
}
"""https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeNetworkInterfaces.html"""
