"""The controller's role: it plans, watches, asks for aborts and keeps the record. It is never needed in a blackout.

::

    ATTACHING -> PREPARING -> HANDING -> WATCHING -> FINISHING -> DETACHING -> CLOSED     completed
        \\            \\            \\          \\
         +------------+-----------+----------+----> SETTLING -> DETACHING -> CLOSED     aborted, or lost

A migration is closed only by the target's ACTIVATED, the target's WITHDRAWN or the source's OWN(e_s); never by a
timeout (rule R11). Or a person gives it up for a cold restart, which begins with RETIRED(k) or a fence at both ends
(R8). The controller may die at any moment: ``Resumed`` makes it look at both ends again, and they are right.

Where the two ends cannot reach each other it is their courier: it carries the source's GO to the target and the
target's answer back, again and again while one of them wants it. It carries words and makes none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from emp.model.migration import Outcome
from emp.model.orders import Role, RolePhase

FORGOTTEN = "the source went back; its agent was restarted since, and its log says why"
"""where a journal alone attests OWN(e_s)"""


class Phase(StrEnum):
    ATTACHING = "attaching"
    """the target gets the multi-attach volumes"""
    PREPARING = "preparing"
    """the target makes a machine that waits"""
    HANDING = "handing"
    """the source has been told to hand over"""
    WATCHING = "watching"
    """the two agents do it between themselves"""
    FINISHING = "finishing"
    """the EVM runs on the target; the source clears itself"""
    SETTLING = "settling"
    """the EVM stays on the source; the target withdraws"""
    DETACHING = "detaching"
    """the volumes of the side that no longer has the EVM are detached"""
    CLOSED = "closed"


@dataclass(frozen=True)
class Supervisor:
    """What the controller knows of one migration."""

    phase: Phase = Phase.ATTACHING
    outcome: Outcome | None = None
    cause: str | None = None
    handed: bool = False
    """the source may have got the order, or may get it yet"""
    back: bool = False
    """the source has OWN(e_s), so that the order, should it still come, is stale"""
    given: bool = False
    """the source has said GIVEN: GO may be carried"""
    wanted: frozenset[Role] = frozenset()
    """the ends that want a courier now"""
    answer: RolePhase | None = None
    """the target's, ACTIVATED or WITHDRAWN, while the source waits for it"""


# ------------------------------------------------------------------ events


@dataclass(frozen=True)
class Begun:
    """The plan is on disk."""


@dataclass(frozen=True)
class Resumed:
    """The controller has started anew; ``prepared`` if the record holds the target's nonce."""

    prepared: bool


@dataclass(frozen=True)
class Attached:
    pass


@dataclass(frozen=True)
class TargetPrepared:
    pass


@dataclass(frozen=True)
class StepFailed:
    """Attaching, preparing or handing over was refused, or its outcome is unknown (``sure`` false)."""

    reason: str
    sure: bool = True


@dataclass(frozen=True)
class Says:
    """A snapshot of one end; ``phase`` None: its agent knows nothing of this migration."""

    role: Role
    phase: RolePhase | None
    cause: str | None = None
    wants_courier: bool = False


@dataclass(frozen=True)
class NodeLost:
    """The node's agent does not answer any more."""

    role: Role


@dataclass(frozen=True)
class CourierDue:
    """About a second has passed since a word was carried."""


@dataclass(frozen=True)
class GivenUp:
    """A person has ordered a cold restart, and each end can be retired or is fenced (rule R8)."""

    reason: str


@dataclass(frozen=True)
class AbortAsked:
    reason: str


@dataclass(frozen=True)
class Detached:
    pass


Event = (
    Begun
    | Resumed
    | Attached
    | TargetPrepared
    | StepFailed
    | Says
    | NodeLost
    | CourierDue
    | GivenUp
    | AbortAsked
    | Detached
)

# ------------------------------------------------------------------ actions


