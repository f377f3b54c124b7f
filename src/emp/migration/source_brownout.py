"""Stage 1, source brownout: memory is copied while the EVM runs on the source.

::

    controller        target                         source
        | prepare        |                              |
        |--------------->| blocked ports, paused machine|
        |                | PREPARED on disk             |
        |<---------------|                              |
        | hand over      |                              |
        |---------------------------------------------->| HANDOVER on disk, then pre-copy begins
        |                |<======== memory =============| pass after pass, until what is left fits the blackout
        |                |                              | the hypervisor pauses the guest: stage 2

HANDOVER is on disk *before* pre-copy begins, because the hypervisor may switch over at once. Up to the commit the
source can go back alone, asking nobody (``way_back``).
"""

from __future__ import annotations

from dataclasses import replace

from emp.migration import way_back
from emp.migration.events import (
    AbortAsked,
    Action,
    Ask,
    ContinueStream,
    Event,
    LinkLost,
    MachineFailed,
    MachineGone,
    MachineReady,
    MakeMachine,
    Ordered,
    PeerAsks,
    Retired,
    SendAnswer,
    SetTimer,
    SourceAborted,
    StartStream,
    Stream,
    StreamMoved,
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


def source_begun(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """HANDOVER is being written; nothing has been sent yet."""
    match event:
        case Ordered():
            return state, (WriteRecord(state.record(RecordKind.HANDOVER)),)
        case Written(RecordKind.HANDOVER) if state.cause:
            return way_back.source_returns(state, state.cause)
        case Written(RecordKind.HANDOVER):
            return replace(state, phase=SourcePhase.PRECOPY), (StartStream(), SetTimer(Timer.DEADLINE))
        case WriteFailed(RecordKind.HANDOVER, reason):
            return way_back.source_returns(state, f"the source's journal cannot be written: {reason}")
        case AbortAsked(reason) | TargetFailed(reason):
            return replace(state, cause=state.cause or reason), ()
        case LinkLost():
            return replace(state, cause=state.cause or way_back.LINK_LOST), ()
        case MachineGone():
            return replace(state, machine_gone=True, cause=state.cause or way_back.SOURCE_GONE), ()
    return state, ()


def source_precopy(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """Passes are running; QEMU decides, within the policy's limits, when little enough is left."""
    match event:
        case StreamMoved(Stream.PRE_SWITCHOVER):
            return replace(state, phase=SourcePhase.SWITCHOVER), (ContinueStream(), SetTimer(Timer.BLACKOUT))
        case StreamMoved(Stream.COMPLETED):
            # Not seen with pause-before-switchover; if a hypervisor ever does it, both ends must still be heard.
            return replace(state, phase=SourcePhase.SWITCHOVER, completed=True), (SetTimer(Timer.BLACKOUT),)
        case TimerFired(Timer.DEADLINE):
            return way_back.source_cancels(state, "the source brownout passed its deadline")
    return way_back.source_before_commit(state, event)


def target_making(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """Blocked ports and a paused machine are being made."""
    match event:
        case Ordered():
            return state, (MakeMachine(),)
        case MachineReady(pid, start_ticks):
            made = replace(state, phase=TargetPhase.PREPARING, pid=pid, start_ticks=start_ticks)
            return made, (WriteRecord(made.record(RecordKind.PREPARED)),)
        case MachineFailed(reason):
            return way_back.target_withdraws(state, reason)
        case AbortAsked(reason):
            return replace(state, cause=state.cause or reason), ()
        case SourceAborted():
            return replace(state, cause=state.cause or way_back.SOURCE_WENT_BACK), ()
        case Retired():
            return replace(state, cause=state.cause or way_back.RETIRED), ()
    return state, ()


def target_preparing(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """PREPARED is being written; the answer to the controller waits for it."""
    match event:
        case Written(RecordKind.PREPARED) if state.cause:
            return way_back.target_withdraws(state, state.cause)
        case Written(RecordKind.PREPARED):
            return replace(state, phase=TargetPhase.PREPARED), ()
        case WriteFailed(RecordKind.PREPARED, reason):
            return way_back.target_withdraws(state, f"the target's journal cannot be written: {reason}")
        case AbortAsked(reason):
            return replace(state, cause=state.cause or reason), ()
        case SourceAborted():
            return replace(state, cause=state.cause or way_back.SOURCE_WENT_BACK), ()
        case Retired():
            return replace(state, cause=state.cause or way_back.RETIRED), ()
        case MachineGone():
            return replace(state, cause=state.cause or way_back.TARGET_GONE), ()
    return state, ()


def target_prepared(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """Memory is coming in. Nothing has run here: the target may still withdraw for any reason."""
    match event:
        case StreamMoved(Stream.COMPLETED):
            return way_back.target_loaded(state)
        case StreamMoved(Stream.BROKEN, reason):
            return way_back.target_fails(state, reason or "the migration stream broke at the target")
        case MachineGone():
            return way_back.target_fails(state, way_back.TARGET_GONE)
        case AbortAsked(reason):
            return way_back.target_fails(state, reason)
        case SourceAborted():
            return way_back.target_withdraws(state, way_back.SOURCE_WENT_BACK)
        case Retired():
            return way_back.target_withdraws(state, way_back.RETIRED)
        case LinkLost():
            return state, (SetTimer(Timer.REPEAT),)
        case TimerFired(Timer.REPEAT):  # the source may have gone back before it could say so
            return state, (Ask(), SetTimer(Timer.REPEAT))
        case PeerAsks(nonce) if nonce == state.nonce:
            return state, (SendAnswer(Word.WAITING),)
    return state, ()
