"""What the controller asks of an agent, and what the agent says of its part in a migration.

===========================================  ===================================  ==========================
``GET  /v1/node``                            -> ``NodeReport``                    the same as a heartbeat
``POST /v1/evms/{name}/start``               ``StartOrder`` -> ``EvmReport``      boot under a fresh epoch
``POST /v1/evms/{name}/stop``                ``StopOrder`` -> ``EvmReport``       power button, then power off
``POST /v1/evms/{name}/retire``              ``RetireOrder`` -> ``EvmReport``     kill what is here, RETIRED(k)
``POST /v1/evms/{name}/volumes``             ``VolumesOrder`` -> ``EvmReport``    plug, unplug, grow
``GET  /v1/evms/{name}/console``             -> bytes                             until the machine ends
``POST /v1/evms/{name}/console``             bytes ->                             typed into the console
``POST /v1/migrations/{id}/prepare``         ``PrepareOrder`` -> ``Prepared``     target: a machine that waits
``POST /v1/migrations/{id}/handover``        ``HandoverOrder`` -> ``RoleStatus``  source: HANDOVER, then pre-copy
``POST /v1/migrations/{id}/abort``           ``AbortOrder`` -> ``RoleStatus``     either; answered once it is decided
``POST /v1/migrations/{id}/go``              ``GoOrder`` -> ``RoleStatus``        target: GO, by courier
``POST /v1/migrations/{id}/answer``          ``AnswerOrder`` -> ``RoleStatus``    source: the target's word, by courier
``POST /v1/migrations/{id}/lend``            ``LendOrder`` -> ``Lent``            source: relay volumes to the target
``POST /v1/migrations/{id}/take-back``       ``TakeBackOrder``                    source: end relays
``POST /v1/migrations/{id}/hold``            ``HoldOrder`` -> ``Relayed``         target: hold a relayed volume's I/O
``POST /v1/migrations/{id}/go-on``           ``GoOnOrder`` -> ``Relayed``         target: let it go on there
``POST /v1/migrations/{id}/address-moved``   ``AddressMovedOrder`` -> ``RoleStatus``  source: end the forwarding
``GET  /v1/migrations/{id}``                 -> ``RoleStatus``
``GET  /v1/migrations/{id}/watch``           -> SSE of ``RoleStatus``             a snapshot at each change, to the end
``POST /v1/agents/{node}/heartbeat``         ``NodeReport`` -> ``HeartbeatReply``  on the *controller*, by the agent
===========================================  ===================================  ==========================

Every order is idempotent under its epoch and migration id: the same order gets the same answer, an older epoch is
refused with ``stale_epoch``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from emp.model.base import Model
from emp.model.evm import EvmSpec
from emp.model.migration import Policy, Progress, Stage, WatchLine
from emp.model.names import Ip, Mac, Name
from emp.model.node import NodeReport
from emp.model.volume import Attachment, NbdEndpoint, RbdImage, Volume

PROTOCOL_VERSION = 1

WATCH_ALIVE_S = 2.0
"""an agent's stream of snapshots says something at least so often"""


class VolumeGrant(Model):
    """A volume as one node gets it: attached to it, or relayed by the node that has it."""

    volume: Volume
    attachment: Attachment | None = None
    relay: NbdEndpoint | None = None
    """where the source of a migration serves a volume that one node alone can have, until it can be moved"""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.attachment is None) == (self.relay is None):
            raise ValueError("a volume is either attached or relayed")
        return self

    @property
    def endpoint(self) -> NbdEndpoint | RbdImage | None:
        """Where the node reaches it; None: it is a device of the node itself."""
        return self.relay or (self.attachment.endpoint if self.attachment else None)


class StartOrder(Model):
    spec: EvmSpec
    epoch: int
    volumes: tuple[VolumeGrant, ...] = ()


class StopOrder(Model):
    epoch: int
    grace_s: float = Field(default=20.0, ge=0)
    """time that the guest gets to shut itself down after the power button; 0 = power off at once"""


class VolumesOrder(Model):
    """The volumes of an EVM that runs, from now on: what is missing is plugged, what is too much is unplugged."""

    epoch: int
    """of its owner"""
    spec: EvmSpec
    """its record to be; nothing but the volumes may differ"""
    grants: tuple[VolumeGrant, ...] = ()
    """of the volumes that are new, and of those that have grown"""
    in_use: bool = False
    """take a volume away although the guest is using it"""


class RetireOrder(Model):
    epoch: int


class Peer(Model):
    """The other end of a migration."""

    node: Name
    host: Ip
    link_port: int


class PrepareOrder(Model):
    migration: str
    spec: EvmSpec
    epoch: int
    """e_t, issued by the store for the target"""
    source: Peer
    volumes: tuple[VolumeGrant, ...] = ()
    multifd_channels: int = Field(default=1, ge=1, le=16)
    """both ends must have the same number, or QEMU waits for ever"""
    run_when_local: bool = False
    """the guest stands until no volume is relayed any more: the classic order"""


class Prepared(Model):
    """PREPARED is in the target's journal and its machine waits."""

    migration: str
    nonce: str
    stream_host: Ip
    stream_port: int


class LendOrder(Model):
    """To the source: serve these volumes, which are attached to it alone, to the target's relays."""

    migration: str
    evm: Name
    target: Name
    volumes: tuple[VolumeGrant, ...]
    """as they are attached to the source"""
    given: bool = False
    """the target owns the EVM already: its writes need not wait for GIVEN"""


class Lent(Model):
    endpoints: dict[str, NbdEndpoint]
    """volume -> where the source serves it, to the target's agent alone"""


