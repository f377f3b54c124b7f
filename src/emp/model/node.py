"""A bare-metal node and what its agent reports of it."""

from __future__ import annotations

from pydantic import Field

from emp.model.base import Model
from emp.model.clock import GuestClock
from emp.model.evm import EvmState
from emp.model.names import Name
from emp.model.network import LearntAddress, Traffic


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
    images_without_pod_ipv6: tuple[str, ...] = ()
    """of those, the ones whose pods have IPv4 addresses alone"""


class EvmReport(Model):
    """One EVM as an agent finds it on its node."""

    name: Name
    state: EvmState
    epoch: int
    reason: str | None = None
    migration: str | None = None
    qemu_pid: int | None = None
    learnt: tuple[LearntAddress, ...] = ()
    """addresses that it does not declare, and that it uses with the controller's leave"""
    asked: tuple[LearntAddress, ...] = ()
    """such as its guest was heard to use, without leave: what it sends from them is dropped"""
    traffic: Traffic | None = None
    mtu_bytes: int | None = None
    """of its taps, the smallest"""
    clock: GuestClock | None = None
    """None: not looked at since the guest last began to run here"""


class OpenRole(Model):
    """This node's part in a migration that is not over here."""

    migration: str
    evm: Name
    role: str
    """``source`` or ``target``"""
    phase: str
    epoch: int
    """source: the epoch that it owns; target: e_t"""


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
    journal_id: str = ""
    journal_seq: int = 0
    """highest record number: a journal that comes back with another id, or behind this, is quarantined"""
    open_roles: tuple[OpenRole, ...] = ()
    mtu_bytes: int | None = None
    """what a frame to or from an EVM may carry here; None: not known"""
    is_overlay: bool = False
    """it must be told where other nodes' EVMs are"""
    no_ipv6: str | None = None
    """why it takes no EVM with IPv6 addresses; None: it does, or its agent is of before this was told"""
    lending: tuple[str, ...] = ()
    """migrations for whose target this node relays a volume"""


class Fence(Model):
    """Proof that a node runs nothing of the pool's, or reaches no volume and no address of it (rule R8)."""

    driver: str
    """``lab``, ``ec2``, or ``manual``: a person has sworn to it"""
    by: str
    at_s: float
    """seconds since the Unix epoch, for people only"""
    boot_id: str = ""
    """of the agent process that it ended: a report of that one is a late word of the dead"""
    retire: dict[Name, int] = Field(default_factory=dict)
    """EVM -> k, for each that was taken from the node meanwhile: the fence is lifted once its agent has RETIRED(k)"""


class Node(Model):
    """The controller's record of a node."""

    report: NodeReport
    cordoned: bool = False
    last_seen_at: float = Field(default=0.0)
    """seconds since the Unix epoch, for people only"""
    ready: bool = True
    """false once heartbeats have stopped"""
    fence: Fence | None = None
    """it is fenced: lifted once its agent has written RETIRED for every EVM that was started elsewhere"""
    journal_id: str = ""
    journal_seq: int = 0
    """the highest that this node has ever reported"""
    quarantine: str | None = None
    """why it takes no orders: its journal is not the one it had; a person decides (``emp node readmit``)"""

    @property
    def name(self) -> str:
        return self.report.name
