"""Where each role of a migration stands. Frozen values: ``step`` makes the next one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from emp.migration.records import Record, RecordKind
from emp.model.migration import Stage
from emp.model.orders import RolePhase


class SourcePhase(StrEnum):
    BEGUN = "begun"
    """HANDOVER is being written"""
    PRECOPY = "pre-copy"
    SWITCHOVER = "switchover"
    """the guest is paused; waits for both ends to have everything"""
    GIVING = "giving"
    """GIVEN is being written: nobody can say any more that it is not on disk"""
    GIVEN = "given"
    """committed; GO is repeated until the target answers"""
    CLEARING = "clearing"
    """the target runs: DONE is being written"""
    DISMANTLING = "dismantling"
    """DONE is on disk: the machine goes"""
    ASKING = "asking"
    """the agent came back to a stream that is complete, before the commit: it asks the target, if that answers"""
    OVERRULED = "overruled"
    """the target has GO, and this journal has lost GIVEN: this copy never runs, unless the target withdraws"""
    CANCELLING = "cancelling"
    """the stream is being torn down"""
    RETURNING = "returning"
    """OWN(e_s) is being written"""
    RESUMING = "resuming"
    """waits for the guest to run here again"""
    DONE = "done"
    ABORTED = "aborted"
    LOST = "lost"
    """the machine is gone: only a cold restart helps"""
    STUCK = "stuck"
    """OWN(e_s) cannot be written; a paused guest waits for that, or for the target's WITHDRAWN (rule R10)"""
    RETIRING = "retiring"
    """RETIRE(k) has come: the machine is being killed"""


_SOURCE_SHOWN = {
    SourcePhase.BEGUN: (RolePhase.PREPARING, Stage.PREPARATION),
    SourcePhase.PRECOPY: (RolePhase.PRECOPY, Stage.SOURCE_BROWNOUT),
    SourcePhase.SWITCHOVER: (RolePhase.SWITCHOVER, Stage.BLACKOUT),
    SourcePhase.GIVING: (RolePhase.SWITCHOVER, Stage.BLACKOUT),
    SourcePhase.GIVEN: (RolePhase.GIVEN, Stage.BLACKOUT),
    SourcePhase.CLEARING: (RolePhase.GIVEN, Stage.TARGET_BROWNOUT),
    SourcePhase.DISMANTLING: (RolePhase.GIVEN, Stage.TARGET_BROWNOUT),
    SourcePhase.ASKING: (RolePhase.ABORTING, Stage.BLACKOUT),
    SourcePhase.OVERRULED: (RolePhase.GIVEN, Stage.BLACKOUT),
    SourcePhase.CANCELLING: (RolePhase.ABORTING, Stage.SOURCE_BROWNOUT),
    SourcePhase.RETURNING: (RolePhase.ABORTING, Stage.SOURCE_BROWNOUT),
    SourcePhase.RESUMING: (RolePhase.ABORTING, Stage.SOURCE_BROWNOUT),
    SourcePhase.DONE: (RolePhase.DONE, Stage.CLOSED),
    SourcePhase.ABORTED: (RolePhase.ABORTED, Stage.CLOSED),
    SourcePhase.LOST: (RolePhase.LOST, Stage.CLOSED),
    SourcePhase.STUCK: (RolePhase.ABORTING, Stage.BLACKOUT),
    SourcePhase.RETIRING: (RolePhase.ABORTING, Stage.BLACKOUT),
}


_SOURCE_COMMITTED = frozenset(
    {
        SourcePhase.GIVING,
        SourcePhase.GIVEN,
        SourcePhase.CLEARING,
        SourcePhase.DISMANTLING,
        SourcePhase.DONE,
        SourcePhase.OVERRULED,
    }
)