class TakeBackOrder(Model):
    volumes: tuple[str, ...] | None = None
    """None: all that was lent for this migration"""


class HoldOrder(Model):
    evm: Name
    volume: str
    within_s: float = Field(default=5.0, gt=0, le=60)
    """for what is on its way to be answered"""


class GoOnOrder(Model):
    evm: Name
    epoch: int
    """e_t, to claim an attachment under"""
    grant: VolumeGrant
    """at the target's own attachment, which ends the relay, or again through the source"""


class Relayed(Model):
    """How a volume's relay at the target is, or was when it ended."""

    volume: str
    is_local: bool
    """the target has it itself"""
    is_flushed: bool = False
    """held: every acknowledged write is on the volume"""
    held_since_s: float | None = None
    """wall clock of the target"""
    read_bytes: int = 0
    written_bytes: int = 0
    round_trips: int = 0
    mean_ms: float | None = None
    """of a request through the source"""
    max_ms: float | None = None


class HandoverOrder(Model):
    migration: str
    evm: Name
    epoch_target: int
    epoch_source: int
    target: Peer
    prepared: Prepared
    policy: Policy


class AbortOrder(Model):
    reason: str
    source_is_back: bool = False
    """to the target, from the controller as courier: the source's OWN(e_s) has been seen"""
    wait_s: float = Field(default=0.0, ge=0, le=30)
    """how long the answer may wait for the decision: back on the source, or committed"""


class GoOrder(Model):
    """The source's GO, carried by the controller while the two agents cannot reach each other."""

    epoch: int
    """e_t"""
    nonce: str
    """p of the target's PREPARED"""


class AnswerOrder(Model):
    """The target's answer to GO, from its journal, carried by the controller."""

    word: str
    """``activated`` or ``withdrawn`` (``emp.migration.events.Word``)"""
    nonce: str


class AddressMovedOrder(Model):
    """To the source: the cloud sends what is for the EVM to the target now. What is on its way still comes here."""

    took_s: float


class HeartbeatReply(Model):
    interval_s: float
    quarantine: str | None = None
    """why the node must not act: its journal is behind what the controller remembers of it, or it is fenced"""
    allowed: dict[Name, tuple[Ip, ...]] = Field(default_factory=dict)
    """EVM of this node -> the addresses that it may use beside those that it declares"""
    elsewhere: dict[Mac, Name] | None = None
    """MAC -> the node that has it, of the EVMs of other nodes; None: the node need not know"""


class Role(StrEnum):
    SOURCE = "source"
    TARGET = "target"


class RolePhase(StrEnum):
    """Where an agent's part of a migration stands; the last four are final."""

    PREPARING = "preparing"
    PREPARED = "prepared"
    PRECOPY = "pre-copy"
    SWITCHOVER = "switchover"
    """the guest is paused, the commit not yet made"""
    GIVEN = "given"
    """source: committed"""
    ACTIVATED = "activated"
    """target: ACTIVATED is on disk"""
    ABORTING = "aborting"
    DONE = "done"
    """source: the target runs, nothing is left here"""
    RUNNING = "running"
    """target: the guest runs here"""
    ABORTED = "aborted"
    """source: runs here as before"""
    WITHDRAWN = "withdrawn"
    """target: cleared, it never ran here"""
    LOST = "lost"
    """this end's machine is gone and only a cold restart helps"""

    @property
    def final(self) -> bool:
        return self in (RolePhase.DONE, RolePhase.RUNNING, RolePhase.ABORTED, RolePhase.WITHDRAWN, RolePhase.LOST)


class RoleFigures(Model):
    """What one end measured. Times are the host's wall clock in seconds since the Unix epoch."""

    precopy_began_at_s: float | None = None
    stopped_at_s: float | None = None
    """source: QEMU's STOP"""
    given_at_s: float | None = None
    resumed_at_s: float | None = None
    """target: QEMU's RESUME (source, aborted: its own RESUME)"""
    port_open_at_s: float | None = None
    announced_at_s: float | None = None
    frames_held: int | None = None
    """source: came for the EVM between its stop here and the news that it runs on the target"""
    frames_forwarded: int | None = None
    """source: taken by the target in all"""
    frames_lost: int | None = None
    """source: since its stop here, without room in a queue at either end, or sent on and not taken"""
    connections_carried: int | None = None
    """source: of the EVM's connections that this node's connection tracking knew, told to the target"""
    clock_offset_ms: float | None = None
    """source: target's clock less the source's, as the link measured it"""
    clock_error_ms: float | None = None
    """source: half the round trip of that measurement"""
    qemu_total_ms: float | None = None
    qemu_downtime_ms: float | None = None
    sent_bytes: int | None = None
    passes: int | None = None
    dirty_bytes_per_s: float | None = None
    bandwidth_bytes_per_s: float | None = None


class RoleStatus(Model):
    """A snapshot of one end of a migration."""

    migration: str
    evm: Name
    role: Role
    phase: RolePhase
    stage: Stage
    committed: bool = False
    cause: str | None = None
    progress: Progress = Progress()
    figures: RoleFigures = RoleFigures()
    nonce: str | None = None
    wants_courier: bool = False
    """source: committed, and the target does not answer GO; target: loaded, and the source does not answer"""
    watch: tuple[WatchLine, ...] = ()
    """source: what is monitored while the migration runs"""


class LocalStatus(Model):
    """What the agent tells root on its node, at its local socket: ``GET /v1/status``."""

    node: NodeReport
    roles: tuple[RoleStatus, ...]
    """its part in migrations, those that have ended lately too"""
