"""The source's role: ``step`` leads it through the stages. It guarantees that the EVM runs here, or was given away."""

from __future__ import annotations

from emp.migration import blackout, source_brownout, target_brownout, way_back
from emp.migration.events import Action, Event, Retired
from emp.migration.states import Source, SourcePhase

_STAGES = {
    SourcePhase.BEGUN: source_brownout.source_begun,
    SourcePhase.PRECOPY: source_brownout.source_precopy,
    SourcePhase.SWITCHOVER: blackout.source_switchover,
    SourcePhase.GIVING: blackout.source_giving,
    SourcePhase.GIVEN: blackout.source_given,
    SourcePhase.CLEARING: target_brownout.source_clearing,
    SourcePhase.DISMANTLING: target_brownout.source_dismantling,
    SourcePhase.ASKING: way_back.source_asking,
    SourcePhase.OVERRULED: way_back.source_overruled,
    SourcePhase.CANCELLING: way_back.source_cancelling,
    SourcePhase.RETURNING: way_back.source_returning,
    SourcePhase.RESUMING: way_back.source_resuming,
    SourcePhase.STUCK: way_back.source_stuck,
    SourcePhase.RETIRING: way_back.source_retiring,
}


def step(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """Return the next state and what the daemon must do now; an event that means nothing here changes nothing."""
    stage = _STAGES.get(state.phase)
    if stage and isinstance(event, Retired):
        return way_back.source_retires(state)
    return stage(state, event) if stage else (state, ())
