"""What an agent is told at its start: one JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from emp.model.base import Model
from emp.model.names import Ip, Name, SizeBytes


class VxlanConfig(Model):
    """Of ``l2`` between nodes that reach each other by IP alone."""

    id: int = Field(ge=1, lt=1 << 24)
    peers: dict[Name, Ip]
    """the pool's nodes and their addresses on the underlay; this one may be among them"""


class NetworkConfig(Model):
    driver: str = "l2"
    bridge: str = "br0"
    uplink: str = "eth0"
    vlan: int | None = Field(default=None, ge=1, le=4094)
    """the VLAN of the uplink that the EVMs are in; None: untagged"""
    vxlan: VxlanConfig | None = None
    """the EVMs' segment lies over the uplink's network, not in it"""

    @model_validator(mode="after")
    def _one_at_most(self) -> Self:
        if self.vlan is not None and self.vxlan is not None:
            raise ValueError("vlan and vxlan exclude each other: an overlay has no VLAN of the uplink")
        return self


class NvmeDevices(Model):
    """Volumes are NVMe devices of this machine, as on an AWS instance of bare metal."""

    driver: Literal["nvme"] = "nvme"


class ServiceDevices(Model):
    """The volume service says what it has attached to this node (``emp.volumes.devices``)."""

    driver: Literal["service"]
    url: str
    server_name: str = "volumes-main"
    """the common name of its certificate"""


class AgentConfig(Model):
    pool: Name
    node: Name
    address: Ip
    """of this node on the pool's network; API, link and migration streams listen here only"""
    port: int = Field(default=7443, ge=0, le=65535)
    link_port: int = Field(default=7444, ge=0, le=65535)
    controller_url: str
    controller_name: str = "controller-main"
    credentials: Path
    """directory with this agent's certificate (``agent-<node>``)"""
    qemu_credentials: Path
    """directory with the certificate of this node's QEMU processes (``qemu-<node>``)"""
    state_dir: Path = Path("/var/lib/emp")
    run_dir: Path = Path("/run/emp")
    images_dir: Path = Path("/var/lib/emp/images")
    memory_bytes: SizeBytes
    """what this node offers to EVMs"""
    vcpus: int = Field(ge=1)
    network: NetworkConfig = NetworkConfig()
    devices: NvmeDevices | ServiceDevices = Field(default=NvmeDevices(), discriminator="driver")
    """how an attached volume is found that names no endpoint"""
    qemu: Path | None = None
    """another QEMU than the one on PATH"""
