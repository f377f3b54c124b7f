"""The search: breadth-first, so that the history of what it finds is the shortest that there is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from emp.migration import admission
from emp.migration.records import Ledger, Record, RecordKind
from tests.search import invariants, machines
from tests.search.agents import Agents
from tests.search.controller import Controllers
from tests.search.hands import Way
from tests.search.orders import Orders
from tests.search.project import Call, Core, Project
from tests.search.world import NODES, Controller, Faults, Node, Qemu, World, put, spent

K = RecordKind


NOTHING = Faults()


@dataclass(frozen=True)
class Configuration:
    """A small world to be searched through: what may go wrong in it, and how finely its steps are cut."""

    name: str
    faults: Faults = NOTHING
    migrations: int = 1
    fine: bool = False
    """events of a role are looked at one by one; otherwise what follows from one is done before the next comes"""
    fence: str = "node"
    cold_first: bool = False
    """a cold restart may come before the first migration"""
    expected: str | None = None
    """what is found here with the project as it is: a limit that the design states"""


class Move(NamedTuple):
    who: str
    """agent, controller, qemu or fault"""
    fault: bool
    label: tuple[Any, ...]
    after: World


@dataclass
class Found:
    """What a search has come to."""

    name: str
    states: int
    seconds: float
    wrong: str | None = None
    history: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


class Search:
    def __init__(self, configuration: Configuration, project: Project) -> None:
        self.configuration = configuration
        self.core = Core(project)
        self.agents = Agents(self.core, fine=configuration.fine)
        self.hands = self.agents.hands
        self.orders = Orders(self.agents)
        self.controllers = Controllers(
            self.core,
            migrations=configuration.migrations,
            fence=configuration.fence,
            cold_first=configuration.cold_first,
        )
        faults = configuration.faults
        honest = project.check_start == admission.check_start and project.check_prepare == admission.check_prepare
        backward = faults.journal or faults.rollback or faults.reboot or not honest
        steady = () if backward else (1, 2) if faults.image else (0, 1, 2)
        self.orders.steady = frozenset(steady)
        self._nothing = self.core.ledgers.number(Ledger())

    def beginning(self) -> World:
        own = self.core.append(self._nothing, Record(K.OWN, "web", 1))
        self._first = own
        a = Node(True, own, own, qemu=Qemu(0, "run", False, 1), port=True)
        b = Node(True, self._nothing, self._nothing)
        return World((a, b, b), Controller((0, 1)), left=self.configuration.faults)

    def moves(self, w: World) -> Iterator[Move]:
        for who, (fault, label, after) in self._moves(w):
            for more_fault, more, settled in self.agents.settled(after, label):
                live = self.orders.live_messages(settled)
                if live is not settled.messages:
                    settled = settled._replace(messages=live)
                yield Move(who, fault or more_fault, more, settled)

    def _moves(self, w: World) -> Iterator[tuple[str, Way]]:
        for way in self.controllers.moves(w):
            yield "controller", way
        for number in sorted(w.messages):
            for way in self.orders.take(w, number):
                yield "agent", way
        for i in range(3):
            for way in self.agents.moves(w, i):
                yield "agent", way
            for way in machines.moves(w, i, self.hands.tell, self.core.guards):
                yield "qemu", way
            for label, after in self._journal_faults(w, i):
                yield "fault", (True, label, after)
        if w.left.link and w.c.open:
            yield "fault", (True, ("the link is lost",), self._unlinked(spent(w, "link")))
        if w.left.cut and w.c.open:
            cut = spent(w, "cut")
            yield "fault", (True, ("the nodes are cut off",), self._unlinked(cut._replace(c=cut.c._replace(cut=True))))

    def _unlinked(self, w: World) -> World:
        m, plan = w.c.open, w.c.plans[w.c.open - 1]
        return self.hands.unlinked(self.hands.unlinked(w, plan.source, m), plan.target, m)

    def _journal_faults(self, w: World, i: int) -> Iterator[tuple[tuple[Any, ...], World]]:
        node = w.nodes[i]
        last = self.core.last(node.disk)
        if w.left.journal and last is not None and not node.lost:
            bare = node._replace(up=False, book=self._nothing, disk=self._nothing, roles=(), lost=True)
            yield ("the journal is lost", i), put(spent(w, "journal"), i, bare)
        if last is not None and last.kind in (K.ACTIVATED, K.GIVEN) and last.migration:
            back = self._rolled_back(node.disk)
            down = node._replace(up=False, roles=(), book=back, disk=back)
            if w.left.rollback and last.kind is K.GIVEN:
                yield ("the journal is behind by one", i), put(spent(w, "rollback"), i, down)
            if w.left.reboot:
                cold = down._replace(qemu=None, port=False)
                yield ("the host reboots, its journal behind by one", i), put(spent(w, "reboot"), i, cold)
        if w.left.image and i == 0 and node.qemu is None and node.disk != self._first:
            old = Node(False, self._first, self._first, off=node.off)
            yield ("A is back from its first day's image",), put(spent(w, "image"), i, old)

    def _rolled_back(self, disk: int) -> int:
        ledger = self.core.ledgers[disk]
        *before, last = ledger.records
        if last.kind is K.ACTIVATED:
            earlier = replace(last, kind=K.PREPARED)
        else:
            owned = max((r.epoch for r in before if r.kind in (K.OWN, K.ACTIVATED)), default=1)
            earlier = replace(last, kind=K.HANDOVER, epoch=owned)
        return self.core.ledgers.number(Ledger((*before, earlier)))

    # ------------------------------------------------------------------ the search itself

    def run(self, *, limit: int = 2_000_000) -> Found:
        began_s = time.process_time()
        first = self.beginning()
        numbers: dict[World, int] = {first: 0}
        came_from: list[tuple[int, tuple[Any, ...]]] = [(-1, ())]
        back: list[list[int]] = [[]]
        queue = deque([first])
        wrong: tuple[str, int, tuple[Any, ...]] | None = None
        while queue and wrong is None:
            world = queue.popleft()
            here = numbers[world]
            for move in self.moves(world):
                if move.after == world:
                    continue
                there = numbers.get(move.after)
                if broken := self._violation(world, move, new=there is None):
                    wrong = broken, here, move.label
                    break
                if there is None:
                    there = numbers[move.after] = len(numbers)
                    if there > limit:
                        raise RuntimeError(f"{self.configuration.name}: more than {limit} states")
                    came_from.append((here, (*move.label, "(fault)") if move.fault else move.label))
                    back.append([])
                    queue.append(move.after)
                if not move.fault:
                    back[there].append(here)
        found = Found(self.configuration.name, len(numbers), 0.0)
        if wrong is None and (stuck := self._stuck(list(numbers), back)):
            wrong = stuck[0], stuck[1], (stuck[2],)
        if wrong is not None:
            found.wrong = wrong[0]
            found.history = self._history(came_from, wrong[1], wrong[2])
        found.seconds = time.process_time() - began_s
        found.calls = self.core.calls
        return found

    def _violation(self, before: World, move: Move, *, new: bool) -> str | None:
        after = move.after
        for invariant in (*invariants.OF_MOVES, *(invariants.OF_WORLDS if new else ())):
            if wrong := invariant(self.core, before, after):
                return wrong
        if move.who == "agent" and before.nodes != after.nodes:
            return invariants.i3_the_last_copy_is_kept(self.core, before, after)
        return None

    def _stuck(self, worlds: list[World], back: list[list[int]]) -> tuple[str, int, str] | None:
        """From every state, without any further fault: the EVM runs again, and everything comes to its end."""
        if self.configuration.faults.cold:
            return None
        core = self.core
        running = _reaches(back, [n for n, w in enumerate(worlds) if invariants.runs_once(w)])
        for n, w in enumerate(worlds):
            if n not in running and invariants.must_run(core, w):
                return "I3: a good copy is left and can never run", n, str(w)
        resting = _reaches(back, [n for n, w in enumerate(worlds) if invariants.at_rest(core, w)])
        for n, w in enumerate(worlds):
            if n not in resting and not any(node.lost or node.gone for node in w.nodes):
                return "I8: it never comes to rest", n, str(w)
        return None

    def _history(self, came_from: list[tuple[int, tuple[Any, ...]]], number: int, last: tuple[Any, ...]) -> list[str]:
        steps = [self._told(last)]
        while number > 0:
            number, label = came_from[number]
            steps.append(self._told(label))
        return steps[::-1]

    def _told(self, label: tuple[Any, ...]) -> str:
        """Labels hold numbers, so that only those of a counterexample are put into words."""
        words: list[str] = []
        kind = label[0] if label else ""
        for n, part in enumerate(label):
            if n and isinstance(part, int) and kind in _BY_MESSAGE and n == 1:
                words.append(str(self.core.messages[part]))
            elif kind == "hears" and n == 2:
                words.append(str(self.core.events[part]))
            elif n == 1 and isinstance(part, int) and part < 3:
                words.append(NODES[part])
            else:
                words.append(str(part))
        return " ".join(words)


_BY_MESSAGE = (
    "message",
    "message, answered from the journal",
    "order",
    "order refused",
    "order, an older one goes first",
    "retire",
    "retired",
    "started",
)


def _reaches(back: list[list[int]], goals: list[int]) -> set[int]:
    reached = set(goals)
    while goals:
        for before in back[goals.pop()]:
            if before not in reached:
                reached.add(before)
                goals.append(before)
    return reached


def search(configuration: Configuration, project: Project | None = None) -> Found:
    return Search(configuration, project or Project()).run()
