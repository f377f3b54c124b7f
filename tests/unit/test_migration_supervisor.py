"""The controller's role: what it does in which order, and that only the owners' words close a migration."""

from __future__ import annotations

import pytest

from emp.migration.supervisor import (
    FORGOTTEN,
    Abort,
    AbortAsked,
    Action,
    Attach,
    Attached,
    Begun,
    CarryAnswer,
    CarryGo,
    Close,
    CourierDue,
    Detach,
    Detached,
    Event,
    GivenUp,
    HandOver,
    NodeLost,
    Phase,
    Prepare,
    RecordOwner,
    Resumed,
    Says,
    StepFailed,
    Supervisor,
    TargetPrepared,
    Watch,
    step,
)
from emp.model.migration import Outcome
from emp.model.orders import Role, RolePhase

S, T = Role.SOURCE, Role.TARGET
HANDED = (Begun(), Attached(), TargetPrepared(), Says(S, RolePhase.PRECOPY))


def play(*happened: Event, state: Supervisor | None = None) -> tuple[Supervisor, list[Action]]:
    done: list[Action] = []
    state = state or Supervisor()
    for event in happened:
        state, actions = step(state, event)
        done += actions
    return state, done


def test_there() -> None:
    state, done = play(*HANDED, Says(T, RolePhase.RUNNING), Says(S, RolePhase.DONE), Detached())
    assert done == [
        Attach(),
        Prepare(),
        HandOver(),
        Watch(T),
        Watch(S),
        RecordOwner(T),
        Detach(S),
        Close(Outcome.COMPLETED, None),
    ]
    assert state.phase is Phase.CLOSED


def test_a_target_that_runs_before_the_source_has_answered_has_the_source_watched() -> None:
    state, done = play(Begun(), Attached(), TargetPrepared(), Says(T, RolePhase.RUNNING))
    assert done[-2:] == [RecordOwner(T), Watch(S)]
    state, done = play(StepFailed("timeout", sure=False), Says(S, RolePhase.DONE), Detached(), state=state)
    assert done == [Detach(S), Close(Outcome.COMPLETED, None)]


def test_the_sources_done_is_enough_when_the_targets_word_is_late() -> None:
    _state, done = play(*HANDED, Says(S, RolePhase.DONE), Says(T, RolePhase.RUNNING), Detached())
    assert done[-3:] == [RecordOwner(T), Detach(S), Close(Outcome.COMPLETED, None)]


def test_back() -> None:
    _state, done = play(
        *HANDED,
        AbortAsked("by the user"),
        Says(S, RolePhase.ABORTED, "by the user"),
        Says(T, RolePhase.WITHDRAWN),
        Detached(),
    )
    assert done[5:] == [
        Abort(S, "by the user"),
        RecordOwner(S),
        Abort(T, "by the user", source_is_back=True),
        Watch(T),
        Detach(T),
        Close(Outcome.ABORTED, "by the user"),
    ]


def test_a_target_that_could_not_be_prepared_is_told_to_withdraw() -> None:
    _state, done = play(Begun(), Attached(), StepFailed("no memory"), Says(T, None), Detached())
    assert done[2:] == [Abort(T, "no memory"), Watch(T), Detach(T), Close(Outcome.ABORTED, "no memory")]


def test_an_unanswered_handover_is_asked_about_not_assumed() -> None:
    state, done = play(Begun(), Attached(), TargetPrepared(), StepFailed("timeout", sure=False))
    assert done[-1] == Watch(S)
    assert state.phase is Phase.WATCHING


def test_a_source_that_never_got_the_order_frees_the_target() -> None:
    state, done = play(Begun(), Attached(), TargetPrepared(), StepFailed("timeout", sure=False), Says(S, None))
    assert state.phase is Phase.SETTLING
    assert Abort(T, "the source never got the order") in done


