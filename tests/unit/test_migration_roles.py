"""The core's roles, told as transcripts: what happens, and what the daemon is told to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emp.migration import events as e
from emp.migration import source, target
from emp.migration.events import Action, Event, Stream, StreamMoved, Timer, TimerFired, Word, Written
from emp.migration.records import RecordKind as K
from emp.migration.recovery import resume_source, resume_target
from emp.migration.states import Source, SourcePhase, Target, TargetPhase


def new_source() -> Source:
    return Source("web", "m1", "n2", "p1", epoch=1, epoch_target=2, epoch_back=3)


def new_target() -> Target:
    return Target("web", "m1", "n1", "p1", epoch=2)


def short(action: Action) -> str:
    match action:
        case e.WriteRecord(record):
            return f"write {record.kind}({record.epoch})"
        case e.SetTimer(timer):
            return f"timer {timer}"
        case e.SendAnswer(word):
            return f"answer {word}"
    return type(action).__name__


def play_source(state: Source, *happened: Event) -> tuple[Source, list[str]]:
    done: list[str] = []
    for event in happened:
        state, actions = source.step(state, event)
        done += [short(a) for a in actions]
    return state, done


def play_target(state: Target, *happened: Event) -> tuple[Target, list[str]]:
    done: list[str] = []
    for event in happened:
        state, actions = target.step(state, event)
        done += [short(a) for a in actions]
    return state, done


PRECOPY = (e.Ordered(), Written(K.HANDOVER))
SWITCHOVER = (*PRECOPY, StreamMoved(Stream.PRE_SWITCHOVER))
BOTH = (StreamMoved(Stream.COMPLETED), e.TargetLoaded("p1"))
GIVEN = (*SWITCHOVER, *BOTH, Written(K.GIVEN))


def test_source_gives_the_evm_away() -> None:
    state, done = play_source(
        new_source(), *GIVEN, e.TargetAnswered(Word.ACTIVATED, "p1"), Written(K.DONE), e.MachineGone()
    )
    assert done == [
        "write handover(1)",
        "StartStream",
        "timer deadline",
        "ContinueStream",
        "timer blackout",
        "write given(2)",
        "SendGo",
        "Forward",
        "OpenRelays",
        "timer repeat",
        "write done(2)",
        "KillMachine",
    ]
    assert state.phase is SourcePhase.DONE


def test_a_stale_machine_that_ends_by_itself_does_not_end_the_role_without_its_record() -> None:
    activated = (*GIVEN, e.TargetAnswered(Word.ACTIVATED, "p1"))
    state, done = play_source(new_source(), *activated, e.WriteFailed(K.DONE, "EIO"), e.MachineGone())
    assert state.phase is SourcePhase.CLEARING
    state, done = play_source(state, TimerFired(Timer.REPEAT), Written(K.DONE))
    assert done == ["write done(2)", "KillMachine"]
    state, _ = play_source(state, e.MachineGone())
    assert state.phase is SourcePhase.DONE


@pytest.mark.parametrize("order", [BOTH, BOTH[::-1]])
def test_commit_waits_for_both_ends_in_either_order(order: tuple[Event, ...]) -> None:
    state, done = play_source(new_source(), *SWITCHOVER, order[0])
    assert state.phase is SourcePhase.SWITCHOVER
    assert "write given(2)" not in done
    state, done = play_source(state, order[1])
    assert done == ["write given(2)"]


def test_a_loaded_target_of_another_preparation_is_not_believed() -> None:
    state, _ = play_source(new_source(), *SWITCHOVER, StreamMoved(Stream.COMPLETED), e.TargetLoaded("p0"))
    assert state.phase is SourcePhase.SWITCHOVER


@pytest.mark.parametrize(
    "trouble",
    [
        e.AbortAsked("by the user"),
        e.LinkLost(),
        e.TargetFailed("no memory"),
        TimerFired(Timer.DEADLINE),
    ],
)
def test_trouble_in_precopy_leads_back(trouble: Event) -> None:
    state, done = play_source(new_source(), *PRECOPY, trouble)
    assert done[-1] == "CancelStream"
    state, done = play_source(state, StreamMoved(Stream.BROKEN), Written(K.OWN), e.GuestRuns())
    assert done == ["write own(3)", "CloseRelays", "TakeBackFrames", "AwaitGuest", "SendAborted", "ClaimVolumes"]
    assert state.phase is SourcePhase.ABORTED
    assert state.cause


def test_an_abort_after_completed_needs_the_record_and_an_explicit_cont() -> None:
    state, done = play_source(new_source(), *SWITCHOVER, StreamMoved(Stream.COMPLETED), e.AbortAsked("by the user"))
    assert done[-1] == "write own(3)"
    state, done = play_source(state, Written(K.OWN))
    assert done == ["CloseRelays", "TakeBackFrames", "Run", "SendAborted", "ClaimVolumes"]


@pytest.mark.parametrize("event", [e.AbortAsked("late"), e.LinkLost(), TimerFired(Timer.BLACKOUT), e.TargetFailed("x")])
def test_after_the_commit_nothing_but_the_targets_word_leads_back(event: Event) -> None:
    given, _ = play_source(new_source(), *GIVEN)
    state, done = play_source(given, event)
    assert state.phase is SourcePhase.GIVEN
    assert "Run" not in done
    giving, _ = play_source(new_source(), *SWITCHOVER, *BOTH)
    state, done = play_source(giving, event)
    assert state.phase is SourcePhase.GIVING
    assert done == []


def test_silence_repeats_go() -> None:
    given, _ = play_source(new_source(), *GIVEN)
    _, done = play_source(given, TimerFired(Timer.REPEAT), TimerFired(Timer.REPEAT))
    assert done == ["SendGo", "Forward", "OpenRelays", "timer repeat"] * 2


def test_rescue_by_the_targets_word() -> None:
    given, _ = play_source(new_source(), *GIVEN)
    wrong, _ = play_source(given, e.TargetAnswered(Word.WITHDRAWN, "p0"))
    assert wrong.phase is SourcePhase.GIVEN
    state, done = play_source(given, e.TargetAnswered(Word.WITHDRAWN, "p1"), Written(K.OWN), e.GuestRuns())
    assert done == ["write own(3)", "CloseRelays", "TakeBackFrames", "Run", "SendAborted", "ClaimVolumes"]
    assert state.phase is SourcePhase.ABORTED


def test_a_commit_that_could_not_be_written_leads_back_by_a_fresh_record() -> None:
    state, done = play_source(new_source(), *SWITCHOVER, *BOTH, e.WriteFailed(K.GIVEN, "EIO"))
    assert done[-1] == "write own(3)"
    state, done = play_source(state, e.WriteFailed(K.OWN, "EIO"))
    assert state.phase is SourcePhase.STUCK
    assert "Run" not in done
    assert "free or repair the disk" in (state.trouble or "")


def test_the_sources_death_before_the_commit_is_lost_and_says_so() -> None:
    state, done = play_source(new_source(), *PRECOPY, e.MachineGone(), Written(K.OWN))
    assert state.phase is SourcePhase.LOST
    assert done[-3:] == ["write own(3)", "CloseRelays", "SendAborted"]


def test_the_sources_death_when_the_target_has_everything_still_commits() -> None:
    state, _ = play_source(new_source(), *SWITCHOVER, StreamMoved(Stream.COMPLETED))
    state, done = play_source(replace(state, loaded=True), e.MachineGone())
    assert done == ["write given(2)"]


PREPARED = (e.Ordered(), e.MachineReady(7, 9), Written(K.PREPARED))
LOADED = (*PREPARED, StreamMoved(Stream.COMPLETED))
GO = e.GoArrived(2, "p1")
RUNNING = (*LOADED, GO, Written(K.ACTIVATED), e.GuestRuns())


def test_target_takes_the_evm() -> None:
    state, done = play_target(new_target(), *RUNNING)
    assert done == [
        "MakeMachine",
        "write prepared(2)",
        "SendLoaded",
        "timer repeat",
        "write activated(2)",
        "OpenPorts",
        "Run",
        "Announce",
        "answer activated",
        "ClaimVolumes",
    ]
    assert state.phase is TargetPhase.RUNNING


@pytest.mark.parametrize("go", [e.GoArrived(2, "p0"), e.GoArrived(1, "p1")])
def test_target_runs_only_on_its_own_go(go: Event) -> None:
    state, done = play_target(new_target(), *LOADED, go)
    assert state.phase is TargetPhase.LOADED
    assert "Run" not in done


def test_go_before_everything_is_here_does_nothing() -> None:
    state, done = play_target(new_target(), *PREPARED, GO)
    assert state.phase is TargetPhase.PREPARED
    assert "Run" not in done


def test_a_repeated_go_is_answered_and_starts_nothing() -> None:
    state, _ = play_target(new_target(), *RUNNING)
    state, done = play_target(state, GO, GO)
    assert done == ["answer activated"] * 2


@pytest.mark.parametrize("event", [e.AbortAsked("by the user"), TimerFired(Timer.REPEAT), e.LinkLost()])
def test_a_loaded_target_never_withdraws_by_itself(event: Event) -> None:
    state, done = play_target(new_target(), *LOADED, event)
    assert state.phase is TargetPhase.LOADED
    assert "KillMachine" not in done


def test_a_loaded_target_withdraws_when_the_source_went_back() -> None:
    state, done = play_target(new_target(), *LOADED, e.SourceAborted(), e.MachineGone(), Written(K.WITHDRAWN))
    assert done[-3:] == ["KillMachine", "write withdrawn(2)", "answer withdrawn"]
    assert state.phase is TargetPhase.WITHDRAWN


def test_a_go_repeated_while_cont_is_under_way_is_not_answered_yet() -> None:
    starting = (*LOADED, GO, Written(K.ACTIVATED))
    state, _ = play_target(new_target(), *starting)
    assert play_target(state, GO) == (state, [])


def test_a_refused_cont_is_sworn_only_after_the_machines_exit() -> None:
    refused = (*LOADED, GO, Written(K.ACTIVATED), e.RunRefused("locked"))
    state, done = play_target(new_target(), *refused)
    assert done[-2:] == ["BlockPorts", "KillMachine"]
    state, done = play_target(state, e.MachineGone())
    assert done == ["write withdrawn(2)"]


def test_a_machine_that_died_before_cont_was_sent_never_ran() -> None:
    activating = (*LOADED, GO)
    _, done = play_target(new_target(), *activating, e.MachineGone(), Written(K.ACTIVATED), e.MachineGone())
    assert done[-2:] == ["KillMachine", "write withdrawn(2)"]
    assert "Run" not in done


def test_an_unanswered_cont_counts_as_having_run() -> None:
    unknown = (*LOADED, GO, Written(K.ACTIVATED), e.RunUnknown())
    state, done = play_target(new_target(), *unknown)
    assert state.phase is TargetPhase.STARTING
    assert done[-1] == "answer activated"
    state, done = play_target(state, e.MachineGone())
    assert state.phase is TargetPhase.LOST
    assert "write withdrawn(2)" not in done


def test_a_target_that_cannot_be_made_withdraws_and_says_why() -> None:
    state, done = play_target(new_target(), e.Ordered(), e.MachineFailed("no image"), e.MachineGone())
    assert done == ["MakeMachine", "KillMachine", "write withdrawn(2)"]
    assert state.cause == "no image"


def test_a_target_whose_stream_broke_while_its_agent_was_away_clears_itself() -> None:
    prepared, _ = play_target(new_target(), *PREPARED)
    state, event = resume_target(prepared.record(K.PREPARED), alive=True, loaded=False, broken=True)
    state, done = play_target(state, event, e.MachineGone(), Written(K.WITHDRAWN))
    assert done == ["SendFailed", "KillMachine", "write withdrawn(2)", "answer withdrawn"]
    assert state.phase is TargetPhase.WITHDRAWN


@pytest.mark.parametrize("word", [e.AbortAsked("retired"), e.SourceAborted()])
def test_a_target_told_to_go_while_it_is_being_made_withdraws_once_it_is(word: Event) -> None:
    made = (e.Ordered(), word, e.MachineReady(7, 9), Written(K.PREPARED))
    state, done = play_target(new_target(), *made, e.MachineGone(), Written(K.WITHDRAWN))
    assert done[-3:] == ["KillMachine", "write withdrawn(2)", "answer withdrawn"]
    assert state.phase is TargetPhase.WITHDRAWN


# ---------------------------------------------------------------- a journal that cannot be written

STUCK = (*SWITCHOVER, *BOTH, e.WriteFailed(K.GIVEN, "EIO"), e.WriteFailed(K.OWN, "EIO"))


def test_a_stuck_source_tries_again_until_its_record_is_on_disk_and_then_the_guest_runs() -> None:
    stuck, _ = play_source(new_source(), *STUCK)
    state, done = play_source(stuck, TimerFired(Timer.REPEAT), e.WriteFailed(K.OWN, "EIO"), TimerFired(Timer.REPEAT))
    assert done == ["write own(3)", "SendAborted", "timer repeat", "write own(3)", "SendAborted"]
    state, done = play_source(state, Written(K.OWN), e.GuestRuns())
    assert done == ["CloseRelays", "TakeBackFrames", "Run", "SendAborted", "ClaimVolumes"]
    assert (state.phase, state.trouble) == (SourcePhase.ABORTED, None)


def test_a_stuck_source_goes_by_the_targets_oath_and_still_owes_its_record() -> None:
    state, done = play_source(new_source(), *STUCK)
    assert "SendAborted" in done
    assert "Run" not in done
    state, done = play_source(state, e.TargetAnswered(Word.WITHDRAWN, "p1"), e.RunRefused("locked"))
    assert done == ["CloseRelays", "TakeBackFrames", "Run", "timer retry"]
    state, done = play_source(state, TimerFired(Timer.RETRY), e.GuestRuns())
    assert (done, state.phase) == (["CloseRelays", "TakeBackFrames", "Run"], SourcePhase.STUCK)
    state, _ = play_source(state, Written(K.OWN), e.GuestRuns())
    assert state.phase is SourcePhase.ABORTED


def test_silence_never_lets_a_stuck_source_run() -> None:
    stuck, _ = play_source(new_source(), *STUCK)
    _, done = play_source(
        stuck,
        *(TimerFired(timer) for timer in Timer),
        e.LinkLost(),
        e.AbortAsked("now"),
        e.TargetAnswered(Word.WAITING, "p1"),
    )
    assert "Run" not in done


def test_a_commit_that_cannot_be_written_is_tried_again_when_the_target_has_the_last_copy() -> None:
    giving, _ = play_source(new_source(), *SWITCHOVER, *BOTH)
    state, done = play_source(giving, e.MachineGone(), e.WriteFailed(K.GIVEN, "EIO"), TimerFired(Timer.REPEAT))
    assert done == ["timer repeat", "write given(2)"]
    state, done = play_source(state, Written(K.GIVEN))
    assert done[0] == "SendGo"


def test_a_target_that_cannot_write_activated_keeps_its_copy_and_tries_at_each_go() -> None:
    state, done = play_target(new_target(), *LOADED, GO, e.WriteFailed(K.ACTIVATED, "EIO"))
    assert (state.phase, done[-2:]) == (TargetPhase.LOADED, ["SendFailed", "timer repeat"])
    assert "free or repair the disk" in (state.trouble or "")
    state, done = play_target(state, GO, Written(K.ACTIVATED))
    assert done == ["write activated(2)", "OpenPorts", "Run"]
    assert state.trouble is None


# ---------------------------------------------------------------- cont refused after an abort


def test_a_guest_that_may_run_and_does_not_is_tried_again() -> None:
    state, done = play_source(new_source(), *PRECOPY, e.AbortAsked("no"), StreamMoved(Stream.BROKEN), Written(K.OWN))
    state, done = play_source(state, e.RunRefused("locked"), TimerFired(Timer.RETRY), e.RunRefused("locked"))
    assert done == ["timer retry", "Run", "timer retry"]
    assert state.phase is SourcePhase.RESUMING
    assert "locked" in (state.trouble or "")
    state, _ = play_source(state, e.GuestRuns())
    assert (state.phase, state.trouble) == (SourcePhase.ABORTED, None)


@pytest.mark.parametrize(
    ("end", "phase"),
    [(e.GuestEnded("shutdown"), SourcePhase.ABORTED), (e.MachineGone(), SourcePhase.LOST)],
)
def test_nothing_is_tried_for_a_guest_that_has_ended(end: Event, phase: SourcePhase) -> None:
    returning = (*PRECOPY, e.AbortAsked("no"), StreamMoved(Stream.BROKEN), Written(K.OWN))
    state, _ = play_source(new_source(), *returning, e.RunRefused("x"), end)
    assert state.phase is phase


# ---------------------------------------------------------------- questions


def handed_over() -> Source:
    state, _ = play_source(new_source(), e.Ordered())
    return state


def test_a_source_restarted_before_the_commit_asks_its_target_first() -> None:
    state, event = resume_source(handed_over().record(K.HANDOVER), alive=True, completed=True)
    state, done = play_source(state, event, TimerFired(Timer.REPEAT))
    assert done == ["Ask", "timer repeat", "timer answer", "Ask", "timer repeat"]
    _, done = play_source(state, e.TargetAnswered(Word.WAITING, "p0"))
    assert done == []
    for answer in (
        e.TargetAnswered(Word.WAITING, "p1"),
        e.TargetAnswered(Word.WITHDRAWN, "p1"),
        e.TargetLoaded("p1"),
        TimerFired(Timer.ANSWER),
    ):
        _, done = play_source(state, answer, Written(K.OWN))
        assert done == ["write own(3)", "CloseRelays", "TakeBackFrames", "Run", "SendAborted", "ClaimVolumes"]


@pytest.mark.parametrize("word", [Word.GOING, Word.ACTIVATED])
def test_a_source_whose_journal_has_lost_the_commit_never_runs(word: Word) -> None:
    state, event = resume_source(handed_over().record(K.HANDOVER), alive=True, completed=True)
    state, done = play_source(state, event, e.TargetAnswered(word, "p1"))
    assert state.phase is SourcePhase.OVERRULED
    assert done[-2:] == ["Quarantine", "timer repeat"]
    _, done = play_source(state, *(TimerFired(timer) for timer in Timer), e.AbortAsked("x"), e.LinkLost())
    assert done == ["Ask", "timer repeat"]
    _, done = play_source(state, e.TargetAnswered(Word.WITHDRAWN, "p1"), Written(K.OWN))
    assert done[:4] == ["write own(3)", "CloseRelays", "TakeBackFrames", "Run"]


def test_a_loaded_target_that_hears_nothing_asks_and_wants_a_courier() -> None:
    state, _ = play_target(new_target(), *LOADED)
    assert not state.wants_courier
    state, done = play_target(state, TimerFired(Timer.REPEAT))
    assert done == ["SendLoaded", "Ask", "timer repeat"]
    assert state.wants_courier
    state, _ = play_target(state, GO)
    assert not state.wants_courier


def test_a_source_whose_go_is_not_answered_wants_a_courier_and_only_then() -> None:
    given, _ = play_source(new_source(), *GIVEN)
    assert not given.wants_courier
    silent, _ = play_source(given, TimerFired(Timer.REPEAT))
    assert silent.wants_courier
    state, _ = play_source(silent, e.TargetAnswered(Word.ACTIVATED, "p1"))
    assert not state.wants_courier


def test_a_committed_source_tells_its_target_that_asks() -> None:
    given, _ = play_source(new_source(), *GIVEN)
    assert play_source(given, e.PeerAsks("p1"))[1] == ["SendGo"]
    assert play_source(given, e.PeerAsks("p0"))[1] == []


@pytest.mark.parametrize(
    ("happened", "answer"),
    [
        (PREPARED, "answer waiting"),
        (LOADED, "answer waiting"),
        ((*LOADED, GO), "answer going"),
        ((*LOADED, GO, Written(K.ACTIVATED)), "answer going"),
        (RUNNING, "answer activated"),
    ],
)
def test_a_target_says_where_it_stands(happened: tuple[Event, ...], answer: str) -> None:
    state, _ = play_target(new_target(), *happened)
    assert play_target(state, e.PeerAsks("p1"))[1] == [answer]
    assert play_target(state, e.PeerAsks("p0"))[1] == []


def test_a_target_that_was_left_alone_before_it_had_everything_asks_too() -> None:
    state, _ = play_target(new_target(), *PREPARED)
    state, done = play_target(state, e.LinkLost(), TimerFired(Timer.REPEAT))
    assert done == ["timer repeat", "Ask", "timer repeat"]
    assert state.phase is TargetPhase.PREPARED


# ---------------------------------------------------------------- retire


@pytest.mark.parametrize("happened", [PRECOPY, SWITCHOVER, GIVEN, STUCK])
def test_a_retired_source_kills_what_is_here_wherever_it_stood(happened: tuple[Event, ...]) -> None:
    state, _ = play_source(new_source(), *happened)
    state, done = play_source(state, e.Retired(), e.MachineGone())
    assert (state.phase, done) == (SourcePhase.LOST, ["CloseRelays", "KillMachine"])


def test_a_retired_target_swears_only_where_cont_cannot_have_been_sent() -> None:
    _, done = play_target(new_target(), *LOADED, e.Retired(), e.MachineGone())
    assert done[-1] == "write withdrawn(2)"
    state, done = play_target(new_target(), *LOADED, GO, Written(K.ACTIVATED), e.Retired(), e.MachineGone())
    assert (state.phase, done[-2:]) == (TargetPhase.LOST, ["BlockPorts", "KillMachine"])
