"""A bare-metal node and what its agent reports of it."""

from __future__ import annotations

from pydantic import Field

from emp.model.base import Model
from emp.model.evm import EvmState
from emp.model.names import Name


class Versions(Model):
    """What must fit together on both ends of a migration."""

    emp: str
    protocol: int
    """of the switchover between agents; both ends must agree"""
    qemu: str
    machines: tuple[str, ...]
    """versioned machine types that this QEMU knows"""
    cpu_models: tuple[str, ...]
    """named models that run here under ``accelerator`` with every feature they name"""
    accelerator: str
    """``kvm`` or ``tcg``"""
    images: dict[str, str]
    """image name -> digest, of what lies ready on this node"""


class EvmReport(Model):
    """One EVM as an agent finds it on its node."""

    name: Name
    state: EvmState
    epoch: int
    reason: str | None = None
    migration: str | None = None
    qemu_pid: int | None = None


class NodeReport(Model):
    """What an agent sends with each heartbeat."""

    name: Name
    address: str
    """of the agent's API, on the pool's network"""
    port: int
    link_port: int
    """of the agent's switchover link, which only peers of a migration use"""
    memory_bytes: int
    """what the node offers to EVMs"""
    memory_used_bytes: int
    vcpus: int
    versions: Versions
    evms: tuple[EvmReport, ...] = ()
    boot_id: str
    """of this agent process: a new one means that the agent was restarted"""
    journal: str | None = None
    """why the journal cannot be trusted, if it cannot"""


class Node(Model):
    """The controller's record of a node."""

    report: NodeReport
    cordoned: bool = False
    last_seen_at: float = Field(default=0.0)
    """seconds since the Unix epoch, for people only"""
    ready: bool = True
    """false once heartbeats have stopped"""

    @property
    def name(self) -> str:
        return self.report.name
