"""The project's own functions, as a search runs them: each result made once, each argument known by a small number.

``Project`` names the functions; a mutant is a ``Project`` in which one of them has been replaced. ``Core`` runs one
project. Equal arguments give equal results (that is what pure means), so a result is kept, and what was asked for the
first time is noted: played again under ``coverage``, it tells which branches the search has reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

from emp.controller import sweep as contact
from emp.hypervisor.qemu.guard import Guard
from emp.migration import admission, recovery
from emp.migration import source as source_role
from emp.migration import supervisor as supervising
from emp.migration import sweep as sweeping
from emp.migration import target as target_role
from emp.migration.events import Action, Event
from emp.migration.records import RUNNABLE, Ledger, Record, RecordKind, ledgers
from emp.migration.states import Source, Target
from emp.migration.supervisor import Supervisor
from emp.model.errors import EmpError
from emp.model.migration import Migration, Outcome
from emp.model.node import OpenRole
from emp.model.orders import AbortOrder, AnswerOrder, Role, RolePhase

T = TypeVar("T")


def guards(status: str) -> list[str]:
    """The commands that the guard of a switchover sends once ``status`` has lasted too long and its agent is gone."""
    guard = Guard({"pre-switchover": 1.0, "device": 1.0})
    for reached in ("active", "pre-switchover", "device", "completed"):
        sent = guard.moved(reached, 0.0)
        if reached == status:
            break
    guard.orphaned(0.0)
    sent += [] if guard.over else guard.due(9.0) or []
    return [str(command.get("execute") or command.get("exec-oob")) for command in sent]


class Project(NamedTuple):
    """What the agents and the controller decide by."""

    source: Callable[[Source, Event], tuple[Source, tuple[Action, ...]]] = source_role.step
    target: Callable[[Target, Event], tuple[Target, tuple[Action, ...]]] = target_role.step
    supervisor: Callable[[Supervisor, supervising.Event], tuple[Supervisor, tuple[supervising.Action, ...]]] = (
        supervising.step
    )
    check_epoch: Callable[[Ledger, int], None] = admission.check_epoch
    check_prepare: Callable[[Ledger, int], None] = admission.check_prepare
    check_replaces: Callable[[Target], None] = admission.check_replaces
    check_hand_over: Callable[[Ledger, int], None] = admission.check_hand_over
    check_start: Callable[[Ledger, int], None] = admission.check_start
    word_of: Callable[[Ledger, str], Any] = admission.word_of
    reply_of: Callable[[Ledger, str], Any] = admission.reply_of
    standing_of: Callable[[Ledger, str], Any] = admission.standing_of
    end_of: Callable[..., AbortOrder | AnswerOrder | None] = contact.end_of
    sweep: Callable[[Record | None], sweeping.Sweep] = sweeping.sweep
    waits_for_its_owner: Callable[..., bool] = sweeping.waits_for_its_owner
    resume_source: Callable[..., tuple[Source, Event]] = recovery.resume_source
    resume_target: Callable[..., tuple[Target, Event]] = recovery.resume_target
    holders: Callable[[Outcome], frozenset[Role]] = supervising.holders
    could_hold: Callable[[int, tuple[int, ...]], frozenset[int]] = lambda owner, holders: frozenset({owner, *holders})
    epochs: Callable[[int, int], tuple[int, int]] = lambda unused, _owners: (unused, unused + 1)
    """e_t and e_s: issued, never computed"""
    cold_epoch: Callable[[int, int], int] = lambda unused, _owners: unused
    guards: Callable[[str], list[str]] = guards
    append: Callable[[Ledger, Record], Ledger] = Ledger.add
    replay: Callable[[tuple[Record, ...]], dict[str, Ledger]] = ledgers
    runnable: frozenset[RecordKind] = RUNNABLE


class Table(Generic[T]):
    """Equal values have one number: worlds are compared and hashed by numbers alone."""

    def __init__(self) -> None:
        self._numbers: dict[T, int] = {}
        self._values: list[T] = []

    def number(self, value: T) -> int:
        number = self._numbers.get(value)
        if number is None:
            number = self._numbers[value] = len(self._values)
            self._values.append(value)
        return number

    def __getitem__(self, number: int) -> T:
        return self._values[number]


Call = tuple[str, tuple[Any, ...], dict[str, Any]]
"""a field of ``Project`` and what it was called with"""


class Core:
    def __init__(self, project: Project) -> None:
        self.project = project
        self.calls: list[Call] = []
        self.states: Table[Source | Target] = Table()
        self.supervisors: Table[Supervisor] = Table()
        self.events: Table[Any] = Table()
        self.ledgers: Table[Ledger] = Table()
        self.messages: Table[tuple[Any, ...]] = Table()
        self._made: dict[tuple[Any, ...], Any] = {}

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((name, args, kwargs))
        return getattr(self.project, name)(*args, **kwargs)

    # -- the three roles

    def step(self, state: int, event: int) -> tuple[int, tuple[Action, ...]]:
        key = (state, event)
        made = self._made.get(key)
        if made is None:
            before = self.states[state]
            name = "source" if isinstance(before, Source) else "target"
            after, actions = self._call(name, before, self.events[event])
            made = self._made[key] = (self.state(after), actions)
        return made

    def over(self, state: int) -> bool:
        key = ("over", state)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self.states[state].shown[0].final
        return bool(made)

    def phase(self, state: int) -> Any:
        return self.states[state].phase

    def state(self, role: Source | Target) -> int:
        return self.states.number(_without_words(role))

    def supervise(self, state: int, event: supervising.Event) -> tuple[int, tuple[supervising.Action, ...]]:
        key = ("supervisor", state, event)
        made = self._made.get(key)
        if made is None:
            after, actions = self._call("supervisor", self.supervisors[state], event)
            after = replace(after, cause="x" if after.cause else None)
            made = self._made[key] = (self.supervisors.number(after), actions)
        return made

    # -- journals

    def append(self, ledger: int, record: Record) -> int:
        """Compacted at once, as a restart would do it: what can be asked must not depend on when that was."""
        key = ("append", ledger, record)
        made = self._made.get(key)
        if made is None:
            added = self._call("append", self.ledgers[ledger], record)
            made = self._made[key] = self.ledgers.number(added.compacted())
        return made

    def replayed(self, ledger: int) -> int:
        """What a restart reads from the disk."""
        key = ("replay", ledger)
        if key not in self._made:
            found = self._call("replay", self.ledgers[ledger].records)
            self._made[key] = self.ledgers.number(next(iter(found.values()), Ledger()))
        return int(self._made[key])

    def last(self, ledger: int) -> Record | None:
        return self.ledgers[ledger].last

    def kind(self, ledger: int) -> RecordKind | None:
        last = self.ledgers[ledger].last
        return last.kind if last else None

    def owned(self, ledger: int) -> frozenset[int]:
        """The epochs under which this node has owned the EVM."""
        key = ("owned", ledger)
        made = self._made.get(key)
        if made is None:
            records = self.ledgers[ledger].records
            made = frozenset(r.epoch for r in records if r.kind in (RecordKind.OWN, RecordKind.ACTIVATED))
            self._made[key] = made
        return made

    # -- decisions by a journal

    def allows(self, check: str, ledger: int, *args: Any) -> bool:
        key = (check, ledger, *args)
        made = self._made.get(key)
        if made is None:
            try:
                self._call(check, self.ledgers[ledger], *args)
                made = True
            except EmpError:
                made = False
            self._made[key] = made
        return bool(made)

    def may_replace(self, state: int) -> bool:
        try:
            self._call("check_replaces", self.states[state])
        except EmpError:
            return False
        return True

    def word_of(self, ledger: int, migration: str) -> Any:
        key = ("word_of", ledger, migration)
        if key not in self._made:
            self._made[key] = self._call("word_of", self.ledgers[ledger], migration)
        return self._made[key]

    def reply_of(self, ledger: int, migration: str) -> Any:
        key = ("reply_of", ledger, migration)
        if key not in self._made:
            self._made[key] = self._call("reply_of", self.ledgers[ledger], migration)
        return self._made[key]

    def standing_of(self, ledger: int, migration: str) -> tuple[Role, RolePhase] | None:
        key = ("standing_of", ledger, migration)
        if key not in self._made:
            found = self._call("standing_of", self.ledgers[ledger], migration)
            self._made[key] = found and found[:2]
        return self._made[key]  # type: ignore[no-any-return]

    def sweep(self, last: Record | None) -> sweeping.Sweep:
        return self._call("sweep", last)  # type: ignore[no-any-return]

    def guards(self, status: str) -> list[str]:
        key = ("guards", status)
        if key not in self._made:
            self._made[key] = self.project.guards(status)
        return self._made[key]  # type: ignore[no-any-return]

    def sweep_of(self, ledger: int) -> sweeping.Sweep:
        key = ("sweep", ledger)
        if key not in self._made:
            self._made[key] = self.sweep(self.last(ledger))
        return self._made[key]  # type: ignore[no-any-return]

    def end_of(self, outcome: Outcome, side: Role, elsewhere: bool) -> AbortOrder | AnswerOrder | None:
        """What an end of a closed migration is told at its next report."""
        key = ("end_of", outcome, side, elsewhere)
        if key not in self._made:
            closed = Migration(
                id="m", evm="web", source="a", target="b", epoch_target=2, epoch_source=3, outcome=outcome, nonce="p"
            )
            role = OpenRole(migration="m", evm="web", role=side, phase="given", epoch=2)
            self._made[key] = self.project.end_of(closed, role, runs_elsewhere=elsewhere)
        return self._made[key]  # type: ignore[no-any-return]

    def waits_for_its_owner(self, last: Record, **machine: bool) -> bool:
        return bool(self._call("waits_for_its_owner", last, **machine))

    def resume(self, name: str, last: Record, **machine: bool) -> tuple[int, int]:
        key = (name, last, *machine.values())
        if key not in self._made:
            state, event = self._call(name, last, **machine)
            self._made[key] = (self.state(state), self.events.number(event))
        return self._made[key]  # type: ignore[no-any-return]


def _without_words(role: Source | Target) -> Source | Target:
    """What is said to people decides nothing but whether it has been said."""
    return replace(role, cause="x" if role.cause else None, trouble=None)
