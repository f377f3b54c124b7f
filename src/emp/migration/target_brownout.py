"""Stage 3, target brownout: the EVM runs on the target; addresses and volumes are finalised, the source is cleared.

The target has announced every address of the EVM and its pods. The source writes DONE and kills its machine, which is
paused and stale for ever. The controller then detaches the source's volumes and closes the report. Nothing here is
undone: it is repeated until it has happened.
"""

from __future__ import annotations

from dataclasses import replace

from emp.migration.events import (
    Action,
    Event,
    GoArrived,
    KillMachine,
    MachineGone,
    PeerAsks,
    SendAnswer,
    SetTimer,
    Timer,
    TimerFired,
    Word,
    WriteFailed,
    WriteRecord,
    Written,
)
from emp.migration.records import RecordKind
from emp.migration.states import Source, SourcePhase, Target


def source_clearing(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """The target runs: write it down, then take the stale copy away."""
    match event:
        case Written(RecordKind.DONE):
            return replace(state, phase=SourcePhase.DISMANTLING), (KillMachine(),)
        case WriteFailed(RecordKind.DONE):
            return state, (SetTimer(Timer.REPEAT),)
        case TimerFired(Timer.REPEAT):
            return state, (WriteRecord(state.record(RecordKind.DONE)),)
    return state, ()  # a machine that ends by itself is no reason to do without the record


def source_dismantling(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    match event:
        case MachineGone():
            return replace(state, phase=SourcePhase.DONE, machine_gone=True), ()
    return state, ()


def target_running(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """The EVM lives here. A repeated GO is answered from the journal and sends nothing to the hypervisor (rule R1)."""
    match event:
        case GoArrived(nonce=nonce) | PeerAsks(nonce) if nonce == state.nonce:
            return state, (SendAnswer(Word.ACTIVATED),)
    return state, ()