@dataclass(frozen=True)
class Attach:
    """Attach every volume to the target under e_t; ``Attached`` or ``StepFailed`` follows."""


@dataclass(frozen=True)
class Prepare:
    """Order the target; ``TargetPrepared`` or ``StepFailed`` follows."""


@dataclass(frozen=True)
class HandOver:
    """Order the source; ``Says`` or ``StepFailed`` follows."""


@dataclass(frozen=True)
class Watch:
    """Follow that end's snapshots; each comes back as ``Says``."""

    role: Role


@dataclass(frozen=True)
class Abort:
    """Ask that end to go back. It decides."""

    role: Role
    reason: str
    source_is_back: bool = False
    """to the target: OWN(e_s) has been seen, so that even a copy that has loaded everything must go"""


@dataclass(frozen=True)
class CarryGo:
    """Give the source's GO to the target; what it says comes back as ``Says``, and ``CourierDue`` a second later."""


@dataclass(frozen=True)
class CarryAnswer:
    """Give the target's answer to GO to the source; ``CourierDue`` follows a second later."""

    phase: RolePhase
    """ACTIVATED or WITHDRAWN"""


@dataclass(frozen=True)
class RecordOwner:
    """Write the owner that has been attested: the target under e_t, or the source under e_s (or as before)."""

    role: Role


@dataclass(frozen=True)
class Detach:
    """Detach the volumes from that end; ``Detached`` follows."""

    role: Role


@dataclass(frozen=True)
class Close:
    outcome: Outcome
    cause: str | None


Action = Attach | Prepare | HandOver | Watch | Abort | CarryGo | CarryAnswer | RecordOwner | Detach | Close


def holders(outcome: Outcome) -> frozenset[Role]:
    """Return the ends that could hold authority once a migration has been closed so: a cold restart asks them first.

    While it is open both could (rule R8); so could one that was silent to the last.
    """
    match outcome:
        case Outcome.COMPLETED:
            return frozenset({Role.TARGET})
        case Outcome.ABORTED:
            return frozenset({Role.SOURCE})
        case Outcome.LOST:
            return frozenset(Role)


def step(state: Supervisor, event: Event) -> tuple[Supervisor, tuple[Action, ...]]:
    """Return the next state and what the controller must do now."""
    if state.phase is Phase.CLOSED:
        return state, ()
    state, carried = _carry(state, event)
    state, actions = _step(state, event)
    return state, (*actions, *carried)


def _carry(state: Supervisor, event: Event) -> tuple[Supervisor, tuple[Action, ...]]:
    """The courier: what an end that cannot reach its peer is told, now and again until it stops asking."""
    match event:
        case Says(role, phase, _, wants):
            wanted = state.wanted | {role} if wants else state.wanted - {role}
            given = state.given or (role, phase) == (Role.SOURCE, RolePhase.GIVEN)
            answer = _ANSWERS.get(phase, state.answer) if role is Role.TARGET and phase else state.answer
            news = wanted - state.wanted or (given, answer) != (state.given, state.answer)
            state = replace(state, wanted=wanted, given=given, answer=answer)
            return state, _word(state) if news else ()
        case CourierDue():
            return state, _word(state)
    return state, ()


def _word(state: Supervisor) -> tuple[Action, ...]:
    if not (state.given and state.wanted) or state.phase is Phase.CLOSED:
        return ()
    if state.answer is None:
        return (CarryGo(),)
    return (CarryAnswer(state.answer),) if Role.SOURCE in state.wanted else ()


_ANSWERS = {
    # Not ACTIVATED itself: ``cont`` may still be refused, and the source would have cleared the only copy by then.
    RolePhase.RUNNING: RolePhase.ACTIVATED,
    RolePhase.LOST: RolePhase.ACTIVATED,
    RolePhase.WITHDRAWN: RolePhase.WITHDRAWN,
}


