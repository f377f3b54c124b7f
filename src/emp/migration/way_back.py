"""Every way back to the source, and why each is safe.

- **Before the commit** the source goes back alone: cancel the stream, OWN(e_s) on disk, the guest runs. Until the
  hypervisor says ``completed`` it resumes the guest by itself; after that only an explicit ``cont`` does.
- **After the commit** only the target's WITHDRAWN leads back (a *rescue*): the target has killed its copy, and written
  that it never ran, before it says so.
- The **target** withdraws by itself only while it has not loaded everything, and afterwards only because the source
  aborted or because the one ``cont`` that it sent was refused: its copy may be the last one.
"""

from __future__ import annotations

from dataclasses import replace

from emp.migration.events import (
    AbortAsked,
    Action,
    AwaitGuest,
    CancelStream,
    Event,
    GoArrived,
    GuestRuns,
    KillMachine,
    LinkLost,
    MachineGone,
    Run,
    RunRefused,
    SendAborted,
    SendAnswer,
    SendFailed,
    SendLoaded,
    SetTimer,
    SourceAborted,
    Stream,
    StreamMoved,
    TargetAnswered,
    TargetFailed,
    Timer,
    TimerFired,
    Word,
    WriteFailed,
    WriteRecord,
    Written,
)
from emp.migration.records import RecordKind
from emp.migration.states import Source, SourcePhase, Target, TargetPhase

LINK_LOST = "the connection to the target's agent was lost"
SOURCE_GONE = "the EVM's process on the source ended"
TARGET_GONE = "the EVM's process on the target ended"
SOURCE_WENT_BACK = "the source went back"

# ------------------------------------------------------------------ source


def source_before_commit(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """What sends the source back from pre-copy and from the switchover alike."""
    match event:
        case AbortAsked(reason) | TargetFailed(reason):
            return source_cancels(state, reason)
        case LinkLost():
            return source_cancels(state, LINK_LOST)
        case TargetAnswered(Word.WITHDRAWN, nonce) if nonce == state.nonce:
            return source_cancels(state, "the target has withdrawn")
        case StreamMoved(Stream.BROKEN, reason):
            return source_returns(state, reason or "the migration stream broke")
        case MachineGone():
            return source_returns(replace(state, machine_gone=True), SOURCE_GONE)
    return state, ()


def source_cancels(state: Source, cause: str) -> tuple[Source, tuple[Action, ...]]:
    """Tear the stream down; what came of it decides how the guest is brought back."""
    if state.completed:  # nothing left to cancel: only OWN(e_s) and an explicit cont
        return source_returns(state, cause)
    return replace(state, phase=SourcePhase.CANCELLING, cause=cause), (CancelStream(),)


def source_cancelling(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    match event:
        case StreamMoved(Stream.BROKEN):
            return source_returns(state, state.cause)
        case StreamMoved(Stream.COMPLETED):  # the cancel came too late for the hypervisor, not for us
            return source_returns(replace(state, completed=True), state.cause)
        case MachineGone():
            return source_returns(replace(state, machine_gone=True), state.cause)
    return state, ()


def source_returns(state: Source, cause: str | None) -> tuple[Source, tuple[Action, ...]]:
    """Take authority back under the fresh epoch e_s: every order of the migration is older from then on."""
    back = replace(state, phase=SourcePhase.RETURNING, cause=cause)
    return back, (WriteRecord(back.record(RecordKind.OWN)),)


def source_is_rescued(state: Source) -> tuple[Source, tuple[Action, ...]]:
    return source_returns(replace(state, completed=True), "the target could not start the EVM")


def source_returning(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    match event:
        case Written(RecordKind.OWN) if state.machine_gone:
            return replace(state, phase=SourcePhase.LOST), (SendAborted(),)
        case Written(RecordKind.OWN) if state.completed:
            return replace(state, phase=SourcePhase.RESUMING), (Run(), SendAborted())
        case Written(RecordKind.OWN):
            return replace(state, phase=SourcePhase.RESUMING), (AwaitGuest(), SendAborted())
        case WriteFailed(RecordKind.OWN, reason):
            return replace(
                state, phase=SourcePhase.STUCK, cause=f"{state.cause}; the journal cannot be written: {reason}"
            ), ()
        case MachineGone():
            return replace(state, machine_gone=True), ()
    return state, ()


def source_resuming(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    match event:
        case GuestRuns():
            return replace(state, phase=SourcePhase.ABORTED), ()
        case RunRefused(reason):
            return replace(
                state, phase=SourcePhase.ABORTED, cause=f"{state.cause}; the guest stays paused: {reason}"
            ), ()
        case MachineGone():
            return replace(state, phase=SourcePhase.LOST, machine_gone=True), ()
    return state, ()


# ------------------------------------------------------------------ target


def target_loaded(state: Target) -> tuple[Target, tuple[Action, ...]]:
    """Everything has arrived: say so, and again until the source's word comes."""
    return replace(state, phase=TargetPhase.LOADED), (SendLoaded(), SetTimer(Timer.REPEAT))


def target_fails(state: Target, reason: str) -> tuple[Target, tuple[Action, ...]]:
    """Tell the source at once, then withdraw."""
    withdrawing, actions = target_withdraws(state, reason)
    return withdrawing, (SendFailed(reason), *actions)


def target_withdraws(state: Target, reason: str) -> tuple[Target, tuple[Action, ...]]:
    return replace(state, phase=TargetPhase.CLEARING, cause=reason), (KillMachine(),)


def target_clearing(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """WITHDRAWN is written only after the machine's exit: it swears that this copy never runs."""
    match event:
        case MachineGone():
            withdrawn = WriteRecord(state.record(RecordKind.WITHDRAWN))
            return replace(state, phase=TargetPhase.WITHDRAWING), (withdrawn,)
    return state, ()


def target_withdrawing(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    match event:
        case Written(RecordKind.WITHDRAWN):
            return replace(state, phase=TargetPhase.WITHDRAWN), (SendAnswer(Word.WITHDRAWN),)
        case WriteFailed(RecordKind.WITHDRAWN):
            return state, (SetTimer(Timer.REPEAT),)
        case TimerFired(Timer.REPEAT):
            return state, (WriteRecord(state.record(RecordKind.WITHDRAWN)),)
    return state, ()


def target_withdrawn(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """Late questions are answered from the journal."""
    match event:
        case GoArrived(_, nonce) if nonce == state.nonce:
            return state, (SendAnswer(Word.WITHDRAWN),)
        case SourceAborted():
            return state, (SendAnswer(Word.WITHDRAWN),)
    return state, ()
