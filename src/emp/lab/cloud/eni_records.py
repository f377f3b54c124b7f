"""What the simulated cloud remembers of network interfaces. Times are seconds of its clock, but for those it shows."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


@dataclass(frozen=True)
class NetworkLimits:
    """Of one instance type: https://docs.aws.amazon.com/ec2/latest/instancetypes/gp.html (network specifications)."""

    interfaces: int
    ipv4: int
    """slots of one interface: its primary address, its secondary ones, and its prefixes"""
    ipv6: int


LIMITS = {"m5.metal": NetworkLimits(15, 50, 50), "t3.micro": NetworkLimits(2, 2, 2)}
WIDEST = NetworkLimits(15, 50, 50)
"""for an interface that is attached to nothing: no page gives a figure"""
MAX_GROUPS = 5
"""https://docs.aws.amazon.com/vpc/latest/userguide/amazon-vpc-limits.html (security groups per network interface)"""
PREFIX_LENGTH = 28
"""https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/ec2-prefix-eni.html"""


class EniState(StrEnum):
    """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_NetworkInterfaceAttachment.html"""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"


@dataclass
class EniAttachment:
    id: str
    instance: str
    index: int
    at: datetime
    state: EniState = EniState.ATTACHING
    due_s: float | None = None
    """when the state changes; None: nothing is due"""
    delete_on_termination: bool = False


@dataclass
class Interface:
    id: str
    subnet: str
    vpc: str
    zone: str
    mac: str
    addresses: list[str]
    """the first is the primary one, which never moves"""
    visible_s: float
    """before this it is unknown to every action but the one that made it"""
    description: str = ""
    groups: tuple[str, ...] = ()
    prefixes: list[str] = field(default_factory=list)
    ipv6: list[str] = field(default_factory=list)
    source_dest_check: bool = True
    tags: dict[str, str] = field(default_factory=dict)
    attachment: EniAttachment | None = None

    @property
    def status(self) -> str:
        """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_NetworkInterface.html"""
        if self.attachment is None:
            return "available"
        return "in-use" if self.attachment.state is EniState.ATTACHED else self.attachment.state.value

    @property
    def instance(self) -> str | None:
        """Where its frames go; None: nowhere."""
        there = self.attachment is not None and self.attachment.state is EniState.ATTACHED
        return self.attachment.instance if there and self.attachment else None

    def everything(self) -> Iterator[str]:
        """Yield its addresses, and its prefixes, as text."""
        yield from self.addresses
        yield from self.prefixes
        yield from self.ipv6

    def prefix_of(self, address: ipaddress.IPv4Address) -> str | None:
        """Return the delegated prefix that has ``address``."""
        return next((prefix for prefix in self.prefixes if address in ipaddress.IPv4Network(prefix)), None)


@dataclass
class Remap:
    """A secondary address on its way from one interface to another, or of IPv6 to its interface from none."""

    address: str
    target: str
    due_s: float
    """at this the data plane is asked; the address is the source's in every answer until that has been done"""
