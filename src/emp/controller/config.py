"""The controller's configuration: one JSON file, checked before anything is opened.

::

    {"pool": "prod", "address": "10.77.0.1", "port": 7701,
     "people": {"host": "10.77.0.1", "port": 7700},
     "credentials": "/etc/emp/controller", "state_dir": "/var/lib/emp", "token_file": "/etc/emp/token",
     "network": {"subnet": "10.77.0.0/16", "evm_first": "10.77.1.0", "evm_last": "10.77.250.255"},
     "volumes": {"driver": "nbd", "url": "https://10.77.0.2:7800", "server_name": "volumes-main"},
     "fencing": {"driver": "lab", "url": "https://10.77.0.3:7801", "server_name": "power-main"}}

``address`` and ``port`` are the agents' (mutual TLS). ``people`` may be ``{"fd": N}``: a listening socket that the
parent hands over. On AWS ``volumes`` is ``{"driver": "ebs", "region": "eu-west-1", "zone": "eu-west-1a", "instances":
{"n1": "i-..."}}``, and where the VPC routes to the EVMs ``network`` has ``"vpc": {"region": "eu-west-1", "instances":
{"n1": "i-..."}}``. ``fencing`` is ``{"driver": "manual"}`` where it is left out. The token file is written with a fresh
token when it is not there.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from emp.model.base import Model
from emp.model.names import Ip, Name


class People(Model):
    """Where people connect: a descriptor that is listening already, or an address."""

    fd: int | None = Field(default=None, ge=3)
    host: Ip | None = None
    port: int | None = Field(default=None, ge=0, le=65535)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.fd is None) == (self.host is None or self.port is None):
            raise ValueError('write either {"fd": N} or {"host": ADDRESS, "port": PORT}')
        return self


class VpcSettings(Model):
    """A VPC of Amazon, or of a cloud that speaks EC2's API: it routes each address to the interface that has it."""

    region: str = Field(pattern=r"^[a-z0-9-]+$")
    instances: dict[Name, Annotated[str, Field(pattern=r"^i-([0-9a-f]{8}|[0-9a-f]{17})$")]] = Field(min_length=1)
    """node -> instance id"""
    interfaces: dict[Name, tuple[str, ...]] = Field(default_factory=dict)
    """node -> ids of the network interfaces that addresses of EVMs may be given to, in the order to fill them; a node
    that is left out uses every interface of its instance"""
    endpoint_url: str | None = None
    ca_file: Path | None = None
    """who vouches for an endpoint that is not Amazon's"""
    credentials_file: Path | None = None
    """as of the AWS tools; None: where boto3 finds them, such as the instance's role"""


class Ipv6Subnet(Model):
    """The subnet's IPv6 block, and the part of it that the pool hands out."""

    subnet: str
    evms: str
    """a block of ``subnet``, of at most 96 bits: a chosen address ends with the IPv4 address beside it"""

    @property
    def block(self) -> ipaddress.IPv6Network:
        return ipaddress.IPv6Network(self.subnet)

    @property
    def handed_out(self) -> ipaddress.IPv6Network:
        return ipaddress.IPv6Network(self.evms)

    def hands_out(self, ip: ipaddress.IPv6Address) -> bool:
        """Whether the address is one for EVMs."""
        return ip in self.handed_out and ip != self.handed_out.network_address

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.handed_out.subnet_of(self.block) or self.handed_out.prefixlen > 96:
            raise ValueError(f"evms must be a block of {self.block}, with a prefix of at most 96 bits")
        return self


