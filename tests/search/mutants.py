"""The rules of the protocol, each broken on purpose in the project's own functions: a search must find every one.

A search that let one through could not be trusted. ``found_in`` is a world that is large enough for it; the rule's
number is that of docs/design/0004.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from emp.migration import admission, recovery, source, supervisor, sweep, target, way_back
from emp.migration import events as e
from emp.migration.events import Action, Event, Timer, TimerFired, Word
from emp.migration.records import OWNING, Ledger, Record, RecordKind
from emp.migration.states import Source, SourcePhase, Target, TargetPhase
from emp.migration.supervisor import Supervisor
from emp.model.errors import Conflict
from emp.model.migration import Outcome
from emp.model.orders import Role
from tests.search import project
from tests.search.explore import Configuration
from tests.search.project import Project
from tests.search.world import Faults

K = RecordKind
SourceResult = tuple[Source, tuple[Action, ...]]
TargetResult = tuple[Target, tuple[Action, ...]]
SupervisorResult = tuple[Supervisor, tuple[supervisor.Action, ...]]


# ---------------------------------------------------------------- the source


def commits_before_both_have_everything(state: Source, event: Event) -> SourceResult:
    if state.phase is SourcePhase.SWITCHOVER and isinstance(event, e.TargetLoaded):
        state = replace(state, completed=True)
    return source.step(state, event)


def goes_before_given_is_on_disk(state: Source, event: Event) -> SourceResult:
    state, actions = source.step(state, event)
    gives = any(isinstance(a, e.WriteRecord) and a.record.kind is K.GIVEN for a in actions)
    return state, (e.SendGo(), *actions) if gives else actions


def goes_back_on_a_timeout(state: Source, event: Event) -> SourceResult:
    if state.phase is SourcePhase.GIVEN and event == TimerFired(Timer.REPEAT):
        return way_back.source_is_rescued(state)
    return source.step(state, event)


def goes_back_when_asked_after_the_commit(state: Source, event: Event) -> SourceResult:
    if state.phase is SourcePhase.GIVEN and isinstance(event, e.AbortAsked):
        return way_back.source_is_rescued(state)
    return source.step(state, event)


def goes_back_when_the_link_is_lost_after_the_commit(state: Source, event: Event) -> SourceResult:
    if state.phase is SourcePhase.GIVEN and isinstance(event, e.LinkLost):
        return way_back.source_is_rescued(state)
    return source.step(state, event)


def resumes_without_its_record(state: Source, event: Event) -> SourceResult:
    state, actions = source.step(state, event)
    if state.phase is SourcePhase.RETURNING and state.completed:
        return replace(state, phase=SourcePhase.RESUMING), (e.Run(),)
    return state, actions


def takes_a_failed_write_for_not_given(state: Source, event: Event) -> SourceResult:
    if state.phase is SourcePhase.GIVING and isinstance(event, e.WriteFailed):
        return replace(state, phase=SourcePhase.RESUMING), (e.Run(), e.SendAborted())
    return source.step(state, event)


def opens_its_relays_before_given_is_on_disk(state: Source, event: Event) -> SourceResult:
    state, actions = source.step(state, event)
    gives = any(isinstance(a, e.WriteRecord) and a.record.kind is K.GIVEN for a in actions)
    return state, (e.OpenRelays(), *actions) if gives else actions


def runs_beside_its_relays(state: Source, event: Event) -> SourceResult:
    state, actions = source.step(state, event)
    return state, tuple(a for a in actions if not isinstance(a, e.CloseRelays))


def gives_up_repeating_go(state: Source, event: Event) -> SourceResult:
    state, actions = source.step(state, event)
    return state, tuple(a for a in actions if not (state.phase is SourcePhase.GIVEN and isinstance(a, e.SetTimer)))


def starts_the_stream_before_handover_is_on_disk(state: Source, event: Event) -> SourceResult:
    if state.phase is SourcePhase.BEGUN and isinstance(event, e.Ordered):
        return replace(state, phase=SourcePhase.PRECOPY), (e.StartStream(), e.SetTimer(Timer.DEADLINE))
    return source.step(state, event)


def ends_without_done(state: Source, event: Event) -> SourceResult:
    if state.phase is SourcePhase.CLEARING and isinstance(event, e.MachineGone):
        return replace(state, phase=SourcePhase.DONE), ()
    return source.step(state, event)


def forgets_that_given_was_its_last_record(last: Record, **machine: bool) -> tuple[Source, Event]:
    state, event = recovery.resume_source(last, **machine)
    if last.kind is K.GIVEN and machine["alive"]:
        return replace(state, phase=SourcePhase.SWITCHOVER), e.AbortAsked("restarted")
    return state, event


# ---------------------------------------------------------------- the target


def activates_without_go(state: Target, event: Event) -> TargetResult:
    if state.phase is TargetPhase.LOADED and event == TimerFired(Timer.REPEAT):
        event = e.GoArrived(state.epoch, state.nonce)
    return target.step(state, event)


def runs_before_activated_is_on_disk(state: Target, event: Event) -> TargetResult:
    if state.phase is TargetPhase.LOADED and isinstance(event, e.GoArrived):
        return replace(state, phase=TargetPhase.STARTING), (e.OpenPorts(), e.Run())
    return target.step(state, event)


def opens_its_port_early(state: Target, event: Event) -> TargetResult:
    state, actions = target.step(state, event)
    return state, (e.OpenPorts(), *actions) if state.phase is TargetPhase.LOADED else actions


def answers_go_before_the_guest_runs(state: Target, event: Event) -> TargetResult:
    if state.phase is TargetPhase.STARTING and isinstance(event, e.GoArrived):
        return state, (e.SendAnswer(Word.ACTIVATED),)
    return target.step(state, event)


def withdraws_by_a_timer_once_loaded(state: Target, event: Event) -> TargetResult:
    if state.phase is TargetPhase.LOADED and event == TimerFired(Timer.REPEAT):
        return way_back.target_withdraws(state, "nobody answers")
    return target.step(state, event)


def withdraws_when_asked_once_loaded(state: Target, event: Event) -> TargetResult:
    if state.phase is TargetPhase.LOADED and isinstance(event, e.AbortAsked):
        return way_back.target_withdraws(state, "asked")
    return target.step(state, event)


def takes_an_unanswered_cont_for_refused(state: Target, event: Event) -> TargetResult:
    if state.phase is TargetPhase.STARTING and isinstance(event, e.RunUnknown):
        event = e.RunRefused("no answer")
    return target.step(state, event)


def swears_before_its_machine_is_dead(state: Target, event: Event) -> TargetResult:
    before = state.phase
    state, actions = target.step(state, event)
    if state.phase is TargetPhase.CLEARING and before is not TargetPhase.CLEARING:
        withdrawn = e.WriteRecord(state.record(K.WITHDRAWN))
        return replace(state, phase=TargetPhase.WITHDRAWING), (withdrawn, e.SendAnswer(Word.WITHDRAWN))
    return state, actions


def swears_before_it_is_on_disk(state: Target, event: Event) -> TargetResult:
    state, actions = target.step(state, event)
    return state, (e.SendAnswer(Word.WITHDRAWN), *actions) if state.phase is TargetPhase.ACTIVATING else actions


# ---------------------------------------------------------------- orders, sweeps, words


def _owning_only(ledger: Ledger, _epoch: int) -> None:
    if ledger.last and ledger.last.kind in OWNING:
        raise Conflict("here")


def boots_from_its_journal(last: Record | None) -> Any:
    return "boot" if last is not None and last.kind in OWNING else sweep.sweep(last)


def owns_what_it_has_given(last: Record | None) -> sweep.Sweep:
    return sweep.Sweep.OWNED if last is not None and last.kind is K.GIVEN else sweep.sweep(last)


def clears_what_it_does_not_know(last: Record | None) -> sweep.Sweep:
    return sweep.Sweep.CLEAR if last is None else sweep.sweep(last)


def clears_what_is_arriving(last: Record | None) -> sweep.Sweep:
    return sweep.Sweep.CLEAR if last is not None and last.kind is K.PREPARED else sweep.sweep(last)


def takes_activated_for_not_yet_run(last: Record | None) -> sweep.Sweep:
    return sweep.Sweep.ARRIVING if last is not None and last.kind is K.ACTIVATED else sweep.sweep(last)


def anything_paused_waits(_last: Record, *, loaded: bool, completed: bool) -> bool:
    return loaded or completed


def nothing_waits(_last: Record, **_machine: bool) -> bool:
    return False


def tells_a_source_that_nothing_ran(ledger: Ledger, migration: str) -> tuple[Word, str | None] | None:
    sworn = admission.word_of(ledger, migration)
    return (Word.WITHDRAWN, sworn[1]) if sworn else None


# ---------------------------------------------------------------- the controller


def closes_when_the_target_is_silent(state: Supervisor, event: supervisor.Event) -> SupervisorResult:
    if isinstance(event, supervisor.NodeLost) and state.phase is supervisor.Phase.WATCHING:
        state = replace(state, phase=supervisor.Phase.DETACHING, outcome=Outcome.ABORTED)
        return state, (supervisor.Detach(Role.TARGET),)
    return supervisor.step(state, event)


def closes_though_the_order_may_still_come(state: Supervisor, event: supervisor.Event) -> SupervisorResult:
    if event == supervisor.NodeLost(Role.TARGET) and state.phase is supervisor.Phase.SETTLING:
        return replace(state, phase=supervisor.Phase.DETACHING), (supervisor.Detach(Role.TARGET),)
    return supervisor.step(state, event)


def detaches_the_target_as_soon_as_an_abort_is_asked(state: Supervisor, event: supervisor.Event) -> SupervisorResult:
    if isinstance(event, supervisor.AbortAsked) and state.phase is supervisor.Phase.WATCHING:
        state = replace(state, phase=supervisor.Phase.DETACHING, outcome=Outcome.ABORTED)
        return state, (supervisor.Detach(Role.TARGET),)
    return supervisor.step(state, event)


def shuts_the_source_out_before_the_target_runs(state: Supervisor, event: supervisor.Event) -> SupervisorResult:
    after, actions = supervisor.step(state, event)
    if isinstance(event, supervisor.TargetPrepared):
        return after, (*actions, supervisor.Detach(Role.SOURCE))
    return after, actions


def carries_nothing(state: Supervisor, event: supervisor.Event) -> SupervisorResult:
    state, actions = supervisor.step(state, event)
    return state, tuple(a for a in actions if not isinstance(a, supervisor.CarryGo | supervisor.CarryAnswer))


def guard_resumes_what_has_completed(status: str) -> list[str]:
    return ["cont"] if status == "completed" else project.guards(status)


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Mutant:
    rule: str
    what: str
    project: Project
    found_in: Configuration


def _in(
    migrations: int = 1, *, fine: bool = False, fence: str = "node", cold_first: bool = False, **faults: int
) -> Configuration:
    return Configuration(
        "mutant", Faults(**faults), migrations=migrations, fine=fine, fence=fence, cold_first=cold_first
    )


def _source(rule: str, step: Any, found_in: Configuration) -> Mutant:
    return Mutant(rule, f"the source {_words(step)}", Project(source=step), found_in)


def _target(rule: str, step: Any, found_in: Configuration) -> Mutant:
    return Mutant(rule, f"the target {_words(step)}", Project(target=step), found_in)


def _controller(rule: str, step: Any, found_in: Configuration) -> Mutant:
    return Mutant(rule, f"the controller {_words(step)}", Project(supervisor=step), found_in)


def _agent(rule: str, found_in: Configuration, what: str, **functions: Any) -> Mutant:
    return Mutant(rule, f"an agent {what}", Project(**functions), found_in)


def _words(step: Any) -> str:
    return str(step.__name__).replace("_", " ")


MUTANTS = (
    _agent(
        "R1",
        _in(kill=1),
        "sends cont in GIVEN",
        sweep=owns_what_it_has_given,
        waits_for_its_owner=anything_paused_waits,
    ),
    _agent("R1", _in(kill=1), "leaves standing what it owns", waits_for_its_owner=nothing_waits),
    _target("R1", runs_before_activated_is_on_disk, _in(kill=1)),
    _source("R2", goes_back_on_a_timeout, _in()),
    _source("R2", goes_back_when_asked_after_the_commit, _in(abort=1)),
    _source("R2", goes_back_when_the_link_is_lost_after_the_commit, _in(link=1)),
    _source("R2", resumes_without_its_record, _in(kill=1, abort=1)),
    _source("R2", commits_before_both_have_everything, _in(stream=1)),
    _agent("R2", _in(kill=1), "forgets that it has given", resume_source=forgets_that_given_was_its_last_record),
    _agent("R2", _in(), "swears that nothing ran when it did", word_of=tells_a_source_that_nothing_ran),
    _source("relay", opens_its_relays_before_given_is_on_disk, _in(kill=1)),
    _source("relay", runs_beside_its_relays, _in(refuse=1)),
    _source("R3", goes_before_given_is_on_disk, _in(stream=1, kill=1)),
    _target("R3", activates_without_go, _in()),
    _target("R3", withdraws_by_a_timer_once_loaded, _in(die=1)),
    _target("R3", withdraws_when_asked_once_loaded, _in(die=1, abort=1)),
    _target("R4", takes_an_unanswered_cont_for_refused, _in(reply=1, fine=True)),
    _target("R4", answers_go_before_the_guest_runs, _in(refuse=1, fine=True)),
    _target("R4", swears_before_its_machine_is_dead, _in(abort=1, stream=1)),
    _target("R4", swears_before_it_is_on_disk, _in(kill=1)),
    _agent("R4", _in(kill=1, io=1), "takes ACTIVATED for not yet run", sweep=takes_activated_for_not_yet_run),
    _agent("R5", _in(journal=1), "kills a machine that it does not know", sweep=clears_what_it_does_not_know),
    _agent("R5", _in(kill=1, die=1), "kills a machine that was promised", sweep=clears_what_is_arriving),
    _source("R6", gives_up_repeating_go, _in(cut=1)),
    _agent("R7", _in(3), "takes a PREPARE that is stale", check_prepare=_owning_only),
    _agent(
        "R8", _in(cold=1), "is not asked: the owner alone is fenced", could_hold=lambda owner, _: frozenset({owner})
    ),
    _agent("R8", _in(cold=1), "is not asked: nobody is fenced", could_hold=lambda *_: frozenset()),
    _agent("R8", _in(cold=1, fence="epoch"), "gets k from the owner's epoch", cold_epoch=lambda _, owner: owner + 1),
    _agent("R9", _in(cold=1, kill=1, image=1), "boots what its journal has", sweep=boots_from_its_journal),
    _source("R10", takes_a_failed_write_for_not_given, _in(kill=1, write=1)),
    _source("R10", starts_the_stream_before_handover_is_on_disk, _in(kill=1)),
    _source("R10", ends_without_done, _in(write=1, die=1)),
    _controller("R11", closes_when_the_target_is_silent, _in(silent=1)),
    _controller("R11", closes_though_the_order_may_still_come, _in(controller=1, order=1, silent=1)),
    Mutant("R12", "nothing guards a switchover", Project(guards=lambda _: []), _in(gone=1)),
    Mutant(
        "R12",
        "the guard resumes a guest that has completed",
        Project(guards=guard_resumes_what_has_completed),
        _in(kill=1),
    ),
    _target("I5", opens_its_port_early, _in()),
    _controller("I7", detaches_the_target_as_soon_as_an_abort_is_asked, _in(abort=1)),
    _controller("I7", shuts_the_source_out_before_the_target_runs, _in()),
    _controller("courier", carries_nothing, _in(cut=1)),
)
