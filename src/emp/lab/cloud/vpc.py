"""The simulated cloud's network, as far as mount targets need it: subnets and security groups. It is there from the
start, and nothing here opens or closes a port: the lab's segment is one, and what a rule forbids is only told.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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

    @property
    def block(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.cidr)

    @property
    def usable(self) -> tuple[ipaddress.IPv4Address, ipaddress.IPv4Address]:
        """The first and the last address that an interface may have."""
        return self.block[RESERVED_FIRST], self.block[-1 - RESERVED_LAST]


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
        first, last = subnet.usable
        used = set(taken)
        candidates = (ipaddress.IPv4Address(number) for number in range(int(first), int(last) + 1))
        return next((str(address) for address in candidates if str(address) not in used), None)

    # ------------------------------------------------------------------ the EC2 actions

    def describe_subnets(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeSubnets.html"""
        wanted = request.get("SubnetIds")
        for name in wanted or ():
            if name not in self.subnets:
                raise CloudError("InvalidSubnetID.NotFound", f"The subnet ID '{name}' does not exist")
        answers = [
            {
                "SubnetId": subnet.id,
                "VpcId": subnet.vpc,
                "CidrBlock": subnet.cidr,
                "AvailabilityZone": subnet.zone,
                "State": "available",
            }
            for subnet in self.subnets.values()
            if wanted is None or subnet.id in wanted
        ]
        return {"Subnets": answers}

    def describe_security_groups(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeSecurityGroups.html"""
        wanted = request.get("GroupIds")
        for name in wanted or ():
            if name not in self.groups:
                raise CloudError("InvalidGroup.NotFound", f"The security group '{name}' does not exist")
        groups = [group for group in self.groups.values() if wanted is None or group.id in wanted]
        return {"SecurityGroups": [_group_answer(group) for group in groups]}


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