@pytest.mark.parametrize("role", [S, T])
def test_a_node_that_is_silent_closes_nothing_before_the_owner_is_known(role: Role) -> None:
    state, done = play(*HANDED, NodeLost(role))
    assert state.phase is Phase.WATCHING
    assert not any(isinstance(a, Close | Detach | RecordOwner) for a in done)


def test_an_order_that_may_still_arrive_keeps_the_migration_open_until_the_target_has_withdrawn() -> None:
    """Rule R11: the source does not know of it yet, the target is silent: neither's word has come."""
    resumed = (Resumed(prepared=True), Says(S, None))
    state, done = play(*resumed, NodeLost(T))
    assert state.phase is Phase.SETTLING
    assert not any(isinstance(a, Detach) for a in done)
    _state, done = play(Says(T, RolePhase.WITHDRAWN), Detached(), state=state)
    assert done[-1] == Close(Outcome.ABORTED, "the source never got the order")


def test_a_silent_target_does_not_hold_up_a_source_that_is_back() -> None:
    _state, done = play(*HANDED, Says(S, RolePhase.ABORTED, "link"), NodeLost(T), Detached())
    assert done[-1] == Close(Outcome.ABORTED, "link")


def test_a_source_lost_after_the_target_runs_does_not_hold_the_end_up() -> None:
    _state, done = play(*HANDED, Says(T, RolePhase.RUNNING), NodeLost(S), Detached())
    assert done[-1] == Close(Outcome.COMPLETED, None)


def test_a_restarted_controller_asks_both_ends() -> None:
    _state, done = play(Resumed(prepared=True), Says(T, RolePhase.RUNNING), Says(S, RolePhase.DONE), Detached())
    assert done == [Watch(S), Watch(T), RecordOwner(T), Detach(S), Close(Outcome.COMPLETED, None)]
    _state, done = play(Resumed(prepared=False), Says(T, RolePhase.WITHDRAWN), Detached())
    assert isinstance(done[0], Abort)
    assert done[-1] == Close(Outcome.ABORTED, "the controller was restarted in the preparation")


def test_who_looks_at_both_ends_anew_forgets_what_they_had_said() -> None:
    """A step that failed unforeseen, after the source had come back."""
    back = Says(S, RolePhase.ABORTED, "asked")
    _state, done = play(*HANDED, back, Resumed(prepared=True), back, Says(T, RolePhase.WITHDRAWN), Detached())
    assert done[-1] == Close(Outcome.ABORTED, "asked")


def test_a_target_lost_after_its_activation_never_brings_the_source_back() -> None:
    _state, done = play(*HANDED, Says(T, RolePhase.LOST, "its QEMU died"), Detached())
    assert RecordOwner(T) in done
    assert done[-1] == Close(Outcome.LOST, "its QEMU died")
    assert not any(isinstance(a, Abort) for a in done)


def test_an_abort_after_the_evm_runs_on_the_target_changes_nothing() -> None:
    running, _ = play(*HANDED, Says(T, RolePhase.RUNNING))
    state, done = play(AbortAsked("late"), state=running)
    assert (state, done) == (running, [])


def test_a_source_that_has_forgotten_the_migration_does_not_hold_its_end_up() -> None:
    _state, done = play(*HANDED, Says(T, RolePhase.RUNNING), Says(S, None), Detached())
    assert done[-2:] == [Detach(S), Close(Outcome.COMPLETED, None)]


# ------------------------------------------------------------------ the courier

GIVEN = Says(S, RolePhase.GIVEN, wants_courier=True)
LOADED = Says(T, RolePhase.SWITCHOVER, wants_courier=True)


def test_the_sources_go_is_carried_and_the_targets_answer_brought_back() -> None:
    state, done = play(*HANDED, GIVEN)
    assert done[-1] == CarryGo()
    state, done = play(CourierDue(), GIVEN, state=state)
    assert done == [CarryGo()], "again, once the pause is over and not at every word"
    state, done = play(Says(T, RolePhase.RUNNING), CourierDue(), state=state)
    assert done == [RecordOwner(T), CarryAnswer(RolePhase.ACTIVATED), CarryAnswer(RolePhase.ACTIVATED)]
    _state, done = play(Says(S, RolePhase.DONE), CourierDue(), Detached(), state=state)
    assert done == [Detach(S), Close(Outcome.COMPLETED, None)]


