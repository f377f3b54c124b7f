"""Network interfaces of the simulated cloud, through boto3: it says no where AWS says no, and moves addresses late.

The rows in which other simulators are laxer than AWS are in ``test_strictness.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from emp.lab.cloud.cloud import Cloud
from emp.lab.cloud.knobs import AWS, Fault, Harm, Limits, RemapDelay
from emp.lab.cloud.memory import MemoryFile
from emp.lab.cloud.network_plane import PlaneInterface
from emp.lab.cloud.records import Instance
from tests.cloud.interfaces import BY_HAND, addresses, assign, attach_eni, holder, new_eni, primary, show_eni, take
from tests.cloud.simulator import (
    BEGAN,
    FAR,
    IPV6,
    NODES,
    OF_NODES,
    OPEN,
    OTHER_ZONE,
    SECOND_SUBNET,
    SMALL,
    SUBNETS,
    VPC,
    ZONE,
    HandClock,
    Simulator,
    network,
    simulated,
)  # fmt: skip
from tests.cloud.test_strictness import attach, create, refused

I1, I2 = NODES["n1"], NODES["n2"]
TAKEN = "10.77.0.60"
_HEX6 = IPV6.removesuffix("::/64")

Call = Callable[[Any], Any]


# ------------------------------------------------------------------ what there is from the start


def test_an_instance_has_a_primary_interface_with_its_address(ec2: Any) -> None:
    eni = primary(ec2, I1)
    assert (eni["PrivateIpAddress"], eni["Status"], eni["SubnetId"]) == ("10.77.0.101", "in-use", SUBNETS[ZONE])
    assert (eni["Attachment"]["DeviceIndex"], eni["SourceDestCheck"]) == (0, True)
    assert [group["GroupId"] for group in eni["Groups"]] == [OF_NODES]
    (found,) = ec2.describe_instances(InstanceIds=[I1])["Reservations"]
    (shown,) = found["Instances"][0]["NetworkInterfaces"]
    assert shown["NetworkInterfaceId"] == eni["NetworkInterfaceId"]
    assert found["Instances"][0]["PrivateIpAddress"] == "10.77.0.101"


def test_an_instance_type_says_how_many_interfaces_and_addresses_it_takes(ec2: Any) -> None:
    kinds = ec2.describe_instance_types(InstanceTypes=["m5.metal", "t3.micro"])["InstanceTypes"]
    figures = [
        tuple(kind["NetworkInfo"][name] for name in ("MaximumNetworkInterfaces", "Ipv4AddressesPerInterface"))
        for kind in kinds
    ]
    assert figures == [(15, 50), (2, 2)]


def test_a_subnet_counts_what_is_free_and_can_be_asked_for(ec2: Any) -> None:
    def free() -> int:
        (subnet,) = ec2.describe_subnets(SubnetIds=[SUBNETS[ZONE]])["Subnets"]
        return int(subnet["AvailableIpAddressCount"])

    before = free()
    assert before == 256 - 5 - len(NODES)
    new_eni(ec2, SecondaryPrivateIpAddressCount=2)
    assert free() == before - 3
    zoned = ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": [OTHER_ZONE]}])["Subnets"]
    assert [subnet["SubnetId"] for subnet in zoned] == [SUBNETS[OTHER_ZONE]]
    (first,) = ec2.describe_subnets(SubnetIds=[SUBNETS[ZONE]])["Subnets"]
    assert first["Ipv6CidrBlockAssociationSet"][0]["Ipv6CidrBlock"] == IPV6


# ------------------------------------------------------------------ making, attaching, deleting


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"SubnetId": "subnet-00000000000000fff"}, "InvalidSubnetID.NotFound"),
        ({"PrivateIpAddress": "10.77.9.9"}, "InvalidParameterValue"),
        ({"PrivateIpAddress": "10.77.0.3"}, "InvalidParameterValue"),
        ({"PrivateIpAddress": "10.77.0.256"}, "InvalidParameterValue"),
        ({"PrivateIpAddress": "10.77.0.101"}, "InvalidIPAddress.InUse"),
        ({"PrivateIpAddresses": [{"PrivateIpAddress": "10.77.0.102"}]}, "InvalidIPAddress.InUse"),
        ({"Groups": ["sg-0000000000000000f"]}, "InvalidGroup.NotFound"),
        ({"Groups": [OPEN] * 6}, "SecurityGroupsPerInterfaceLimitExceeded"),
        ({"SecondaryPrivateIpAddressCount": 50}, "PrivateIpAddressLimitExceeded"),
        ({"SecondaryPrivateIpAddressCount": 0}, "InvalidParameterValue"),
        ({"SecondaryPrivateIpAddressCount": 1, "Ipv4PrefixCount": 1}, "InvalidParameterCombination"),
        ({"Ipv6Addresses": [{"Ipv6Address": "fd78::9"}]}, "InvalidParameterValue"),
        ({"SubnetId": SECOND_SUBNET, "Ipv6AddressCount": 1}, "InvalidParameterValue"),
        ({"InterfaceType": "efa"}, "UnsupportedOperation"),
        ({"Ipv6PrefixCount": 1}, "UnsupportedOperation"),
        ({"TagSpecifications": [{"ResourceType": "volume", "Tags": [{"Key": "a"}]}]}, "InvalidParameterValue"),
        ({"ClientToken": "x" * 65}, "InvalidParameterValue"),
        ({"DryRun": True}, "DryRunOperation"),
    ],
)
def test_an_interface_that_cannot_be_is_refused(ec2: Any, more: dict[str, Any], code: str) -> None:
    before = ec2.describe_network_interfaces()["NetworkInterfaces"]
    assert refused(lambda: new_eni(ec2, **more)) == code
    assert ec2.describe_network_interfaces()["NetworkInterfaces"] == before


def test_an_interface_has_what_was_asked_for(ec2: Any) -> None:
    tags = [{"Key": "a", "Value": "b"}]
    listed = [{"PrivateIpAddress": "10.77.0.60", "Primary": True}, {"PrivateIpAddress": "10.77.0.61"}]
    eni = new_eni(
        ec2, PrivateIpAddresses=listed, Ipv6AddressCount=1, Description="of an EVM",
        TagSpecifications=[{"ResourceType": "network-interface", "Tags": tags}],
    )  # fmt: skip
    found = show_eni(ec2, eni)
    assert addresses(ec2, eni) == ["10.77.0.60", "10.77.0.61"]
    assert (found["TagSet"], found["Description"], found["Status"]) == (tags, "of an EVM", "available")
    assert [each["Ipv6Address"] for each in found["Ipv6Addresses"]] == [f"{_HEX6}::4"]
    assert [group["GroupId"] for group in found["Groups"]] == [OPEN], "the default group"


def test_the_same_token_makes_one_interface(ec2: Any) -> None:
    eni = new_eni(ec2, ClientToken="t")
    assert new_eni(ec2, ClientToken="t") == eni
    assert refused(lambda: new_eni(ec2, ClientToken="t", Description="x")) == "IdempotentParameterMismatch"


def test_states_attaching_and_detaching_last(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(latency=AWS)
    eni = new_eni(ec2)
    held = attach_eni(ec2, eni, I1)
    assert (show_eni(ec2, eni)["Status"], show_eni(ec2, eni)["Attachment"]["Status"]) == ("attaching", "attaching")
    assert refused(lambda: ec2.detach_network_interface(AttachmentId=held)) == "IncorrectState"
    clock.advance(AWS.attach_s)
    assert show_eni(ec2, eni)["Status"] == "in-use"
    assert refused(lambda: ec2.delete_network_interface(NetworkInterfaceId=eni)) == "InvalidNetworkInterface.InUse"
    ec2.detach_network_interface(AttachmentId=held)
    assert show_eni(ec2, eni)["Status"] == "detaching"
    assert refused(lambda: ec2.detach_network_interface(AttachmentId=held)) == "IncorrectState"
    assert refused(lambda: attach_eni(ec2, eni, I2)) == "InvalidNetworkInterface.InUse"
    clock.advance(AWS.detach_s)
    assert show_eni(ec2, eni)["Status"] == "available"
    assert refused(lambda: ec2.detach_network_interface(AttachmentId=held)) == "InvalidAttachmentID.NotFound"
    ec2.delete_network_interface(NetworkInterfaceId=eni)
    assert refused(lambda: show_eni(ec2, eni)) == "InvalidNetworkInterfaceID.NotFound"


def test_an_attachment_that_cannot_be_is_refused(ec2: Any) -> None:
    eni, other = new_eni(ec2), new_eni(ec2)
    attach_eni(ec2, other, I1)
    held = primary(ec2, I1)["Attachment"]["AttachmentId"]
    for call, code in (
        (lambda: attach_eni(ec2, eni, FAR["far"]), "InvalidParameterCombination"),
        (lambda: attach_eni(ec2, eni, I1), "InvalidParameterValue"),
        (lambda: attach_eni(ec2, eni, I1, -1), "InvalidParameterValue"),
        (lambda: attach_eni(ec2, eni, I2, NetworkCardIndex=1), "InvalidParameterValue"),
        (lambda: attach_eni(ec2, eni, "i-0123456789abcdef0"), "InvalidInstanceID.NotFound"),
        (lambda: attach_eni(ec2, "eni-0123456789abcdef0", I1), "InvalidNetworkInterfaceID.NotFound"),
        (lambda: attach_eni(ec2, "eni-1", I1), "InvalidNetworkInterfaceId.Malformed"),
        (lambda: attach_eni(ec2, eni, I2, EnaQueueCount=2), "UnsupportedOperation"),
        (lambda: ec2.detach_network_interface(AttachmentId=held), "OperationNotPermitted"),
        (lambda: ec2.detach_network_interface(AttachmentId=held, Force=True), "OperationNotPermitted"),
    ):
        assert refused(call) == code
    assert show_eni(ec2, eni)["Status"] == "available"


def test_slots_of_an_instance_are_shared_with_its_volumes(ec2: Any) -> None:
    for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz"):
        attach(ec2, create(ec2), I1, f"/dev/xvdb{letter}")
        if number == 0:
            attach_eni(ec2, new_eni(ec2), I1)
    assert refused(lambda: attach(ec2, create(ec2), I1, "/dev/xvdca")) == "AttachmentLimitExceeded"
    assert refused(lambda: attach_eni(ec2, new_eni(ec2), I1, 2)) == "AttachmentLimitExceeded"


def test_one_attribute_is_modified_at_a_time(ec2: Any) -> None:
    eni = primary(ec2, I1)["NetworkInterfaceId"]

    def modify(**what: Any) -> None:
        ec2.modify_network_interface_attribute(NetworkInterfaceId=eni, **what)

    modify(SourceDestCheck={"Value": False})
    modify(Groups=[OPEN, OF_NODES])
    modify(Description={"Value": "uplink"})
    found = show_eni(ec2, eni)
    assert (found["SourceDestCheck"], found["Description"]) == (False, "uplink")
    assert [group["GroupId"] for group in found["Groups"]] == [OPEN, OF_NODES]
    assert refused(modify) == "MissingParameter"
    both = {"SourceDestCheck": {"Value": True}, "Description": {"Value": "x"}}
    assert refused(lambda: modify(**both)) == "InvalidParameterCombination"
    assert refused(lambda: modify(Groups=["sg-0123456789abcdef0"])) == "InvalidGroup.NotFound"
    other = {"Attachment": {"AttachmentId": "eni-attach-1", "DeleteOnTermination": True}}
    assert refused(lambda: modify(**other)) == "InvalidAttachmentID.NotFound"
    assert refused(lambda: modify(EnablePrimaryIpv6=True)) == "UnsupportedOperation"
    held = found["Attachment"]["AttachmentId"]
    modify(Attachment={"AttachmentId": held, "DeleteOnTermination": False})
    assert show_eni(ec2, eni)["Attachment"]["DeleteOnTermination"] is False


# ------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ({}, "MissingParameter"),
        ({"PrivateIpAddresses": [TAKEN], "SecondaryPrivateIpAddressCount": 1}, "InvalidParameterCombination"),
        ({"PrivateIpAddresses": ["10.77.0.70", "10.77.0.70"]}, "InvalidParameterValue"),
        ({"PrivateIpAddresses": ["10.77.0.70", TAKEN]}, "InvalidParameterValue"),
        ({"PrivateIpAddresses": ["10.77.0.102"]}, "InvalidParameterValue"),
        ({"PrivateIpAddresses": ["10.77.0.0"]}, "InvalidParameterValue"),
        ({"PrivateIpAddresses": ["x"]}, "InvalidParameterValue"),
        ({"Ipv4Prefixes": ["10.77.0.48/28"]}, "InvalidIPAddress.InUse"),
        ({"Ipv4Prefixes": ["10.77.0.64/29"]}, "InvalidParameterValue"),
        ({"Ipv4Prefixes": ["10.77.0.0/28"]}, "InvalidParameterValue"),
        ({"Ipv4Prefixes": ["10.77.5.0/28"]}, "InvalidParameterValue"),
    ],
)
def test_an_assignment_that_cannot_be_leaves_everything(ec2: Any, what: dict[str, Any], code: str) -> None:
    take(ec2, I2, TAKEN)
    eni = primary(ec2, I1)["NetworkInterfaceId"]
    assert refused(lambda: ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, **what)) == code
    assert addresses(ec2, eni) == ["10.77.0.101"]
    assert holder(ec2, TAKEN) == I2


def test_addresses_and_prefixes_that_are_free_are_chosen(ec2: Any) -> None:
    eni = primary(ec2, I1)["NetworkInterfaceId"]
    answer = ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, SecondaryPrivateIpAddressCount=2)
    assert [each["PrivateIpAddress"] for each in answer["AssignedPrivateIpAddresses"]] == ["10.77.0.4", "10.77.0.5"]
    answer = ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4PrefixCount=1)
    assert answer["AssignedIpv4Prefixes"] == [{"Ipv4Prefix": "10.77.0.16/28"}]
    assert show_eni(ec2, eni)["Ipv4Prefixes"] == [{"Ipv4Prefix": "10.77.0.16/28"}]
    for what, code in (
        ({"PrivateIpAddresses": ["10.77.0.101"]}, "InvalidParameterValue"),
        ({"PrivateIpAddresses": ["10.77.0.9"]}, "InvalidParameterValue"),
        ({"Ipv4Prefixes": ["10.77.0.32/28"]}, "InvalidParameterValue"),
        ({}, "MissingParameter"),
    ):
        call = lambda what=what: ec2.unassign_private_ip_addresses(NetworkInterfaceId=eni, **what)  # noqa: E731
        assert refused(call) == code
    ec2.unassign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4Prefixes=["10.77.0.16/28"])
    ec2.unassign_private_ip_addresses(NetworkInterfaceId=eni, PrivateIpAddresses=["10.77.0.4", "10.77.0.5"])
    assert addresses(ec2, eni) == ["10.77.0.101"]


def test_a_subnet_has_an_end(ec2: Any) -> None:
    eni = new_eni(ec2, SubnetId=SUBNETS[OTHER_ZONE])
    ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, SecondaryPrivateIpAddressCount=10)
    again = lambda: ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, SecondaryPrivateIpAddressCount=1)  # noqa: E731
    assert refused(again) == "InsufficientFreeAddressesInSubnet"
    assert refused(lambda: new_eni(ec2, SubnetId=SUBNETS[OTHER_ZONE])) == "InsufficientFreeAddressesInSubnet"
    prefix = lambda: ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4PrefixCount=1)  # noqa: E731
    assert refused(prefix) == "InsufficientCidrBlocks"


def test_an_address_of_another_service_does_not_move(ec2: Any, efs: Any) -> None:
    """A mount target's, and no mount target gets an interface's."""
    of = efs.create_file_system(CreationToken="t")["FileSystemId"]
    made = efs.create_mount_target(FileSystemId=of, SubnetId=SUBNETS[ZONE])
    assert refused(lambda: take(ec2, I1, made["IpAddress"], AllowReassignment=True)) == "InvalidParameterValue"
    with pytest.raises(ClientError, match="IpAddressInUse"):
        other = efs.create_file_system(CreationToken="u")["FileSystemId"]
        efs.create_mount_target(FileSystemId=other, SubnetId=SUBNETS[ZONE], IpAddress="10.77.0.101")


def test_a_move_that_is_ordered_twice_takes_no_longer(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(remap=BY_HAND)
    take(ec2, I1, TAKEN)
    take(ec2, I2, TAKEN, AllowReassignment=True)
    clock.advance(1.5)
    take(ec2, I2, TAKEN, AllowReassignment=True)
    clock.advance(0.6)
    assert holder(ec2, TAKEN) == I2
    take(ec2, I2, TAKEN, AllowReassignment=True)
    assert addresses(ec2, primary(ec2, I2)["NetworkInterfaceId"]) == ["10.77.0.102", TAKEN]


def test_an_ipv6_address_takes_as_long_and_is_nobodys_meanwhile(
    ec2: Any, simulator: Simulator, clock: HandClock
) -> None:
    simulator.turn(remap=BY_HAND)
    one, two = (primary(ec2, instance)["NetworkInterfaceId"] for instance in (I1, I2))
    address = f"{_HEX6}::20"

    def assign_ipv6(eni: str, **more: Any) -> None:
        ec2.assign_ipv6_addresses(NetworkInterfaceId=eni, **(more or {"Ipv6Addresses": [address]}))

    def held(eni: str) -> list[str]:
        return [each["Ipv6Address"] for each in show_eni(ec2, eni)["Ipv6Addresses"]]

    assign_ipv6(one)
    assert held(one) == []
    for eni in (one, two):
        assert refused(lambda eni=eni: assign_ipv6(eni)) == "InvalidIPAddress.InUse"  # type: ignore[misc]
    assert refused(lambda: assign_ipv6(one, Ipv6AddressCount=50)) == "PrivateIpAddressLimitExceeded"
    clock.advance(2.1)
    assert (held(one), held(two)) == ([address], [])
    ec2.unassign_ipv6_addresses(NetworkInterfaceId=one, Ipv6Addresses=[address])
    assign_ipv6(two)
    assert (held(one), held(two)) == ([], [])
    clock.advance(2.1)
    assert (held(one), held(two)) == ([], [address])


def test_the_last_order_for_an_address_counts(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(remap=BY_HAND)
    take(ec2, I1, TAKEN)
    take(ec2, I2, TAKEN, AllowReassignment=True)
    clock.advance(1.0)
    take(ec2, I1, TAKEN, AllowReassignment=True)
    clock.advance(10.0)
    assert holder(ec2, TAKEN) == I1, "the source took it back before it had gone"
    take(ec2, I2, TAKEN, AllowReassignment=True)
    take(ec2, NODES["n3"], TAKEN, AllowReassignment=True)
    clock.advance(10.0)
    assert holder(ec2, TAKEN) == NODES["n3"]


def test_an_address_that_is_unassigned_while_it_moves_arrives(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(remap=BY_HAND)
    eni = take(ec2, I1, TAKEN)
    other = take(ec2, I2, TAKEN, AllowReassignment=True)
    ec2.unassign_private_ip_addresses(NetworkInterfaceId=eni, PrivateIpAddresses=[TAKEN])
    assert holder(ec2, TAKEN) is None
    assert refused(lambda: take(ec2, NODES["n3"], TAKEN)) == "InvalidParameterValue", "and is not free"
    take(ec2, I2, TAKEN, AllowReassignment=True)
    clock.advance(2.0)
    assert addresses(ec2, other) == ["10.77.0.102", TAKEN]


def test_addresses_move_on_when_an_interface_has_been_deleted(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    """What was on its way to that one stays where it was."""
    simulator.turn(remap=BY_HAND)
    gone = new_eni(ec2)
    take(ec2, I1, TAKEN)
    ec2.assign_private_ip_addresses(NetworkInterfaceId=gone, PrivateIpAddresses=[TAKEN], AllowReassignment=True)
    ec2.delete_network_interface(NetworkInterfaceId=gone)
    clock.advance(10.0)
    assert holder(ec2, TAKEN) == I1
    take(ec2, I2, TAKEN, AllowReassignment=True)
    clock.advance(10.0)
    assert holder(ec2, TAKEN) == I2


def test_the_delay_is_drawn_from_a_seed() -> None:
    drawn = [[RemapDelay(least_s=0.5, tail_s=1.0, most_s=3.0, seed=s).draw_s(n) for n in range(200)] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert min(drawn[0]) >= 0.5
    assert max(drawn[0]) == 3.0
    assert 1.0 < sum(drawn[0]) / 200 < 1.9
    assert RemapDelay(least_s=2.0).draw_s(7) == 2.0


# ------------------------------------------------------------------ limits, faults, describing


def test_limits_and_faults_come_to_interfaces_too(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    simulator.turn(limits=Limits(change_bucket=1, change_per_s=1.0))
    take(ec2, I1, TAKEN)
    assert refused(lambda: take(ec2, I1, "10.77.0.61")) == "RequestLimitExceeded"
    clock.advance(1.0)
    simulator.turn(faults=[Fault(harm=Harm.LOST_REPLY, action="AssignPrivateIpAddresses")])
    with pytest.raises((BotoCoreError, ResponseParserError)):
        take(ec2, I2, TAKEN, AllowReassignment=True)
    assert holder(ec2, TAKEN) == I2, "it was done"


def test_filters_pages_and_a_lag(ec2: Any, simulator: Simulator, clock: HandClock) -> None:
    take(ec2, I1, TAKEN)

    def found(name: str, value: str) -> list[str]:
        answer = ec2.describe_network_interfaces(Filters=[{"Name": name, "Values": [value]}])
        return [eni["NetworkInterfaceId"] for eni in answer["NetworkInterfaces"]]

    of = primary(ec2, I1)["NetworkInterfaceId"]
    assert found("addresses.private-ip-address", TAKEN) == [of]
    assert found("private-ip-address", TAKEN) == []
    assert found("attachment.instance-id", I1) == [of]
    assert len(found("subnet-id", SUBNETS[ZONE])) == len(NODES)
    assert refused(lambda: found("no-such-filter", "x")) == "InvalidParameterValue"
    first = ec2.describe_network_interfaces(MaxResults=10)
    rest = ec2.describe_network_interfaces(MaxResults=10, NextToken=first["NextToken"])
    assert len(first["NetworkInterfaces"] + rest["NetworkInterfaces"]) == len(NODES)
    simulator.turn(describe_lag_s=1.0)
    late = new_eni(ec2)
    assert refused(lambda: show_eni(ec2, late)) == "InvalidNetworkInterfaceID.NotFound"
    clock.advance(1.0)
    assert show_eni(ec2, late)["Status"] == "available"
    ec2.create_tags(Resources=[late], Tags=[{"Key": "emp:evm", "Value": "e"}])
    assert found("tag:emp:evm", "e") == [late]


# ------------------------------------------------------------------ the data plane, and a restart


class Routes:
    """A data plane that writes down what it is told; ``failing`` makes so many calls fail."""

    def __init__(self) -> None:
        self.at: dict[str, str | None] = {}
        self.failing = 0
        self.changed = threading.Condition()

    async def on_address_moved(self, address: str, interface: PlaneInterface | None) -> None:
        if self.failing and address == TAKEN:
            self.failing -= 1
            raise OSError("no way")
        with self.changed:
            self.at[address] = interface.instance if interface else None
            self.changed.notify_all()

    def wait_for(self, address: str, instance: str | None) -> None:
        with self.changed:
            arrived = self.changed.wait_for(lambda: self.at.get(address) == instance, timeout=5)
            assert arrived, self.at


def test_the_data_plane_hears_of_every_address_and_a_move_waits_for_it(
    pki: Path, access_key: str, clock: HandClock
) -> None:
    plane = Routes()
    with simulated(pki / "cloud", network_plane=plane, clock=clock, access_key=access_key) as simulator:
        ec2 = simulator.client()
        plane.wait_for("10.77.0.101", I1)
        eni = take(ec2, I1, TAKEN)
        plane.wait_for(TAKEN, I1)
        simulator.turn(remap=BY_HAND)
        plane.failing = 1
        take(ec2, I2, TAKEN, AllowReassignment=True)
        clock.advance(2.0)
        assert holder(ec2, TAKEN) == I1, "the data plane has not moved it"
        clock.advance(1.0)
        plane.wait_for(TAKEN, I2)
        assert holder(ec2, TAKEN) == I2
        ec2.unassign_private_ip_addresses(
            NetworkInterfaceId=primary(ec2, I2)["NetworkInterfaceId"], PrivateIpAddresses=[TAKEN]
        )
        plane.wait_for(TAKEN, None)
        ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4Prefixes=["10.77.0.160/28"])
        plane.wait_for("10.77.0.160/28", I1)
        spare = new_eni(ec2, PrivateIpAddress="10.77.0.90")
        assert "10.77.0.90" not in plane.at
        held = attach_eni(ec2, spare, I2)
        plane.wait_for("10.77.0.90", I2)
        ec2.detach_network_interface(AttachmentId=held)
        plane.wait_for("10.77.0.90", None)
        ec2.close()


def test_a_move_is_done_though_nobody_asks(pki: Path, access_key: str) -> None:
    plane = Routes()
    with simulated(pki / "cloud", network_plane=plane, clock=time.monotonic, access_key=access_key) as simulator:
        simulator.turn(remap=RemapDelay(least_s=0.05))
        ec2 = simulator.client()
        take(ec2, I1, TAKEN)
        take(ec2, I2, TAKEN, AllowReassignment=True)
        plane.wait_for(TAKEN, I2)
        ec2.close()


def _cloud(clock: HandClock) -> Cloud:
    nodes = [
        Instance(i, ZONE, subnet=SUBNETS[ZONE], vpc=VPC, groups=(OF_NODES,), address=f"10.77.0.{n}")
        for n, i in ((101, I1), (102, I2))
    ]
    return Cloud(nodes, clock=clock, began=BEGAN, vpc=network())


def test_what_was_written_down_goes_on_where_it_was(tmp_path: Path) -> None:
    """A process that was killed while an address moved; the machine was booted since, so its clock began anew."""
    clock, file = HandClock(), MemoryFile(tmp_path / "cloud.json")
    cloud = _cloud(clock)
    cloud.turn(cloud.knobs.model_copy(update={"remap": BY_HAND}))
    one, two = (cloud.network.at(i)[0].id for i in (I1, I2))
    ask = {"NetworkInterfaceId": one, "PrivateIpAddresses": [TAKEN]}
    cloud.perform("AssignPrivateIpAddresses", ask)
    cloud.perform("AssignPrivateIpAddresses", ask | {"NetworkInterfaceId": two, "AllowReassignment": True})
    cloud.perform("ModifyNetworkInterfaceAttribute", {"NetworkInterfaceId": one, "SourceDestCheck": {"Value": False}})
    made = cloud.perform("CreateNetworkInterface", {"SubnetId": SUBNETS[ZONE], "ClientToken": "t"})
    assert made is not None
    file.write(cloud.memory())

    later = HandClock()
    later.now_s = 5.0
    again = _cloud(later)
    before = file.read()
    assert before is not None
    again.recall(before)
    assert again.network.find(one).addresses == ["10.77.0.101", TAKEN]
    assert again.network.find(one).source_dest_check is False
    known = again.perform("CreateNetworkInterface", {"SubnetId": SUBNETS[ZONE], "ClientToken": "t"})
    assert known is not None
    assert known["NetworkInterface"]["NetworkInterfaceId"] == made["NetworkInterface"]["NetworkInterfaceId"]
    told = {change.address: change for change in again.network.settle()}
    mac = again.network.find(one).mac
    assert told[TAKEN].interface == PlaneInterface(one, I1, mac, source_dest_check=False), "all is told again"
    for change in told.values():
        again.network.done(change)
    assert again.due_s() == 7.0
    later.advance(2.0)
    (change,) = again.network.settle()
    again.network.done(change)
    assert (again.network.find(one).addresses, again.network.find(two).addresses) == (
        ["10.77.0.101"], ["10.77.0.102", TAKEN],
    )  # fmt: skip
    assert again.due_s() is None


def test_the_small_type_takes_two_interfaces(ec2: Any) -> None:
    for index in (0, 1):
        attach_eni(ec2, new_eni(ec2), SMALL, index)
    assert refused(lambda: attach_eni(ec2, new_eni(ec2), SMALL, 2)) == "AttachmentLimitExceeded"


def test_assign_named_addresses(ec2: Any) -> None:
    eni = primary(ec2, I1)["NetworkInterfaceId"]
    assert assign(ec2, eni, TAKEN, "10.77.0.61") == [TAKEN, "10.77.0.61"]
