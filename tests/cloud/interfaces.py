"""Network interfaces of a cloud, as tests ask for them through boto3."""

from __future__ import annotations

from typing import Any

from emp.lab.cloud.knobs import RemapDelay
from tests.cloud.simulator import SUBNETS, ZONE

BY_HAND = RemapDelay(least_s=2.0)
"""a move takes two seconds of the hand-set clock"""


def new_eni(ec2: Any, **more: Any) -> str:
    made = ec2.create_network_interface(**({"SubnetId": SUBNETS[ZONE]} | more))
    return str(made["NetworkInterface"]["NetworkInterfaceId"])


def attach_eni(ec2: Any, eni: str, instance: str, index: int = 1, **more: Any) -> str:
    """Return the attachment's id."""
    made = ec2.attach_network_interface(NetworkInterfaceId=eni, InstanceId=instance, DeviceIndex=index, **more)
    return str(made["AttachmentId"])


def show_eni(ec2: Any, eni: str) -> Any:
    (found,) = ec2.describe_network_interfaces(NetworkInterfaceIds=[eni])["NetworkInterfaces"]
    return found


def primary(ec2: Any, instance: str) -> Any:
    filters = [
        {"Name": "attachment.instance-id", "Values": [instance]},
        {"Name": "attachment.device-index", "Values": ["0"]},
    ]
    (found,) = ec2.describe_network_interfaces(Filters=filters)["NetworkInterfaces"]
    return found


def addresses(ec2: Any, eni: str) -> list[str]:
    return [each["PrivateIpAddress"] for each in show_eni(ec2, eni)["PrivateIpAddresses"]]


def assign(ec2: Any, eni: str, *wanted: str, **more: Any) -> list[str]:
    made = ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, PrivateIpAddresses=list(wanted), **more)
    return [each["PrivateIpAddress"] for each in made["AssignedPrivateIpAddresses"]]


def take(ec2: Any, instance: str, *wanted: str, **more: Any) -> str:
    """Assign addresses to an instance's primary interface; return its id."""
    eni = str(primary(ec2, instance)["NetworkInterfaceId"])
    assign(ec2, eni, *wanted, **more)
    return eni


def holder(ec2: Any, address: str) -> str | None:
    """Return the instance whose interface has an address, as the cloud describes it."""
    filters = [{"Name": "addresses.private-ip-address", "Values": [address]}]
    found = ec2.describe_network_interfaces(Filters=filters)["NetworkInterfaces"]
    assert len(found) < 2, "an address is one interface's"
    return str(found[0]["Attachment"]["InstanceId"]) if found else None