def test_a_target_whose_start_is_not_confirmed_is_not_quoted() -> None:
    """Its ``cont`` may still be refused: told now, the source would clear its copy, and nobody could be rescued."""
    state, _ = play(*HANDED, GIVEN)
    state, done = play(Says(T, RolePhase.ACTIVATED), CourierDue(), state=state)
    assert not any(isinstance(action, CarryAnswer) for action in done)
    _state, done = play(Says(T, RolePhase.WITHDRAWN, "cont was refused"), CourierDue(), state=state)
    assert CarryAnswer(RolePhase.WITHDRAWN) in done


def test_a_withdrawal_is_carried_back_too_and_the_source_is_rescued() -> None:
    state, _ = play(*HANDED, GIVEN)
    state, done = play(Says(T, RolePhase.WITHDRAWN, "cont was refused"), state=state)
    assert done == [Abort(S, "cont was refused"), CarryAnswer(RolePhase.WITHDRAWN)]
    _state, done = play(Says(S, RolePhase.ABORTED, "rescued"), CourierDue(), state=state)
    assert not any(isinstance(action, CarryGo | CarryAnswer) for action in done)


def test_activated_is_not_carried_before_the_guest_runs() -> None:
    """``cont`` may still be refused, and the source would have cleared the only copy."""
    state, _ = play(*HANDED, GIVEN)
    _state, done = play(Says(T, RolePhase.ACTIVATED), CourierDue(), state=state)
    assert not any(isinstance(action, CarryAnswer) for action in done)


def test_nothing_is_carried_that_nobody_has_said() -> None:
    """A target that waits is told neither GO nor abort before the source has said which."""
    state, done = play(*HANDED, LOADED, CourierDue())
    assert not any(isinstance(action, CarryGo | Abort) for action in done)
    _state, done = play(Says(S, RolePhase.GIVEN), state=state)
    assert done == [CarryGo()], "the source can reach nobody else either, or the target would not ask"


def test_a_target_that_waits_is_told_that_the_source_is_back() -> None:
    _state, done = play(*HANDED, LOADED, Says(S, RolePhase.ABORTED, "T_d"))
    assert Abort(T, "T_d", source_is_back=True) in done
    assert CarryGo() not in done


def test_an_end_that_needs_no_courier_gets_none() -> None:
    _state, done = play(*HANDED, Says(S, RolePhase.GIVEN), CourierDue(), Says(T, RolePhase.RUNNING), CourierDue())
    assert not any(isinstance(action, CarryGo | CarryAnswer) for action in done)


def test_a_restarted_controller_carries_on() -> None:
    _state, done = play(Resumed(prepared=True), GIVEN)
    assert done == [Watch(S), Watch(T), CarryGo()]


@pytest.mark.parametrize("happened", [(Begun(),), HANDED, (*HANDED, GIVEN), (*HANDED, Says(S, RolePhase.ABORTED))])
def test_given_up_is_lost_in_every_phase_and_nothing_follows(happened: tuple[Event, ...]) -> None:
    state, _ = play(*happened)
    state, done = play(GivenUp("a cold restart"), GIVEN, Says(T, RolePhase.RUNNING), CourierDue(), state=state)
    assert done == [Close(Outcome.LOST, "a cold restart")]
    assert state.phase is Phase.CLOSED


def test_a_source_whose_journal_alone_knows_that_it_went_back_gives_a_cause_all_the_same() -> None:
    _, done = play(*HANDED, Says(S, RolePhase.ABORTED), Says(T, RolePhase.WITHDRAWN), Detached())
    assert done[-1] == Close(Outcome.ABORTED, FORGOTTEN)
