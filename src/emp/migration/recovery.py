"""Where a role stands after a restart of its agent: made from the journal's last record and from what is alive.

What the agent knew beside that is gone, and must not matter: ``tests/search`` kills agents between any two steps.
"""

from __future__ import annotations

from dataclasses import replace

from emp.migration import way_back
from emp.migration.events import (
    AbortAsked,
    Event,
    LinkLost,
    MachineGone,
    Resumed,
    Stream,
    StreamMoved,
    Timer,
    TimerFired,
)
from emp.migration.records import Record, RecordKind
from emp.migration.states import Source, SourcePhase, Target, TargetPhase


def resume_source(record: Record, *, alive: bool, completed: bool) -> tuple[Source, Event]:
    """``record`` is HANDOVER or GIVEN. Return the state to go on from and the event that makes it go on.

    ``alive``: its machine runs or is paused. ``completed``: the stream had come to its end, so that the hypervisor
    will not resume the guest by itself.
    """
    assert record.migration and record.peer and record.nonce and record.epoch_target and record.epoch_back
    state = Source(
        record.evm,
        record.migration,
        record.peer,
        record.nonce,
        record.epoch,
        record.epoch_target,
        record.epoch_back,
        machine_gone=not alive,
    )
    if record.kind is RecordKind.GIVEN:
        given = replace(state, phase=SourcePhase.GIVEN, completed=True, loaded=True)
        return given, TimerFired(Timer.REPEAT)
    if alive and completed:  # had this journal lost GIVEN, only the target would know (rule R2)
        return replace(state, phase=SourcePhase.ASKING, completed=True, cause=way_back.RESTARTED), Resumed()
    copying = replace(state, phase=SourcePhase.PRECOPY)
    return copying, AbortAsked(way_back.RESTARTED) if alive else MachineGone()


def resume_target(record: Record, *, alive: bool, loaded: bool, broken: bool = False) -> tuple[Target, Event]:
    """``record`` is PREPARED. Return the state to go on from and the event that makes it go on.

    ``alive``: the very machine that it names is. ``loaded``: it has everything, paused. ``broken``: its stream ended
    before that.
    """
    assert record.migration and record.peer and record.nonce
    state = Target(
        record.evm,
        record.migration,
        record.peer,
        record.nonce,
        record.epoch,
        TargetPhase.PREPARED,
        record.pid,
        record.start_ticks,
    )
    if not alive:
        return state, MachineGone()
    if broken:
        return state, StreamMoved(Stream.BROKEN, "the stream broke while the target's agent was away")
    return state, StreamMoved(Stream.COMPLETED) if loaded else LinkLost()