class Network(Model):
    """The subnet that EVMs live in, and the part of it that the pool hands out."""

    subnet: str
    evm_first: Ip
    evm_last: Ip
    vpc: VpcSettings | None = None
    """None: the nodes share a segment, on which they announce what runs there"""
    ipv6: Ipv6Subnet | None = None
    """None: EVMs are given no IPv6 addresses"""
    learn_ipv6: tuple[str, ...] = ()
    """IPv6 networks of the segment, in which guests may take addresses by themselves (SLAAC, DHCPv6)"""

    @property
    def block(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.subnet)

    @property
    def first(self) -> ipaddress.IPv4Address:
        return ipaddress.IPv4Address(self.evm_first)

    @property
    def last(self) -> ipaddress.IPv4Address:
        return ipaddress.IPv4Address(self.evm_last)

    @property
    def six(self) -> tuple[ipaddress.IPv6Network, ...]:
        return tuple(ipaddress.IPv6Network(block) for block in self.learn_ipv6)

    def hands_out(self, ip: ipaddress.IPv4Address) -> bool:
        """Whether the address is one for EVMs."""
        is_host = ip not in (self.block.network_address, self.block.broadcast_address)
        return self.first <= ip <= self.last and is_host

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        block, _ = self.block, self.six
        if block.prefixlen < 8:
            raise ValueError(f"{block} is too wide: a MAC address is made of an address's last 24 bits")
        if not (self.first in block and self.last in block and self.first <= self.last):
            raise ValueError(f"evm_first to evm_last must be a range inside {block}")
        return self


class NbdVolumes(Model):
    """The pool's own volume service."""

    driver: Literal["nbd"]
    url: str
    server_name: str
    """the common name of its certificate"""


class EbsVolumes(Model):
    """Amazon EBS, or a cloud that speaks its API."""

    driver: Literal["ebs"]
    region: str = Field(pattern=r"^[a-z0-9-]+$")
    zone: str
    """where new volumes are made"""
    instances: dict[Name, Annotated[str, Field(pattern=r"^i-([0-9a-f]{8}|[0-9a-f]{17})$")]] = Field(min_length=1)
    """node -> instance id"""
    endpoint_url: str | None = None
    ca_file: Path | None = None
    """who vouches for an endpoint that is not Amazon's"""
    credentials_file: Path | None = None
    """as of the AWS tools; None: where boto3 finds them, such as the instance's role"""


class ManualFencing(Model):
    driver: Literal["manual"] = "manual"


class LabFencing(Model):
    driver: Literal["lab"]
    url: str
    server_name: str = "power-main"
    """the common name of the switch's certificate"""


class Ec2Fencing(Model):
    driver: Literal["ec2"]
    region: str
    instances: dict[Name, str]
    """node -> instance id"""


class EfsSettings(Model):
    """EFS of Amazon, or of a cloud that speaks its API."""

    region: str = Field(pattern=r"^[a-z0-9-]+$")
    instances: dict[Name, str] = Field(min_length=1)
    """node -> instance id"""
    endpoint_url: str | None = None
    ca_file: Path | None = None
    """who vouches for an endpoint that is not Amazon's"""
    credentials_file: Path | None = None
    """as of the AWS tools; None: where boto3 finds them, such as the instance's role"""


class Config(Model):
    pool: Name
    address: Ip
    port: int = Field(ge=0, le=65535)
    people: People
    credentials: Path
    state_dir: Path
    token_file: Path
    network: Network
    volumes: NbdVolumes | EbsVolumes = Field(discriminator="driver")
    fencing: ManualFencing | LabFencing | Ec2Fencing = Field(default=ManualFencing(), discriminator="driver")
    """how a node is proven off"""
    efs: EfsSettings | None = None
    """None: EVMs of this pool mount no EFS"""
    heartbeat_s: float = Field(default=1.0, gt=0, le=60)
    """how often agents report"""
    node_down_s: float = Field(default=3.5, gt=0, le=600)
    """silence after which a node counts as down"""
    history_revisions: int = Field(default=100_000, ge=100)
    """how many changes back a watch can go on from"""

    @model_validator(mode="after")
    def _beats_before_down(self) -> Self:
        if self.node_down_s <= self.heartbeat_s:
            raise ValueError("node_down_s must be longer than heartbeat_s")
        return self
