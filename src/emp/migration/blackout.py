"""Stage 2, blackout: the EVM is paused; last pages, **the commit**, resume on the target.

::

    target                                  source
      |                                       | guest stopped, pre-switchover; continue
      |<======= last pages, devices ==========|
      | loaded, paused                        | completed
      |-------------- LOADED(p) ------------->|
      |                                       | GIVEN on disk  <- THE COMMIT: before it only back, after it only forward
      |<------------- GO(e_t, p) -------------|
      | ACTIVATED on disk                     |
      | ports open, cont, guest runs          |
      |------------ ACTIVATED(p) ------------>| stage 3

The commit waits for both: the source's hypervisor says ``completed`` (it will not resume the guest by itself any more)
and the target says that it has everything. After GIVEN the source resumes only by the target's WITHDRAWN, never on a
timeout: silence says nothing about whether the target runs.
"""

from __future__ import annotations

from dataclasses import replace

from emp.migration import way_back
from emp.migration.events import (
    Action,
    Announce,
    Ask,
    BlockPorts,
    ClaimVolumes,
    Event,
    Forward,
    GoArrived,
    GuestRuns,
    KillMachine,
    LinkLost,
    MachineGone,
    OpenPorts,
    OpenRelays,
    PeerAsks,
    Retired,
    Run,
    RunRefused,
    RunUnknown,
    SendAnswer,
    SendFailed,
    SendGo,
    SendLoaded,
    SetTimer,
    SourceAborted,
    Stream,
    StreamMoved,
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


def source_switchover(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """The guest is paused here; both ends must have everything before the commit."""
    match event:
        case StreamMoved(Stream.COMPLETED):
            return _commit_if_both(replace(state, completed=True))
        case TargetLoaded(nonce) if nonce == state.nonce:
            return _commit_if_both(replace(state, loaded=True))
        case MachineGone() if state.completed and state.loaded:
            return _commit_if_both(replace(state, machine_gone=True))
        case TimerFired(Timer.BLACKOUT):
            return way_back.source_cancels(state, "the blackout passed its deadline before the commit")
    return way_back.source_before_commit(state, event)


def _commit_if_both(state: Source) -> tuple[Source, tuple[Action, ...]]:
    if state.completed and state.loaded:
        return replace(state, phase=SourcePhase.GIVING), (WriteRecord(state.record(RecordKind.GIVEN)),)
    return state, ()


def source_giving(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """GIVEN is being written. No abort from here: the record may be on disk already."""
    match event:
        case Written(RecordKind.GIVEN):
            given = replace(state, phase=SourcePhase.GIVEN, trouble=None)
            return given, (SendGo(), Forward(), OpenRelays(), SetTimer(Timer.REPEAT))
        case WriteFailed(RecordKind.GIVEN, reason) if state.machine_gone:  # the target's is the only copy left
            return replace(state, trouble=f"{way_back.UNWRITABLE}: {reason}"), (SetTimer(Timer.REPEAT),)
        case TimerFired(Timer.REPEAT) if state.machine_gone:
            return state, (WriteRecord(state.record(RecordKind.GIVEN)),)
        case WriteFailed(RecordKind.GIVEN, reason):
            return way_back.source_returns(state, f"the commit could not be written: {reason}")
        case MachineGone():
            return replace(state, machine_gone=True), ()
    return state, ()


def source_given(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """Committed: forward only, unless the target swears that it never ran."""
    match event:
        case TargetAnswered(Word.ACTIVATED, nonce) if nonce == state.nonce:
            done = WriteRecord(state.record(RecordKind.DONE))
            return replace(state, phase=SourcePhase.CLEARING), (done,)
        case TargetAnswered(Word.WITHDRAWN, nonce) if nonce == state.nonce:
            return way_back.source_is_rescued(state)
        case PeerAsks(nonce) if nonce == state.nonce:
            return state, (SendGo(),)
        case TimerFired(Timer.REPEAT):
            return replace(state, unanswered=True), (SendGo(), Forward(), OpenRelays(), SetTimer(Timer.REPEAT))
        case TargetFailed(reason):  # it keeps its copy, and tries again at the next GO
            return replace(state, trouble=f"the target: {reason}"), ()
        case MachineGone():
            return replace(state, machine_gone=True), ()
    return state, ()


def target_loaded(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """Everything is here. Perhaps this is the last copy: no timer and no broken link makes it withdraw (rule R3)."""
    match event:
        case GoArrived(epoch, nonce) if nonce == state.nonce and epoch == state.epoch:
            return replace(state, phase=TargetPhase.ACTIVATING), (WriteRecord(state.record(RecordKind.ACTIVATED)),)
        case SourceAborted():
            return way_back.target_withdraws(state, way_back.SOURCE_WENT_BACK)
        case Retired():
            return way_back.target_withdraws(state, way_back.RETIRED)
        case MachineGone():
            return way_back.target_fails(state, way_back.TARGET_GONE)
        case LinkLost():
            return state, (SendLoaded(), Ask(), SetTimer(Timer.REPEAT))
        case TimerFired(Timer.REPEAT):
            return replace(state, unanswered=True), (SendLoaded(), Ask(), SetTimer(Timer.REPEAT))
        case PeerAsks(nonce) if nonce == state.nonce:
            return state, (SendAnswer(Word.WAITING),)
    return state, ()


def target_activating(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """ACTIVATED is being written; once it is on disk this node owns the EVM."""
    match event:
        case Written(RecordKind.ACTIVATED):
            return replace(state, phase=TargetPhase.STARTING, trouble=None), (OpenPorts(), Run())
        case WriteFailed(RecordKind.ACTIVATED, reason):
            # The record may be on disk, so this copy may not withdraw; it has not run, so nothing is lost by waiting.
            trouble = f"{way_back.UNWRITABLE}: {reason}"
            waiting = replace(state, phase=TargetPhase.LOADED, trouble=trouble)
            return waiting, (SendFailed(trouble), SetTimer(Timer.REPEAT))
        case MachineGone():  # ``cont`` has not been sent, so this very process can swear that the guest never ran
            return way_back.target_withdraws(state, way_back.TARGET_GONE)
        case Retired():
            return way_back.target_retires(state)
        case PeerAsks(nonce) if nonce == state.nonce:
            return state, (SendAnswer(Word.GOING),)
    return state, ()


def target_starting(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """``cont`` has been sent, once."""
    match event:
        case GuestRuns():
            runs = replace(state, phase=TargetPhase.RUNNING, trouble=None)
            return runs, (Announce(), SendAnswer(Word.ACTIVATED), ClaimVolumes())
        case RunRefused(reason):
            return replace(state, phase=TargetPhase.CLEARING, cause=reason), (BlockPorts(), KillMachine())
        case RunUnknown():
            unknown = replace(state, trouble="the hypervisor did not answer whether the guest runs")
            return unknown, (SendAnswer(Word.ACTIVATED),)
        case MachineGone():
            return replace(state, phase=TargetPhase.LOST, cause=way_back.TARGET_GONE), (SendAnswer(Word.ACTIVATED),)
        case Retired():
            return way_back.target_retires(state)
        case PeerAsks(nonce) if nonce == state.nonce:
            return state, (SendAnswer(Word.GOING),)
    # A repeated GO waits: were it answered now and ``cont`` then refused, the source would have cleared its copy.
    return state, ()
