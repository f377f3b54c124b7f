"""The source's role: ``step`` leads it through the stages. It guarantees that the EVM runs here, or was given away."""

from __future__ import annotations

from emp.migration import blackout, source_brownout, target_brownout, way_back
from emp.migration.events import Action, Event
from emp.migration.states import Source, SourcePhase

_STAGES = {
    SourcePhase.BEGUN: source_brownout.source_begun,
    SourcePhase.PRECOPY: source_brownout.source_precopy,
    SourcePhase.SWITCHOVER: blackout.source_switchover,
    SourcePhase.GIVING: blackout.source_giving,
    SourcePhase.GIVEN: blackout.source_given,
    SourcePhase.CLEARING: target_brownout.source_clearing,
    SourcePhase.CANCELLING: way_back.source_cancelling,
    SourcePhase.RETURNING: way_back.source_returning,
    SourcePhase.RESUMING: way_back.source_resuming,
}


def step(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    """Return the next state and what the daemon must do now; an event that means nothing here changes nothing."""
    stage = _STAGES.get(state.phase)
    return stage(state, event) if stage else (state, ())
