"""The settings of the simulated cloud's daemon: those of the pool's volume service, and a cloud's own."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

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


class EfsService(Model):
    """EFS, with NFS servers at addresses of their own."""

    program: Path
    """where nfs-ganesha was unpacked (``emp.lab.nfs_program``)"""
    interface: str = "eth0"
    """that gets the mount targets' addresses"""
    subnets: dict[str, str] = Field(min_length=1)
    """zone -> block for the addresses of its mount targets"""
    clients: str
    """block that the default security group lets in"""


class CloudConfig(Config):
    access_key: str = Field(pattern=r"^[A-Z0-9]{16,128}$")
    """the key id that callers sign with"""
    nodes: dict[Name, Node] = Field(min_length=1)
    efs: EfsService | None = None
    knobs: Knobs = Knobs()
    """at its first start; later it goes by what it was set to"""

    @model_validator(mode="after")
    def _instances_differ(self) -> CloudConfig:
        named = [node.instance for node in self.nodes.values()]
        if len(set(named)) < len(named):
            raise ValueError("two nodes have the same instance")
        zones = {node.zone for node in self.nodes.values()}
        if self.efs is not None and (missing := zones - self.efs.subnets.keys()):
            raise ValueError(f"efs.subnets has no block for {', '.join(sorted(missing))}")
        return self