def _step(state: Supervisor, event: Event) -> tuple[Supervisor, tuple[Action, ...]]:
    match event:
        case GivenUp(reason):
            return replace(state, phase=Phase.CLOSED, outcome=Outcome.LOST, cause=reason), (
                Close(Outcome.LOST, reason),
            )
        case Resumed(prepared):
            return _resume(state, prepared)
        case Says(Role.TARGET, RolePhase.RUNNING):
            return _runs_on_target(state)
        case Says(Role.SOURCE, RolePhase.DONE):
            return _source_is_clear(state)
        case Says(Role.SOURCE, RolePhase.ABORTED | RolePhase.LOST as phase, cause):
            return _stays_on_source(state, phase, cause)
        case Says(Role.TARGET, RolePhase.LOST, cause):
            return _lost_on_target(state, cause)
        case Says(Role.TARGET, RolePhase.WITHDRAWN, cause):
            return _withdrawn(state, cause)
        case Says(_, None):
            return _unknown_there(state, event)
        case NodeLost(Role.SOURCE) if state.phase is Phase.FINISHING:
            return _detach(state, Role.SOURCE)  # its copy is stale for ever; its agent clears it when it is back
        case NodeLost(Role.TARGET) if state.phase is Phase.SETTLING and (state.back or not state.handed):
            return _detach(state, Role.TARGET)
        case AbortAsked(reason):
            return _abort(state, reason)
        case Detached() if state.phase is Phase.DETACHING and state.outcome:
            return replace(state, phase=Phase.CLOSED), (Close(state.outcome, state.cause),)
    return _forward(state, event)


def _forward(state: Supervisor, event: Event) -> tuple[Supervisor, tuple[Action, ...]]:
    match state.phase, event:
        case Phase.ATTACHING, Begun():
            return state, (Attach(),)
        case Phase.ATTACHING, Attached():
            return replace(state, phase=Phase.PREPARING), (Prepare(),)
        case Phase.PREPARING, TargetPrepared():
            return replace(state, phase=Phase.HANDING, handed=True), (HandOver(), Watch(Role.TARGET))
        case Phase.HANDING, Says(Role.SOURCE):
            return replace(state, phase=Phase.WATCHING), (Watch(Role.SOURCE),)
        case Phase.ATTACHING, StepFailed(reason):
            return _detach(replace(state, outcome=Outcome.ABORTED, cause=reason), Role.TARGET)
        case Phase.PREPARING, StepFailed(reason):
            return _settle(replace(state, outcome=Outcome.ABORTED, cause=reason))
        case Phase.HANDING, StepFailed(reason, True):
            settling, actions = _settle(replace(state, outcome=Outcome.ABORTED, cause=reason))
            return settling, (*actions, Watch(Role.SOURCE))
        case Phase.HANDING, StepFailed():  # sent, not answered: ask the source itself
            return replace(state, phase=Phase.WATCHING), (Watch(Role.SOURCE),)
    return state, ()


def _resume(state: Supervisor, prepared: bool) -> tuple[Supervisor, tuple[Action, ...]]:
    if not prepared:
        return _settle(replace(state, outcome=Outcome.ABORTED, cause="the controller was restarted in the preparation"))
    watching = Supervisor(Phase.WATCHING, cause=state.cause, handed=True)  # both ends say anew how it stands
    return watching, (Watch(Role.SOURCE), Watch(Role.TARGET))


def _runs_on_target(state: Supervisor) -> tuple[Supervisor, tuple[Action, ...]]:
    if state.phase in (Phase.FINISHING, Phase.DETACHING):
        return state, ()
    finishing = replace(state, phase=Phase.FINISHING, outcome=Outcome.COMPLETED, cause=None)
    # Where the source's answer to the order is late or lost, nobody watches it yet.
    watch = () if state.phase is Phase.WATCHING else (Watch(Role.SOURCE),)
    return finishing, (RecordOwner(Role.TARGET), *watch)


