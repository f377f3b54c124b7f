"""The settings of the simulated cloud's daemon: those of the pool's volume service, and a cloud's own."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from emp.lab.cloud.knobs import Knobs
from emp.lab.cloud.records import MAX_VOLUMES
from emp.model.base import Model
from emp.model.names import Name
from emp.volumes.server.config import Config


class Node(Model):
    """One bare-metal instance."""

    instance: str = Field(pattern=r"^i-[0-9a-f]{17}$")
    zone: str = Field(min_length=1)
    max_volumes: int = Field(default=MAX_VOLUMES, ge=1)
    more_addresses: tuple[str, ...] = ()
    """of its other network interfaces, one each"""
    source_dest_check: bool = True
    """of its network interfaces, at first"""
    segment: str | None = None
    """the fabric's interface to it, where the cloud routes"""
    address: str | None = None
    """of its primary network interface; None, or where the cloud has no network: it has none"""
    ipv6: str | None = None
    """as ``address``"""

    _address_is_one = field_validator("address")(lambda text: text and str(ipaddress.IPv4Address(text)))


class Segment(Model):
    """The network that every node stands on. A subnet of each zone has all of it: a lab has one segment."""

    cidr: str
    picks: dict[str, str] = Field(min_length=1)
    """zone -> block that the cloud takes an address from where none is named"""
    ipv6: str | None = None

    _blocks_are_some = field_validator("cidr")(lambda text: str(ipaddress.IPv4Network(text)))


class EfsService(Model):
    """EFS, with NFS servers at addresses of their own."""

    program: Path
    """where nfs-ganesha was unpacked (``emp.lab.nfs_program``)"""
    interface: str = "eth0"
    """that gets the mount targets' addresses"""


class CloudConfig(Config):
    access_key: str = Field(pattern=r"^[A-Z0-9]{16,128}$")
    """the key id that callers sign with"""
    nodes: dict[Name, Node] = Field(min_length=1)
    network: Segment | None = None
    """None: there are no subnets, and no network interfaces"""
    fabric_fd: int | None = Field(default=None, ge=3)
    """a descriptor of the fabric's network namespace, for the cloud to route in; None: nothing is routed"""
    efs: EfsService | None = None
    knobs: Knobs = Knobs()
    """at its first start; later it goes by what it was set to"""

    @model_validator(mode="after")
    def _instances_differ(self) -> CloudConfig:
        named = [node.instance for node in self.nodes.values()]
        if len(set(named)) < len(named):
            raise ValueError("two nodes have the same instance")
        return self

    @model_validator(mode="after")
    def _zones_have_subnets(self) -> CloudConfig:
        zones = {node.zone for node in self.nodes.values()}
        if self.network is not None and (missing := zones - self.network.picks.keys()):
            raise ValueError(f"network.picks has no block for {', '.join(sorted(missing))}")
        if self.network is None and self.efs is not None:
            raise ValueError("efs needs a network")
        return self
