"""Every way back to the source, and why each is safe.

- **Before the commit** the source goes back alone: cancel the stream, OWN(e_s) on disk, the guest runs. Until the
  hypervisor says ``completed`` it resumes the guest by itself; after that only an explicit ``cont`` does.
- **After the commit** only the target's WITHDRAWN leads back (a *rescue*): the target has killed its copy, and written
  that it never ran, before it says so.
- An agent **restarted** between ``completed`` and GIVEN asks the target first: had its journal lost GIVEN, the target
  alone would know.
- Where **OWN(e_s) cannot be written** a paused guest waits: GIVEN may be on disk. The write is tried again for ever,
  and the target is asked to withdraw: its WITHDRAWN serves as well.
- The **target** withdraws by itself only while it has not loaded everything, and afterwards only because the source
  aborted or because the one ``cont`` that it sent was refused: its copy may be the last one.
"""

from __future__ import annotations

from dataclasses import replace

from emp.migration.events import (
    AbortAsked,
    Action,
    Ask,
    AwaitGuest,
    BlockPorts,
    CancelStream,
    ClaimVolumes,
    CloseRelays,
    Event,
    GoArrived,
    GuestEnded,
    GuestRuns,
    KillMachine,
    LinkLost,
    MachineGone,
    PeerAsks,
    Quarantine,
    Resumed,
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
    TakeBackFrames,
    TargetAnswered,
    TargetFailed,
    TargetLoaded,
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
VOLUME_UNREAD = "the target cannot read"
"""begins the reason of a target that has everything and does not reach a volume"""
TARGET_GONE = "the EVM's process on the target ended"
SOURCE_WENT_BACK = "the source went back"
RETIRED = "the EVM was retired here"
RESTARTED = "the source's agent was restarted before the commit"
UNWRITABLE = "the journal cannot be written, free or repair the disk under it"
LOST_GIVEN = "this node's journal has lost the commit: the target has it"

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
    back = replace(state, phase=SourcePhase.RETURNING, cause=cause, trouble=None)
    return back, (WriteRecord(back.record(RecordKind.OWN)),)


def source_is_rescued(state: Source) -> tuple[Source, tuple[Action, ...]]:
    withdrawn = replace(state, completed=True, withdrawn=True)
    return source_returns(withdrawn, state.cause or "the target could not start the EVM")


def source_returning(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    match event:
        case Written(RecordKind.OWN):
            return _source_owns(state)
        case WriteFailed(RecordKind.OWN, reason):
            stuck = replace(state, phase=SourcePhase.STUCK, trouble=f"{UNWRITABLE}: {reason}")
            return stuck, (SendAborted(), SetTimer(Timer.REPEAT), *_run_if_sworn(stuck))
        case TargetAnswered(Word.WITHDRAWN, nonce) if nonce == state.nonce:
            return replace(state, withdrawn=True), ()
        case MachineGone():
            return replace(state, machine_gone=True), ()
    return state, ()


def _source_owns(state: Source) -> tuple[Source, tuple[Action, ...]]:
    """OWN(e_s) is on disk."""
    if state.machine_gone:
        return replace(state, phase=SourcePhase.LOST, trouble=None), (CloseRelays(), SendAborted())
    start = Run() if state.completed else AwaitGuest()
    resuming = replace(state, phase=SourcePhase.RESUMING, trouble=None)
    return resuming, (CloseRelays(), TakeBackFrames(), start, SendAborted(), ClaimVolumes())


def source_stuck(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """The record is tried for ever, each time in a new file: GIVEN may be on disk, so nothing follows from waiting.

    The target is told to withdraw all the while: its word lets the guest run even with no record written.
    """
    match event:
        case TimerFired(Timer.REPEAT):
            return state, (WriteRecord(state.record(RecordKind.OWN)), SendAborted())
        case Written(RecordKind.OWN):
            return _source_owns(state)
        case WriteFailed(RecordKind.OWN, reason):
            return replace(state, trouble=f"{UNWRITABLE}: {reason}"), (SetTimer(Timer.REPEAT),)
        case TargetAnswered(Word.WITHDRAWN, nonce) if nonce == state.nonce and not state.withdrawn:
            withdrawn = replace(state, withdrawn=True)
            return withdrawn, _run_if_sworn(withdrawn)
        case TargetAnswered(Word.ACTIVATED | Word.GOING, nonce) if nonce == state.nonce and not state.withdrawn:
            return _source_is_overruled(state)
        case PeerAsks(nonce) if nonce == state.nonce:
            return state, (SendAborted(),)
        case RunRefused():
            return state, (SetTimer(Timer.RETRY),)
        case TimerFired(Timer.RETRY):
            return state, _run_if_sworn(state)
        case MachineGone():
            return replace(state, machine_gone=True), ()
    return state, ()


def _run_if_sworn(state: Source) -> tuple[Action, ...]:
    return (
        (CloseRelays(), TakeBackFrames(), Run())
        if state.withdrawn and state.completed and not state.machine_gone
        else ()
    )


def source_resuming(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """OWN(e_s) is on disk: ``cont`` may be sent as often as it takes."""
    match event:
        case GuestRuns():
            return replace(state, phase=SourcePhase.ABORTED, trouble=None), ()
        case GuestEnded(reason):
            return replace(state, phase=SourcePhase.ABORTED, trouble=reason), ()
        case RunRefused(reason):
            return replace(state, trouble=f"the guest does not run yet: {reason}"), (SetTimer(Timer.RETRY),)
        case TimerFired(Timer.RETRY):
            return state, (Run(),)
        case PeerAsks(nonce) if nonce == state.nonce:
            return state, (SendAborted(),)
        case MachineGone():
            return replace(state, phase=SourcePhase.LOST, machine_gone=True), ()
    return state, ()


def source_asking(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """HANDOVER is the last record, the stream complete. Only a journal that lost GIVEN could be wrong about that."""
    match event:
        case Resumed():
            return state, (Ask(), SetTimer(Timer.REPEAT), SetTimer(Timer.ANSWER))
        case TimerFired(Timer.REPEAT):
            return state, (Ask(), SetTimer(Timer.REPEAT))
        case TargetAnswered(Word.ACTIVATED | Word.GOING, nonce) if nonce == state.nonce:
            return _source_is_overruled(state)
        case TargetAnswered(word, nonce) if nonce == state.nonce:
            return source_returns(replace(state, withdrawn=word is Word.WITHDRAWN), RESTARTED)
        case TargetLoaded(nonce) if nonce == state.nonce:
            return source_returns(state, RESTARTED)
        case TimerFired(Timer.ANSWER):
            return source_returns(state, f"{RESTARTED}, and the target does not answer")
        case MachineGone():
            return replace(state, machine_gone=True), ()
    return state, ()


def _source_is_overruled(state: Source) -> tuple[Source, tuple[Action, ...]]:
    overruled = replace(state, phase=SourcePhase.OVERRULED, trouble=LOST_GIVEN)
    return overruled, (Quarantine(LOST_GIVEN), SetTimer(Timer.REPEAT))


def source_overruled(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """This copy counts as given away. Its journal is not to be trusted, so nothing is killed either."""
    match event:
        case TargetAnswered(Word.WITHDRAWN, nonce) if nonce == state.nonce:
            return source_is_rescued(state)
        case TimerFired(Timer.REPEAT):
            return state, (Ask(), SetTimer(Timer.REPEAT))
        case MachineGone():
            return replace(state, machine_gone=True), ()
    return state, ()


def source_retires(state: Source) -> tuple[Source, tuple[Action, ...]]:
    """RETIRE(k) fences every node that could hold authority, this one too: RETIRED(k) follows the machine's exit."""
    return replace(state, phase=SourcePhase.RETIRING, cause=RETIRED, trouble=None), (CloseRelays(), KillMachine())


def source_retiring(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    match event:
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
            return replace(state, phase=TargetPhase.WITHDRAWN, trouble=None), (SendAnswer(Word.WITHDRAWN),)
        case WriteFailed(RecordKind.WITHDRAWN, reason):
            return replace(state, trouble=f"{UNWRITABLE}: {reason}"), (SetTimer(Timer.REPEAT),)
        case TimerFired(Timer.REPEAT):
            return state, (WriteRecord(state.record(RecordKind.WITHDRAWN)),)
    return state, ()


def target_withdrawn(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """Late questions are answered from the journal."""
    match event:
        case GoArrived(nonce=nonce) | PeerAsks(nonce) if nonce == state.nonce:
            return state, (SendAnswer(Word.WITHDRAWN),)
        case SourceAborted():
            return state, (SendAnswer(Word.WITHDRAWN),)
    return state, ()


def target_retires(state: Target) -> tuple[Target, tuple[Action, ...]]:
    """RETIRE(k) behind GO: ``cont`` may have been sent, so this copy dies without an oath. RETIRED(k) follows."""
    return replace(state, phase=TargetPhase.RETIRING, cause=RETIRED, trouble=None), (BlockPorts(), KillMachine())


def target_retiring(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    match event:
        case MachineGone():
            return replace(state, phase=TargetPhase.LOST), ()
    return state, ()