@dataclass(frozen=True)
class Source:
    """The node that the EVM leaves. It alone decides, by one record: GIVEN."""

    evm: str
    migration: str
    target: str
    nonce: str
    """p of the target's PREPARED"""
    epoch: int
    epoch_target: int
    epoch_back: int
    phase: SourcePhase = SourcePhase.BEGUN
    completed: bool = False
    """the hypervisor has sent everything and will not resume the guest by itself any more"""
    loaded: bool = False
    """the target says that it has everything"""
    machine_gone: bool = False
    withdrawn: bool = False
    """the target's WITHDRAWN has been heard"""
    unanswered: bool = False
    """GO has gone without an answer for so long that a courier may help"""
    cause: str | None = None
    """why it goes back"""
    trouble: str | None = None
    """what keeps it where it is, and what a person can do"""

    @property
    def committed(self) -> bool:
        return self.phase in _SOURCE_COMMITTED

    @property
    def wants_courier(self) -> bool:
        return self.phase is SourcePhase.GIVEN and self.unanswered

    @property
    def shown(self) -> tuple[RolePhase, Stage]:
        return _SOURCE_SHOWN[self.phase]

    def record(self, kind: RecordKind) -> Record:
        """The record of ``kind`` that this role writes."""
        epoch = {
            RecordKind.HANDOVER: self.epoch,
            RecordKind.GIVEN: self.epoch_target,
            RecordKind.DONE: self.epoch_target,
            RecordKind.OWN: self.epoch_back,
        }[kind]
        return Record(
            kind,
            self.evm,
            epoch,
            migration=self.migration,
            peer=self.target,
            nonce=self.nonce,
            epoch_target=self.epoch_target,
            epoch_back=self.epoch_back,
        )


class TargetPhase(StrEnum):
    MAKING = "making"
    """blocked ports and a machine that waits are being made"""
    PREPARING = "preparing"
    """PREPARED is being written"""
    PREPARED = "prepared"
    LOADED = "loaded"
    """everything is here, the guest stands paused"""
    ACTIVATING = "activating"
    """ACTIVATED is being written"""
    STARTING = "starting"
    """``cont`` has been sent"""
    RUNNING = "running"
    CLEARING = "clearing"
    """the machine is being killed; WITHDRAWN follows"""
    WITHDRAWING = "withdrawing"
    """WITHDRAWN is being written"""
    WITHDRAWN = "withdrawn"
    LOST = "lost"
    """ACTIVATED, and the machine is gone or does not say that it runs"""
    RETIRING = "retiring"
    """RETIRE(k) has come behind GO: the machine is being killed"""


_TARGET_SHOWN = {
    TargetPhase.MAKING: (RolePhase.PREPARING, Stage.PREPARATION),
    TargetPhase.PREPARING: (RolePhase.PREPARING, Stage.PREPARATION),
    TargetPhase.PREPARED: (RolePhase.PREPARED, Stage.SOURCE_BROWNOUT),
    TargetPhase.LOADED: (RolePhase.SWITCHOVER, Stage.BLACKOUT),
    TargetPhase.ACTIVATING: (RolePhase.SWITCHOVER, Stage.BLACKOUT),
    TargetPhase.STARTING: (RolePhase.ACTIVATED, Stage.BLACKOUT),
    TargetPhase.RUNNING: (RolePhase.RUNNING, Stage.TARGET_BROWNOUT),
    TargetPhase.CLEARING: (RolePhase.ABORTING, Stage.SOURCE_BROWNOUT),
    TargetPhase.WITHDRAWING: (RolePhase.ABORTING, Stage.SOURCE_BROWNOUT),
    TargetPhase.WITHDRAWN: (RolePhase.WITHDRAWN, Stage.CLOSED),
    TargetPhase.LOST: (RolePhase.LOST, Stage.CLOSED),
    TargetPhase.RETIRING: (RolePhase.ABORTING, Stage.BLACKOUT),
}


@dataclass(frozen=True)
class Target:
    """The node that the EVM comes to. It runs the EVM only on the source's GO."""

    evm: str
    migration: str
    source: str
    nonce: str
    epoch: int
    """e_t"""
    phase: TargetPhase = TargetPhase.MAKING
    pid: int | None = None
    start_ticks: int | None = None
    unanswered: bool = False
    """it has everything, and the source has said nothing for so long that a courier may help"""
    cause: str | None = None
    trouble: str | None = None
    """what keeps it where it is, and what a person can do"""

    @property
    def committed(self) -> bool:
        return self.phase in (TargetPhase.ACTIVATING, TargetPhase.STARTING, TargetPhase.RUNNING, TargetPhase.LOST)

    @property
    def wants_courier(self) -> bool:
        return self.phase is TargetPhase.LOADED and self.unanswered

    @property
    def shown(self) -> tuple[RolePhase, Stage]:
        return _TARGET_SHOWN[self.phase]

    def record(self, kind: RecordKind) -> Record:
        """The record of ``kind`` that this role writes."""
        return Record(
            kind,
            self.evm,
            self.epoch,
            migration=self.migration,
            peer=self.source,
            nonce=self.nonce,
            pid=self.pid,
            start_ticks=self.start_ticks,
        )
