"""A migration: what was asked, how it goes, and the report that is left of it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from emp.model.addresses import AddressMove
from emp.model.base import Model
from emp.model.clock import GuestClock
from emp.model.names import Name
from emp.model.volume import VolumeType


class Stage(StrEnum):
    """The three stages, by the same names in code, API, logs and reports."""

    PREPARATION = "preparation"
    """plan, pre-flight, target made ready: nothing has been copied"""
    SOURCE_BROWNOUT = "source-brownout"
    """pre-copy: memory is copied while the EVM runs on the source"""
    BLACKOUT = "blackout"
    """the EVM is paused: last pages and CPU state, commit, resume on the target"""
    TARGET_BROWNOUT = "target-brownout"
    """the EVM runs on the target: addresses and volumes are finalised, the source is cleared"""
    CLOSED = "closed"


class Outcome(StrEnum):
    COMPLETED = "completed"
    """runs on the target"""
    ABORTED = "aborted"
    """runs on the source, as before"""
    LOST = "lost"
    """neither copy could go on; the EVM needs a cold restart"""


class VolumeOrder(StrEnum):
    """When a volume that one node alone can have is detached from the source and attached to the target."""

    RESUME_FIRST = "resume-first"
    """in the target brownout: the guest runs, and reaches it through the source until then"""
    CLASSIC = "classic"
    """in the blackout: the guest stands meanwhile, and the controller is needed for it to go on"""


class Policy(Model):
    """What a user allows a migration to cost."""

    max_blackout_ms: int = Field(default=30, ge=1, le=60_000)
    """forecast pause above which QEMU is not let into the switchover (its ``downtime-limit``)"""
    deadline_s: float = Field(default=900.0, gt=0)
    """source brownout longer than this is aborted"""
    max_bandwidth_bytes_per_s: int = Field(default=0, ge=0)
    """0 = uncapped"""
    multifd_channels: int = Field(default=1, ge=1, le=16)
    blackout_deadline_s: float = Field(default=10.0, gt=0)
    """a blackout that has not committed by then is aborted"""
    guard_margin_s: float = Field(default=2.0, ge=0.5)
    """time beyond ``blackout_deadline_s`` after which a process of its own cancels what a dead agent does not"""
    no_convergence_passes: int = Field(default=10, ge=1)
    """passes in a row, at the longest pause allowed, in which the guest dirties memory about as fast as it is sent"""
    stall_s: float = Field(default=10.0, ge=1)
    """time without a byte sent"""
    slow_stream_s: float = Field(default=30.0, ge=1)
    """time with less bandwidth than it takes to send what is left before the deadline"""
    target_silence_s: float = Field(default=2.0, ge=1)
    """silence of the target's agent on the connection between the two agents, which says something 4 times a second"""
    target_qemu_s: float = Field(default=10.0, ge=1)
    """time without an answer from the QEMU that waits on the target"""
    target_volume_s: float = Field(default=10.0, ge=1)
    """time without a read of each of its volumes from the target"""
    forward_quiet_s: float = Field(default=0.3, ge=0)
    """time without a frame for the EVM on the source, once the network has moved, after which it forwards no more"""
    forward_most_s: float = Field(default=5.0, gt=0)
    """the source forwards no longer than this, counted from when it knows that the EVM runs on the target"""
    forward_reassign_most_s: float = Field(default=600.0, gt=0)
    """in the stead of ``forward_most_s`` where a cloud reassigns the addresses, which the controller sees to"""
    target_free_memory_bytes: int = Field(default=128 << 20, ge=0)
    """memory that the target's host must keep available"""
    volume_order: VolumeOrder = VolumeOrder.RESUME_FIRST
    source_must_be_empty: bool = False
    """a volume whose move is refused waits, its I/O with it, rather than stay with the source until the next try"""


class MigrationRequest(Model):
    """Body of ``POST /v1/evms/{name}/migrations``."""

    target: Name | None = None
    """None: placement picks, and says why"""
    policy: Policy = Policy()
    dry_run: bool = False
    """plan and pre-flight only"""


class Progress(Model):
    """How the pre-copy goes, as of the last look at QEMU (five a second)."""

    memory_bytes: int = 0
    remaining_bytes: int = 0
    sent_bytes: int = 0
    dirty_bytes_per_s: float = 0.0
    bandwidth_bytes_per_s: float = 0.0
    passes: int = 0
    eta_s: float | None = None
    """until the blackout; None where pre-copy does not converge at these rates, or nothing is known yet"""


class WatchLine(Model):
    """One thing that is monitored while a migration runs: its threshold, the worst that was seen, and the verdict."""

    check: str
    """such as ``convergence``, ``deadline``, ``target-agent`` (``emp.migration.watch.Check``)"""
    threshold: str
    """from the policy, with its unit, for people"""
    worst: str | None = None
    """None: never measured"""
    ok: bool = True