def _source_is_clear(state: Supervisor) -> tuple[Supervisor, tuple[Action, ...]]:
    """DONE is also the source's word, from the target's own answer, that the EVM runs there."""
    if state.phase is Phase.DETACHING:
        return state, ()
    record = () if state.phase is Phase.FINISHING else (RecordOwner(Role.TARGET),)
    detaching, actions = _detach(replace(state, outcome=Outcome.COMPLETED, cause=None), Role.SOURCE)
    return detaching, (*record, *actions)


def _stays_on_source(state: Supervisor, phase: RolePhase, cause: str | None) -> tuple[Supervisor, tuple[Action, ...]]:
    if state.phase is Phase.DETACHING or state.back:
        return state, ()
    outcome = Outcome.LOST if phase is RolePhase.LOST else Outcome.ABORTED
    back = replace(state, outcome=outcome, cause=cause or state.cause or FORGOTTEN, back=True)
    settling, actions = _settle(back, source_is_back=True)
    return settling, (RecordOwner(Role.SOURCE), *actions)


def _lost_on_target(state: Supervisor, cause: str | None) -> tuple[Supervisor, tuple[Action, ...]]:
    """It was activated there and its machine is gone: the target owns it, and only a cold restart helps."""
    if state.phase in (Phase.FINISHING, Phase.DETACHING):
        return state, ()
    lost, actions = _detach(replace(state, outcome=Outcome.LOST, cause=cause), Role.SOURCE)
    return lost, (RecordOwner(Role.TARGET), *actions)


def _withdrawn(state: Supervisor, cause: str | None) -> tuple[Supervisor, tuple[Action, ...]]:
    if state.phase is Phase.SETTLING:
        return _detach(state, Role.TARGET)
    if state.phase in (Phase.PREPARING, Phase.HANDING, Phase.WATCHING):
        if state.handed:  # the source hears it too, goes back, and says so
            return replace(state, cause=state.cause or cause), (
                Abort(Role.SOURCE, cause or "the target has withdrawn"),
            )
        return _detach(replace(state, outcome=Outcome.ABORTED, cause=state.cause or cause), Role.TARGET)
    return state, ()


def _unknown_there(state: Supervisor, says: Says) -> tuple[Supervisor, tuple[Action, ...]]:
    if says.role is Role.SOURCE and state.phase in (Phase.HANDING, Phase.WATCHING):
        # The order has not arrived. Should it still come, the target must have withdrawn: only its word closes (R11).
        return _settle(replace(state, outcome=Outcome.ABORTED, cause=state.cause or "the source never got the order"))
    if says.role is Role.SOURCE and state.phase is Phase.FINISHING:  # its journal is not the one that it had
        return _detach(state, Role.SOURCE)
    if says.role is Role.TARGET and state.phase is Phase.SETTLING:
        return _detach(state, Role.TARGET)
    return state, ()


def _abort(state: Supervisor, reason: str) -> tuple[Supervisor, tuple[Action, ...]]:
    match state.phase:
        case Phase.ATTACHING:
            return replace(state, cause=reason, outcome=Outcome.ABORTED, phase=Phase.DETACHING), (Detach(Role.TARGET),)
        case Phase.PREPARING:
            return _settle(replace(state, outcome=Outcome.ABORTED, cause=reason))
        case Phase.HANDING | Phase.WATCHING:
            return replace(state, cause=reason), (Abort(Role.SOURCE, reason),)
    return state, ()


def _settle(state: Supervisor, *, source_is_back: bool = False) -> tuple[Supervisor, tuple[Action, ...]]:
    abort = Abort(Role.TARGET, state.cause or "the migration was aborted", source_is_back)
    return replace(state, phase=Phase.SETTLING), (abort, Watch(Role.TARGET))


def _detach(state: Supervisor, role: Role) -> tuple[Supervisor, tuple[Action, ...]]:
    return replace(state, phase=Phase.DETACHING), (Detach(role),)
