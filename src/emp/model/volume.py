"""A volume and its attachments."""

from __future__ import annotations

from enum import StrEnum

from emp.model.base import Model
from emp.model.names import Name, SizeBytes


class VolumeType(StrEnum):
    """What kinds of volume there are. A multi-attach one is attached to the target in the source brownout."""

    IO2 = "io2"
    IO1 = "io1"
    GP3 = "gp3"
    GP2 = "gp2"
    SHARED = "shared"
    """storage that every node reaches by one URL: nothing is attached or detached, and nobody can be shut out"""

    @property
    def multi_attach(self) -> bool:
        return self in (VolumeType.IO2, VolumeType.IO1, VolumeType.SHARED)

    @property
    def fenceable(self) -> bool:
        """Whether its service can shut out a node that does not let go by itself (``VolumeDriver.fence``)."""
        return self is not VolumeType.SHARED


class NbdEndpoint(Model):
    """Where a node reaches an attached volume: an NBD export under TLS that only this node may open."""

    host: str
    port: int
    export: str
    tls_hostname: str
    """The name that the server's certificate must carry."""


class RbdImage(Model):
    """An image of a Ceph cluster, reached by every node with the cluster's own configuration and keys."""

    pool: str
    image: str
    namespace: str | None = None
    user: str | None = None
    """None: librados' default, ``admin``"""
    conf: str | None = None
    """path of the cluster's configuration on each node; None: librados' default, ``/etc/ceph/ceph.conf``"""


class HostDevice(Model):
    """A block device of the node itself, found by its serial (``emp.volumes.base.DeviceResolver``)."""

    path: str
    """such as ``/dev/nvme1n1``; good until the volume is detached, so resolve anew for each use"""
    serial: str
    size_bytes: SizeBytes


class ClaimPoint(Model):
    """Where a node says under which epoch it holds its attachment now (``VolumeClaims``)."""

    url: str
    server_name: str
    """the common name of the service's certificate"""


class Attachment(Model):
    """One volume opened to one node. ``epoch`` names it for good; ``claimed`` rises with what its node claims."""

    volume: str
    node: Name
    epoch: int
    """of the owner that it was opened for"""
    endpoint: NbdEndpoint | RbdImage | None = None
    """None: the node finds the device by the volume's serial (``emp.volumes.base.DeviceResolver``)"""
    claimed: int = 0
    """the newest epoch that its node has claimed it under since; 0: none"""
    claim: ClaimPoint | None = None
    """None: the service knows no claims"""

    @property
    def tag(self) -> int:
        """The epoch that a fence is measured against."""
        return max(self.epoch, self.claimed)


class VolumeState(StrEnum):
    """How a volume stands, worked out of the records for each answer."""

    AVAILABLE = "available"
    """no EVM has it"""
    IDLE = "idle"
    """an EVM has it, and no node: the EVM does not run"""
    IN_USE = "in-use"
    """attached"""
    MOVING = "moving"
    """its EVM is being migrated"""
    RELAYED = "relayed"
    """its EVM runs on one node, and it is attached to the one before, which relays"""
    DELETING = "deleting"
    ERROR = "error"
    """its service says that it cannot be used, or does not know it any more"""


class MoveOrder(StrEnum):
    """In what order a volume goes over with its EVM."""

    MULTI_ATTACH = "multi-attach"
    """attached to the target beforehand, detached from the source afterwards"""
    RELAY = "relay"
    """the guest resumes with its I/O relayed; detached and attached after that"""
    CLASSIC = "classic"
    """detached and attached in the blackout"""
    SHARED = "shared"
    """nothing to attach or detach"""


class Handover(Model):
    """How a volume went over to another node. Figures are None where they were not measured."""

    migration: str
    order: MoveOrder
    source: Name
    target: Name
    began_at: float
    """seconds since the Unix epoch, for people only"""
    ended_at: float | None = None
    """None: it is not over"""
    io_stall_ms: float | None = None
    """the longest that the guest's I/O on it stood still for the move"""
    detach_ms: float | None = None
    attach_ms: float | None = None
    relayed_bytes: int | None = None
    """read and written by way of the source"""
    relayed_since: float | None = None
    """as ``began_at``: since when the guest has used it by way of the source"""
    relayed_s: float | None = None
    tries: int = 1
    """above 1: an earlier one failed, and the relay went on"""
    alarm: str | None = None
    """why it is being tried again"""
    broken_off: bool = False
    """it did not go over: the migration was aborted, or the EVM ended meanwhile"""


class Volume(Model):
    """A volume's record. ``serial`` is what the guest sees at its disk and what is checked before use."""

    id: str
    type: VolumeType
    size_bytes: SizeBytes
    serial: str
    image: Name | None = None
    """what it was made from; None: it began with zeros"""
    evm: Name | None = None
    attachments: tuple[Attachment, ...] = ()
    url: str | None = None
    """of storage that every node reaches (type ``shared``)"""
    fault: str | None = None
    """why it cannot be used, by its service's last word"""
    handover: Handover | None = None
    """the last one, or the one under way"""
    state: VolumeState | None = None
    """in answers of the REST API; None in records, which it is worked out of"""
    driver: str | None = None
    """as ``state``"""