class StageTimes(Model):
    source_brownout_s: float | None = None
    blackout_ms: float | None = None
    """from the source's STOP until the target both runs and has its port open"""
    target_brownout_s: float | None = None


class VolumeMove(Model):
    """How a volume that one node alone can have was moved."""

    volume: str
    held_ms: float | None = None
    """how long the guest's I/O on it was held, by the controller's clock; what the cloud took is in it"""
    hold_s: float | None = None
    """of that: until all that was on its way was answered and flushed, and the source's relay had ended; None, as in
    the next: it was not attached to the source any more"""
    detach_s: float | None = None
    attach_s: float | None = None
    land_s: float | None = None
    """until the target's machine had it itself; the guest's I/O goes on before that"""
    tries: int = 1
    read_bytes: int = 0
    """through the relay, as are the next three"""
    written_bytes: int = 0
    mean_ms: float | None = None
    """of a request"""
    max_ms: float | None = None
    """holding is in it"""


class MoveStep(StrEnum):
    """Where a volume is that one node alone can have, once its EVM runs on the target."""

    RELAYED = "relayed"
    """in use by way of the source"""
    HOLD = "hold"
    """from here on the guest's I/O on it waits: for what is on its way to be answered"""
    DETACH = "detach"
    ATTACH = "attach"
    LAND = "land"
    """the target's machine gets it itself"""


class VolumeStep(Model):
    """A volume that is on its way to the target, for people who look on."""

    volume: str
    type: VolumeType
    step: MoveStep
    held_since: float | None = None
    """seconds since the Unix epoch: since when its I/O waits"""
    expected_ms: float | None = None
    """what detach and attach usually take; None: nobody knows"""


class Report(Model):
    """What is left of a migration. Figures are None where the stage was not reached."""

    stages: StageTimes = StageTimes()
    vcpu_pause_ms: float | None = None
    """from the source's STOP to the target's RESUME, by the hosts' wall clocks"""
    resumed_at_s: float | None = None
    """the target's RESUME by the source's clock, in seconds since the Unix epoch"""
    clock_error_ms: float | None = None
    """how far the two hosts' clocks may disagree in the two figures above (half the link's round trip)"""
    qemu_downtime_ms: float | None = None
    qemu_total_ms: float | None = None
    memory_bytes: int | None = None
    sent_bytes: int | None = None
    passes: int | None = None
    dirty_bytes_per_s: float | None = None
    bandwidth_bytes_per_s: float | None = None
    abort_pause_ms: float | None = None
    """how long the guest stood still because of a switchover that was aborted"""
    watch: tuple[WatchLine, ...] = ()
    frames_held: int | None = None
    """came for the EVM between its stop on the source and the news that it runs on the target"""
    frames_forwarded: int | None = None
    """sent on from the source, and taken by the target, in all"""
    frames_lost: int | None = None
    """of those that came to the source since its stop: no queue had room for them, or the target has not taken them"""
    connections_carried: int | None = None
    """known to the source's connection tracking, and so to the target's; 0: nothing there asks for their state"""
    commit_ms: float | None = None
    """from GIVEN on the source's disk to the target's running guest"""
    volumes: tuple[VolumeMove, ...] = ()
    """those that one node alone can have, and that were moved"""
    addresses: AddressMove | None = None
    """None: they were announced, as the nodes share a segment; or they have not moved"""
    clock: GuestClock | None = None
    """None: its node had not told yet when the migration was closed; ``emp evm show`` has it"""


class Check(Model):
    """One line of pre-flight or placement."""

    name: str
    ok: bool
    message: str


class Migration(Model):
    """The controller's record of one migration."""

    id: str
    evm: Name
    source: Name
    target: Name
    epoch_target: int
    """issued for the target's ownership, should it come to that"""
    epoch_source: int
    """issued for the way back to the source"""
    policy: Policy = Policy()
    stage: Stage = Stage.PREPARATION
    outcome: Outcome | None = None
    cause: str | None = None
    """why it was aborted or lost"""
    hint: str | None = None
    committed: bool = False
    """GIVEN is known to be on the source's disk: it only goes forward"""
    addresses_ordered: bool = False
    """a cloud may have been told that the target has the EVM's addresses: should it go back, it is told otherwise"""
    abort_asked: str | None = None
    """who asked for an abort, while it is under way"""
    placement: str | None = None
    """why this target"""
    checks: tuple[Check, ...] = ()
    progress: Progress = Progress()
    moving: tuple[VolumeStep, ...] = ()
    """volumes that are on their way; as ``progress``, only shown"""
    report: Report = Report()
    nonce: str | None = None
    """of the target's PREPARED record"""
    dry_run: bool = False
    created_at: float = 0.0
    """seconds since the Unix epoch, for people only"""
    ended_at: float | None = None
