"""A breadth-first search through everything that can happen to one migration, with the functions that production runs.

The invariants: never do two copies run; the target never runs before the commit nor from a stale copy; the source never
resumes after the target ran; the target's port is open only after the commit; and from every state in which a good copy
is left, the parties can still get to exactly one running copy without any further fault.

Each mutant breaks one rule of the protocol on purpose: a search that lets one through could not be trusted.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest

from emp.migration import events as e
from emp.migration import source, target, way_back
from emp.migration.events import Action, Event, Timer, TimerFired
from emp.migration.records import RecordKind as K
from emp.migration.states import Source, SourcePhase, Target, TargetPhase
from tests.unit.migration_world import Faults, SourceStep, TargetStep, World, beginning, moves

EXECUTES = ("run", "copy")


def violation(before: World, after: World) -> str | None:
    if after.sq in EXECUTES and after.tq == "run":
        return "two copies run"
    if after.tq == "run" and before.tq != "run" and (after.t_stale or not after.given):
        return "the target runs from a stale copy, or before the commit"
    if after.sq in EXECUTES and before.sq not in EXECUTES and before.s_stale:
        return "the source resumes after the target has run"
    if after.t_port and not after.given:
        return "the target's port is open before the commit"
    return None


def search(
    faults: Faults, s_step: SourceStep = source.step, t_step: TargetStep = target.step
) -> tuple[int, str | None]:
    """Return the number of states and the first violation with its shortest history."""
    first = beginning(faults)
    came_from: dict[World, tuple[World, str] | None] = {first: None}
    back: dict[World, list[World]] = {}
    queue = deque([first])

    def history(world: World) -> str:
        steps: list[str] = []
        while (step := came_from[world]) is not None:
            world, name = step
            steps.append(name)
        return "\n  ".join(reversed(steps))

    while queue:
        world = queue.popleft()
        for name, after in moves(world, s_step, t_step):
            if wrong := violation(world, after):
                return len(came_from), f"{wrong}:\n  {history(world)}\n  {name}"
            if "fault" not in name:
                back.setdefault(after, []).append(world)
            if after not in came_from:
                came_from[after] = (world, name)
                queue.append(after)
    if stuck := _stuck(came_from, back):
        return len(came_from), f"a good copy is left and can never run:\n  {history(stuck)}\n{stuck}"
    return len(came_from), None


def _stuck(worlds: dict[World, tuple[World, str] | None], back: dict[World, list[World]]) -> World | None:
    fine = [w for w in worlds if (w.sq in EXECUTES) != (w.tq == "run")]
    reached = set(fine)
    while fine:
        for before in back.get(fine.pop(), ()):
            if before not in reached:
                reached.add(before)
                fine.append(before)
    return next((w for w in worlds if w not in reached and _good_copy(w)), None)


def _good_copy(w: World) -> bool:
    """A copy that could run without losing anything, and that nobody has had to give up."""
    activated = w.tj is not None and w.tj.kind is K.ACTIVATED
    source_good = w.sq != "dead" and not w.s_stale and not activated
    target_good = w.tq == "load" and not w.t_stale and w.given and w.sj.kind is K.GIVEN
    return source_good or target_good


COMBINATIONS = [
    Faults(kill_source=1, kill_target=1, stream=1),
    Faults(qemu_source=1, qemu_target=1, link=1),
    Faults(kill_source=1, qemu_target=1, write=1),
    Faults(kill_target=1, write=1),
    Faults(kill_target=1, stream=1, link=1),
]


@pytest.mark.parametrize("faults", COMBINATIONS, ids=str)
def test_nothing_that_can_happen_breaks_the_protocol(faults: Faults) -> None:
    states, wrong = search(faults)
    print(f"{states} states")
    assert wrong is None, wrong


# ---------------------------------------------------------------- mutants


def commits_without_the_target(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    if state.phase is SourcePhase.SWITCHOVER:
        state = replace(state, loaded=True, completed=True)
        return replace(state, phase=SourcePhase.GIVING), (e.WriteRecord(state.record(K.GIVEN)),)
    return source.step(state, event)


def goes_before_given_is_on_disk(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    state, actions = source.step(state, event)
    writes = [a for a in actions if isinstance(a, e.WriteRecord) and a.record.kind is K.GIVEN]
    return state, (e.SendGo(), *actions) if writes else actions


def resumes_on_a_timeout(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    if state.phase is SourcePhase.GIVEN and event == TimerFired(Timer.REPEAT):
        return way_back.source_is_rescued(state)
    return source.step(state, event)


def believes_an_abort_after_the_commit(state: Source, event: Event) -> tuple[Source, tuple[Action, ...]]:
    if state.phase is SourcePhase.GIVEN and isinstance(event, e.AbortAsked):
        return way_back.source_is_rescued(state)
    return source.step(state, event)


def activates_without_go(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    if state.phase is TargetPhase.LOADED and event == TimerFired(Timer.REPEAT):
        return target.step(state, e.GoArrived(state.epoch, state.nonce))
    return target.step(state, event)


def opens_its_port_early(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    state, actions = target.step(state, event)
    return state, (e.OpenPorts(), *actions) if state.phase is TargetPhase.LOADED else actions


def answers_go_before_the_guest_runs(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    if state.phase is TargetPhase.STARTING and isinstance(event, e.GoArrived):
        return state, (e.SendAnswer(e.Word.ACTIVATED),)
    return target.step(state, event)


def withdraws_after_it_ran(state: Target, event: Event) -> tuple[Target, tuple[Action, ...]]:
    if state.phase is TargetPhase.RUNNING and isinstance(event, e.GoArrived):
        return way_back.target_withdraws(state, "asked again")
    return target.step(state, event)


SOURCE_MUTANTS = [
    commits_without_the_target,
    goes_before_given_is_on_disk,
    resumes_on_a_timeout,
    believes_an_abort_after_the_commit,
]
TARGET_MUTANTS = [
    activates_without_go,
    opens_its_port_early,
    answers_go_before_the_guest_runs,
    withdraws_after_it_ran,
]


@pytest.mark.parametrize("mutant", SOURCE_MUTANTS)
def test_a_broken_source_is_found(mutant: SourceStep) -> None:
    assert any(search(faults, s_step=mutant)[1] for faults in [Faults(), *COMBINATIONS])


@pytest.mark.parametrize("mutant", TARGET_MUTANTS)
def test_a_broken_target_is_found(mutant: TargetStep) -> None:
    assert any(search(faults, t_step=mutant)[1] for faults in [Faults(), *COMBINATIONS])
