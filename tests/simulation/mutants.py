"""Bugs that somebody might make. Each is planted in the daemons on purpose: the simulation must find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from emp.agent import adoption, guest_clock
from emp.agent.guests import Guests
from emp.agent.resident import Resident
from emp.controller.boot import Boot
from emp.migration import source, target, way_back
from emp.migration.events import AbortAsked, Event, SendGo, StreamMoved, TargetLoaded, Timer, TimerFired, WriteRecord
from emp.migration.events import Stream as StreamState
from emp.migration.records import Record, RecordKind
from emp.migration.states import Source, SourcePhase, Target, TargetPhase
from tests.simulation.disk import Disk

Mutant = Callable[[], None]
MUTANTS: dict[str, Mutant] = {}


def mutant(plant: Mutant) -> Mutant:
    MUTANTS[plant.__name__.replace("_", "-")] = plant
    return plant


def _change(stages: Any, phase: Any, planted: Callable[[Any, Event, Any], Any]) -> None:
    right = stages[phase]
    stages[phase] = lambda state, event: planted(state, event, right)


@mutant
def resume_on_silence() -> None:
    """The committed source takes an unanswered GO for "it does not run there"."""

    def given(state: Source, event: Event, right: Any) -> Any:
        if event == TimerFired(Timer.REPEAT):
            return way_back.source_is_rescued(state)
        return right(state, event)

    _change(source._STAGES, SourcePhase.GIVEN, given)


@mutant
def commit_before_completed() -> None:
    """GIVEN is written when the target has loaded, while the source's QEMU could still resume the guest by itself."""

    def switchover(state: Source, event: Event, right: Any) -> Any:
        if isinstance(event, TargetLoaded):
            return right(replace(state, completed=True), event)
        return right(state, event)

    _change(source._STAGES, SourcePhase.SWITCHOVER, switchover)


@mutant
def go_before_given() -> None:
    """GO is sent while GIVEN is being written."""

    def switchover(state: Source, event: Event, right: Any) -> Any:
        after, actions = right(state, event)
        return after, (SendGo(), *actions) if after.phase is SourcePhase.GIVING else actions

    _change(source._STAGES, SourcePhase.SWITCHOVER, switchover)


@mutant
def activate_without_go() -> None:
    """The target starts the guest as soon as it has loaded everything."""

    def prepared(state: Target, event: Event, right: Any) -> Any:
        if isinstance(event, StreamMoved) and event.to is StreamState.COMPLETED:
            activating = replace(state, phase=TargetPhase.ACTIVATING)
            return activating, (WriteRecord(activating.record(RecordKind.ACTIVATED)),)
        return right(state, event)

    _change(target._STAGES, TargetPhase.PREPARED, prepared)


@mutant
def forget_given_on_restart() -> None:
    """A restarted source goes back though its journal says GIVEN."""
    module: Any = adoption
    right = module.resume_source

    def resume(record: Record, *, alive: bool, completed: bool) -> Any:
        state, event = right(record, alive=alive, completed=completed)
        if record.kind is RecordKind.GIVEN and alive:
            return replace(state, phase=SourcePhase.SWITCHOVER), AbortAsked(way_back.RESTARTED)
        return state, event

    module.resume_source = resume


@mutant
def journal_not_synced() -> None:
    """A record is acted on before it is on disk."""
    Disk.syncs = False


@mutant
def retire_skipped() -> None:
    """A cold start asks nobody who could hold authority."""

    async def skip(self: Boot, name: str) -> None:
        pass

    Boot._retire_holders = skip  # type: ignore[method-assign]


@mutant
def withdraw_without_killing() -> None:
    """The target swears that it never runs the EVM, and keeps its machine."""

    def withdraws(state: Target, reason: str) -> Any:
        withdrawing = replace(state, phase=TargetPhase.WITHDRAWING, cause=reason)
        return withdrawing, (WriteRecord(withdrawing.record(RecordKind.WITHDRAWN)),)

    way_back.target_withdraws = withdraws


@mutant
def clock_set_while_it_leaves() -> None:
    """A guest's clock is looked at whatever else is being done to it."""
    module: Any = guest_clock
    right = module.set_right

    def leave(self: Guests, resident: Resident) -> None:
        resident.clock = None

    Guests.leave_clock = leave  # type: ignore[method-assign]
    module.set_right = lambda machine, may_go_on, told: right(machine, lambda: True, told)
