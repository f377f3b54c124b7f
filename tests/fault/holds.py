"""Where a migration is held while something breaks: one place for each column of the matrix, others where a cell says.

A daemon is held by stopping itself at a fault point: no timer of it runs and nothing of it is sent. The device transfer
is held by a target's QEMU that does not read: the source has told its own to go on and waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.fault.stage import Stage


@dataclass(frozen=True)
class Hold:
    """The migration is held with ``party`` frozen at ``point``; None: it is not held, only seen there."""

    party: str
    point: str
    frozen: bool = True

    def arm(self, stage: Stage) -> None:
        if self.frozen:
            stage.freeze_at(self.party, self.point)

    def wait(self, stage: Stage) -> None:
        """Return when the migration stands there; raise ``NotSeen`` if it never comes."""
        if self.frozen:
            stage.wait_frozen(self.party, self.point)
        else:
            stage.wait_point(self.party, self.point)

    def release(self, stage: Stage) -> None:
        if self.frozen and self.party not in stage.kept_frozen:
            stage.thaw(self.party)


@dataclass(frozen=True)
class InDevice(Hold):
    """The source's QEMU transfers the device state, and the target's QEMU stands still."""

    def wait(self, stage: Stage) -> None:
        super().wait(stage)
        stage.stop_qemu("T")
        stage.thaw(self.party)
        stage.wait_point("S", "source.continue-stream.after")

    def release(self, stage: Stage) -> None:
        if "QEMU of T" not in stage.kept_frozen:
            stage.cont_qemu("T")


@dataclass(frozen=True)
class Hesitating(Hold):
    """In pre-switchover, and what follows it would not end: the target's QEMU stands still until the pool is healed.

    The source's agent does not wait in pre-switchover: what reaches it there it takes up after ``migrate-continue``.
    """

    def wait(self, stage: Stage) -> None:
        super().wait(stage)
        stage.stop_qemu("T")


@dataclass(frozen=True)
class Unheard(Hold):
    """Both QEMUs are through, and the target's agent has not heard it yet."""

    def wait(self, stage: Stage) -> None:
        super().wait(stage)
        stage.stop("T")
        stage.thaw(self.party)
        stage.wait_point("S", "qmp-migration-completed")

    def release(self, stage: Stage) -> None:
        if "T" not in stage.kept_frozen:
            stage.thaw("T")


PRECOPY = Hold("S", "qmp-migration-active", frozen=False)
PRE_SWITCHOVER = Hold("S", "source.continue-stream.before")
HESITATING = Hesitating("S", "source.continue-stream.before")
DEVICE = InDevice("S", "source.continue-stream.before")
COMPLETED = Hold("S", "source.write-record-given.before")
UNHEARD = Unheard("S", "source.continue-stream.before")
GIVEN = Hold("S", "source.send-go.before")
GONE = Hold("T", "target.write-record-activated.before")
ACTIVATED = Hold("T", "target.run.before")
RUNS = Hold("S", "source.write-record-done.before")
BACK = Hold("S", "source.write-record-own.before")
BEGUN = Hold("C", "controller.attach.before")

COLUMNS = {"B": PRECOPY, "P": PRE_SWITCHOVER, "D": DEVICE, "H": UNHEARD, "M": GONE, "T": RUNS}
