"""The simulated cloud's subnets and security groups. They are there from the start, and nothing here opens or closes a
port: the lab's segment is one, and what a rule forbids is only told.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from emp.lab.cloud import describing
from emp.lab.cloud.errors import CloudError

RESERVED_FIRST, RESERVED_LAST = 4, 1
"""addresses of a subnet that AWS keeps: https://docs.aws.amazon.com/vpc/latest/userguide/subnet-sizing.html"""
NFS_PORT = 2049


@dataclass(frozen=True)
class Subnet:
    id: str
    zone: str
    cidr: str
    vpc: str = "vpc-0000000000000c10d"
    ipv6: str | None = None
    picks: str | None = None
    """block that the cloud takes an address from where none is named; None: all of ``cidr``"""

    @property
    def block(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.cidr)

    @property
    def usable(self) -> tuple[ipaddress.IPv4Address, ipaddress.IPv4Address]:
        """The first and the last address that an interface may have."""
        return self.block[RESERVED_FIRST], self.block[-1 - RESERVED_LAST]

    @property
    def usable_ipv6(self) -> tuple[ipaddress.IPv6Address, ipaddress.IPv6Address] | None:
        """As ``usable``; None: the subnet has no IPv6."""
        if self.ipv6 is None:
            return None
        block = ipaddress.IPv6Network(self.ipv6)
        return block[RESERVED_FIRST], block[-1 - RESERVED_LAST]

    @property
    def pickable(self) -> range:
        """The addresses that the cloud chooses from, as numbers."""
        first, last = self.usable
        if self.picks is None:
            return range(int(first), int(last) + 1)
        block = ipaddress.IPv4Network(self.picks)
        low, high = int(block[RESERVED_FIRST]), int(block[-1 - RESERVED_LAST])
        return range(max(low, int(first)), min(high, int(last)) + 1)


@dataclass(frozen=True)
class Rule:
    """What comes in: from addresses of ``cidr``, or from interfaces that have the group ``group``."""

    protocol: str = "tcp"
    """``-1``: every one"""
    first_port: int = NFS_PORT
    last_port: int = NFS_PORT
    cidr: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class SecurityGroup:
    id: str
    name: str
    vpc: str = "vpc-0000000000000c10d"
    rules: tuple[Rule, ...] = ()


@dataclass
class Vpc:
    """What there is, by id."""

    subnets: dict[str, Subnet] = field(default_factory=dict)
    groups: dict[str, SecurityGroup] = field(default_factory=dict)
    holders: list[Callable[[], Iterable[tuple[str, str]]]] = field(default_factory=list)
    """who gives addresses out: each yields (subnet's id, address or block) of all that it has given"""

    @classmethod
    def of(cls, subnets: Iterable[Subnet], groups: Iterable[SecurityGroup]) -> Vpc:
        return cls({subnet.id: subnet for subnet in subnets}, {group.id: group for group in groups})

    @property
    def zones(self) -> frozenset[str]:
        return frozenset(subnet.zone for subnet in self.subnets.values())

    def default_group(self, vpc: str) -> SecurityGroup:
        """https://docs.aws.amazon.com/vpc/latest/userguide/default-security-group.html"""
        return next(group for group in self.groups.values() if (group.vpc, group.name) == (vpc, "default"))

    def free_address(self, subnet: Subnet, taken: Iterable[str]) -> str | None:
        """Return the lowest address of ``subnet`` that nobody has."""
        used = set(_numbers(taken))
        return next((str(ipaddress.IPv4Address(number)) for number in subnet.pickable if number not in used), None)

    def taken(self, vpc: str) -> list[str]:
        """Return every IPv4 address or block that is given out in ``vpc``, once each."""
        given = (pair for holder in self.holders for pair in holder())
        return [address for subnet, address in given if self.subnets[subnet].vpc == vpc and ":" not in address]

    def count_free(self, subnet: Subnet) -> int:
        """Return the figure that DescribeSubnets shows."""
        first, last = (int(end) for end in subnet.usable)
        used = {number for number in _numbers(self.taken(subnet.vpc)) if first <= number <= last}
        return last - first + 1 - len(used)

    # ------------------------------------------------------------------ the EC2 actions

    def describe_subnets(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeSubnets.html"""
        wanted = request.get("SubnetIds")
        for name in wanted or ():
            if name not in self.subnets:
                raise CloudError("InvalidSubnetID.NotFound", f"The subnet ID '{name}' does not exist")
        subnets = [subnet for subnet in self.subnets.values() if wanted is None or subnet.id in wanted]
        answers = [_subnet_answer(subnet, self.count_free(subnet)) for subnet in subnets]
        left = describing.filtered(answers, request.get("Filters", ()), _SUBNET_FILTERS)
        shown, token = describing.page(left, request, ids="SubnetIds")
        return {"Subnets": shown, "NextToken": token}

    def describe_security_groups(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeSecurityGroups.html"""
        wanted = request.get("GroupIds")
        for name in wanted or ():
            if name not in self.groups:
                raise CloudError("InvalidGroup.NotFound", f"The security group '{name}' does not exist")
        groups = [group for group in self.groups.values() if wanted is None or group.id in wanted]
        return {"SecurityGroups": [_group_answer(group) for group in groups]}


_SUBNET_FILTERS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "availability-zone": lambda s: [s["AvailabilityZone"]],
    "cidr-block": lambda s: [s["CidrBlock"]],
    "state": lambda s: [s["State"]],
    "subnet-id": lambda s: [s["SubnetId"]],
    "vpc-id": lambda s: [s["VpcId"]],
}


def _subnet_answer(subnet: Subnet, free: int) -> dict[str, Any]:
    ipv6 = [{"Ipv6CidrBlock": subnet.ipv6, "Ipv6CidrBlockState": {"State": "associated"}}] if subnet.ipv6 else []
    return {
        "SubnetId": subnet.id,
        "VpcId": subnet.vpc,
        "CidrBlock": subnet.cidr,
        "Ipv6CidrBlockAssociationSet": ipv6,
        "AvailabilityZone": subnet.zone,
        "AvailableIpAddressCount": free,
        "State": "available",
    }


def _numbers(taken: Iterable[str]) -> Iterable[int]:
    for each in taken:
        block = ipaddress.IPv4Network(each)
        yield from range(int(block[0]), int(block[-1]) + 1)


def _group_answer(group: SecurityGroup) -> dict[str, Any]:
    return {
        "GroupId": group.id,
        "GroupName": group.name,
        "Description": group.name,
        "VpcId": group.vpc,
        "IpPermissions": [_rule_answer(rule) for rule in group.rules],
    }


def _rule_answer(rule: Rule) -> dict[str, Any]:
    ports = {} if rule.protocol == "-1" else {"FromPort": rule.first_port, "ToPort": rule.last_port}
    return ports | {
        "IpProtocol": rule.protocol,
        "IpRanges": [{"CidrIp": rule.cidr}] if rule.cidr else [],
        "UserIdGroupPairs": [{"GroupId": rule.group}] if rule.group else [],
    }
