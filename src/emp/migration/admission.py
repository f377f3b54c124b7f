"""May a node do what it is ordered, and what does it answer when asked? Decided by its journal and by nothing else.

An order may be late, repeated, or of a migration that has long been over. Three things tell: the highest epoch in the
journal (an order that is not newer is stale, rule R7), the last record (it alone allows an act), and the last record
that names a migration (a question about it is answered from there, with the nonce that it was promised under).
"""

from __future__ import annotations

from emp.migration.events import GoArrived, SourceAborted, Word
from emp.migration.records import OWNING, RUNNABLE, Ledger, Record, RecordKind
from emp.migration.states import Target, TargetPhase
from emp.model.errors import Conflict, StaleEpoch
from emp.model.orders import Role, RolePhase

_WORDS = {RecordKind.ACTIVATED: Word.ACTIVATED, RecordKind.WITHDRAWN: Word.WITHDRAWN}

_STANDINGS = {
    RecordKind.OWN: (Role.SOURCE, RolePhase.ABORTED),
    RecordKind.HANDOVER: (Role.SOURCE, RolePhase.ABORTING),
    RecordKind.GIVEN: (Role.SOURCE, RolePhase.GIVEN),
    RecordKind.DONE: (Role.SOURCE, RolePhase.DONE),
    RecordKind.PREPARED: (Role.TARGET, RolePhase.PREPARED),
    RecordKind.ACTIVATED: (Role.TARGET, RolePhase.RUNNING),
    RecordKind.WITHDRAWN: (Role.TARGET, RolePhase.WITHDRAWN),
}


def check_epoch(ledger: Ledger, epoch: int) -> None:
    """Raise ``StaleEpoch`` for an order that is not newer than all that this node has promised."""
    if epoch <= ledger.highest_epoch:
        raise StaleEpoch(
            f"the order's epoch {epoch} is not newer than {ledger.highest_epoch}, which this node has seen",
            field="epoch",
        )


def check_prepare(ledger: Ledger, epoch: int) -> None:
    """May the EVM come here under ``epoch`` (e_t)? Raises ``StaleEpoch`` or ``Conflict``."""
    check_epoch(ledger, epoch)
    if ledger.last and ledger.last.kind in OWNING:
        raise Conflict(f"EVM {ledger.last.evm!r} is already on this node", field="target")
    if ledger.last and ledger.last.kind is RecordKind.GIVEN:
        raise Conflict(f"EVM {ledger.last.evm!r} has not left this node yet", field="target", hint="try again later")


def check_replaces(older: Target) -> None:
    """May a new PREPARE withdraw ``older`` (rule R3)? Raises ``Conflict``: a copy that has loaded may be the last."""
    loaded = older.phase is TargetPhase.LOADED
    if older.committed or loaded:
        raise Conflict(f"migration {older.migration} is not over on this node", field="evm")


def check_hand_over(ledger: Ledger, epoch_target: int) -> None:
    """May the EVM leave for a node under ``epoch_target``? Raises ``Conflict`` or ``StaleEpoch``."""
    if ledger.last is None or ledger.last.kind not in RUNNABLE:
        raise Conflict("this node does not own the EVM", field="evm")
    check_epoch(ledger, epoch_target)


def check_start(ledger: Ledger, epoch: int) -> None:
    """May the EVM be booted here under ``epoch`` (rule R9)? Raises ``StaleEpoch`` or ``Conflict``."""
    check_epoch(ledger, epoch)
    if (last := ledger.last) and last.kind in (*OWNING, RecordKind.PREPARED, RecordKind.GIVEN):
        raise Conflict(f"EVM {last.evm!r} is already here ({last.kind})", field="evm", hint="retire it first")


def word_of(ledger: Ledger, migration: str) -> tuple[Word, str | None] | None:
    """What a repeated GO is answered (rule R1) and its nonce; None: nothing can be sworn (rule R2)."""
    end = ledger.end_of(migration)
    return (_WORDS[end.kind], end.nonce) if end and end.kind in _WORDS else None


def reply_of(ledger: Ledger, migration: str) -> GoArrived | SourceAborted | None:
    """What a target that has loaded everything and asks is told by its source; None: nothing (rule R3).

    GO only while GIVEN is the EVM's last record: after RETIRED it would undo a fence.
    """
    end = ledger.end_of(migration)
    if end and end.kind is RecordKind.OWN:
        return SourceAborted()
    if end and end.kind is RecordKind.GIVEN and end is ledger.last and end.nonce:
        return GoArrived(end.epoch, end.nonce)
    return None


def standing_of(ledger: Ledger, migration: str) -> tuple[Role, RolePhase, Record] | None:
    """Where this node's end of ``migration`` stands once no role is busy with it; None: it is not known here."""
    end = ledger.end_of(migration)
    return (*_STANDINGS[end.kind], end) if end and end.kind in _STANDINGS else None
