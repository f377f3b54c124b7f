"""The settings of the simulated cloud's daemon: those of the pool's volume service, and a cloud's own."""

from __future__ import annotations

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


class CloudConfig(Config):
    access_key: str = Field(pattern=r"^[A-Z0-9]{16,128}$")
    """the key id that callers sign with"""
    nodes: dict[Name, Node] = Field(min_length=1)
    knobs: Knobs = Knobs()
    """at its first start; later it goes by what it was set to"""

    @model_validator(mode="after")
    def _instances_differ(self) -> CloudConfig:
        named = [node.instance for node in self.nodes.values()]
        if len(set(named)) < len(named):
            raise ValueError("two nodes have the same instance")
        return self
