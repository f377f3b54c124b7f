"""The target's role: ``step`` leads it through the stages. It guarantees that the EVM never runs here without GO."""

from __future__ import annotations

from emp.migration import blackout, source_brownout, target_brownout, way_back
from emp.migration.events import Action, Event
from emp.migration.states import Target, TargetPhase

_STAGES = {
    TargetPhase.MAKING: source_brownout.target_making,
    TargetPhase.PREPARING: source_brownout.target_preparing,
    TargetPhase.PREPARED: source_brownout.target_prepared,
    TargetPhase.LOADED: blackout.target_loaded,
    TargetPhase.ACTIVATING: blackout.target_activating,
    TargetPhase.STARTING: blackout.target_starting,
    TargetPhase.RUNNING: target_brownout.target_running,
    TargetPhase.CLEARING: way_back.target_clearing,
    TargetPhase.WITHDRAWING: way_back.target_withdrawing,
    TargetPhase.WITHDRAWN: way_back.target_withdrawn,
    TargetPhase.RETIRING: way_back.target_retiring,
}


def step(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    """Return the next state and what the daemon must do now; an event that means nothing here changes nothing."""
    stage = _STAGES.get(state.phase)
    return stage(state, event) if stage else (state, ())
