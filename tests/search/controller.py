"""What the controller does: it plans, orders, watches, closes, is killed, and starts an EVM cold behind a fence.

Its decisions about a migration are ``emp.migration.supervisor``'s; they are carried out as ``emp.controller.supervise``
does it: an abort waits for the order that it would undo, an end is watched until its last word.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from emp.migration import supervisor as s
from emp.migration.events import Word
from emp.migration.records import RecordKind
from emp.migration.states import TargetPhase
from emp.model.migration import Outcome
from emp.model.orders import AbortOrder, AnswerOrder, Role, RolePhase
from tests.search.hands import Way
from tests.search.project import Core
from tests.search.world import Cold, Plan, World, busy, put, spent

PREPARE, HAND_OVER = 1, 2
BIT = {Role.SOURCE: 1, Role.TARGET: 2}


class Controllers:
    """``migrations``: how many it plans in all. ``fence``: ``node`` by node, or by ``epoch`` at the volume server."""

    def __init__(self, core: Core, *, migrations: int, fence: str, cold_first: bool) -> None:
        self.core = core
        self.migrations = migrations
        self.fence = fence
        self.cold_first = cold_first
        self.new = core.supervisors.number(s.Supervisor())

    def moves(self, w: World) -> Iterator[Way]:
        c = w.c
        if c.open:
            yield from self._answers(w)
            yield from self._snapshots(w)
            yield from self._hear(w, s.CourierDue(), ("controller: a word is due",))
            yield from self._faults(w)
        elif c.cold is None and len(c.plans) < self.migrations:
            yield from self._plan(w)
        if c.cold is not None:
            yield from self._cold(w, c.cold)
        elif w.left.cold and (c.plans or self.cold_first):
            yield from self._decide_cold(w)
        yield from self._tell_returned(w)
        yield from self._sweep_on_contact(w)

    # -- planning

    def _plan(self, w: World) -> Iterator[Way]:
        """The owner's agent says that it runs there; where to is free, but which node is B and which C is not told."""
        c = w.c
        i = c.owner[0]
        node = w.nodes[i]
        if not node.up or node.lost or node.off or node.qemu is None or node.qemu.status != "run":
            return
        if self.core.kind(node.book) not in (RecordKind.OWN, RecordKind.ACTIVATED):
            return
        for j, there in enumerate(w.nodes):
            if j == i or there.off or (j == 2 and not c.plans):
                continue
            e_t, e_s = self.core.project.epochs(c.next_epoch, c.owner[1])
            planned = c._replace(
                plans=(*c.plans, Plan(i, j, e_t, e_s)),
                open=len(c.plans) + 1,
                supervisor=self.new,
                asked=0,
                watched=0,
                waiting=(),
                nonce=0,
                next_epoch=max(c.next_epoch, e_s + 1),
                holders=tuple(sorted({i, j})),
            )
            yield from self._hear(w._replace(c=planned), s.Begun(), ("plan", i, j))

    # -- one event, and what follows

    def _hear(self, w: World, event: s.Event, label: tuple[Any, ...]) -> Iterator[Way]:
        state, actions = self.core.supervise(w.c.supervisor, event)
        before, w = w, w._replace(c=w.c._replace(supervisor=state))
        if w == before and not actions:
            return
        ways: list[Way] = [(False, label, w)]
        follows: list[tuple[bool, s.Event]] = []
        for action in actions:
            after: list[Way] = []
            for fault, told, there in ways:
                if there.left.controller:
                    yield True, (*told, "killed before", type(action).__name__), self._restarted(there)
                after.append((fault, told, self._act(there, action)))
            ways = after
            if isinstance(action, s.Attach):
                follows.append((False, s.Attached()))
                follows.append((True, s.StepFailed("x")))
            if isinstance(action, s.Detach):
                follows.append((False, s.Detached()))
        for fault, told, there in ways:
            if not follows:
                yield fault, told, there
            for failing, then in follows:
                if failing and not there.left.order:
                    continue
                on = spent(there, "order") if failing else there
                for more_fault, more, after_it in self._hear(on, then, (*told, then)):
                    yield fault or failing or more_fault, more, after_it

    def _act(self, w: World, action: s.Action) -> World:
        c = w.c
        m = c.open
        plan = c.plans[m - 1]
        match action:
            case s.Prepare():
                w = self._send(w, "prepare", m)
                return w._replace(c=c._replace(asked=c.asked | PREPARE))
            case s.HandOver():
                w = self._send(w, "hand over", m, str(c.nonce))
                return w._replace(c=c._replace(asked=c.asked | HAND_OVER))
            case s.Watch(role):
                return w._replace(c=c._replace(watched=c.watched | BIT[role]))
            case s.Abort(role, _, back):
                order = ("abort", m, plan.source if role is Role.SOURCE else plan.target, back)
                if c.asked & (HAND_OVER if role is Role.SOURCE else PREPARE):
                    number = self.core.messages.number(order)
                    return w._replace(c=c._replace(waiting=tuple(sorted({*c.waiting, number}))))
                return self._send(w, *order)
            case s.CarryGo():
                return self._send(w, "carried go", m, plan.epoch_target, str(c.nonce))
            case s.CarryAnswer(phase):
                word = Word.WITHDRAWN if phase is RolePhase.WITHDRAWN else Word.ACTIVATED
                return self._send(w, "carried answer", m, word, str(c.nonce))
            case s.RecordOwner(Role.TARGET):
                return w._replace(c=c._replace(owner=(plan.target, plan.epoch_target)))
            case s.RecordOwner(Role.SOURCE):
                return w._replace(c=c._replace(owner=(plan.source, plan.epoch_source)))
            case s.Detach(Role.SOURCE):
                return w._replace(floor=max(w.floor, plan.epoch_target))
            case s.Detach(Role.TARGET):
                qemu = w.nodes[plan.target].qemu
                if qemu is not None and qemu.made // 10 == m:  # what it had attached under e_t is attached no more
                    return put(w, plan.target, w.nodes[plan.target]._replace(qemu=qemu._replace(epoch=-1)))
            case s.Close(outcome):
                return w._replace(c=self._closed(w, outcome, plan))
        return w

    def _closed(self, w: World, outcome: Outcome, plan: Plan) -> Any:
        c = w.c
        ends = self.core.project.holders(outcome)
        keep = {plan.source if role is Role.SOURCE else plan.target for role in ends}
        silent = {i for i in (plan.source, plan.target) if not w.nodes[i].up or w.nodes[i].lost}
        return c._replace(
            ends=(*c.ends, outcome),
            open=0,
            supervisor=0,
            asked=0,
            watched=0,
            waiting=(),
            nonce=0,
            holders=tuple(sorted(keep | silent)),
        )

    def _send(self, w: World, *message: Any) -> World:
        number = self.core.messages.number(message)
        return w if number in w.messages else w._replace(messages=w.messages | {number})

    def _answered(self, w: World, order: int) -> World:
        """That order is not on its way any more: what has waited for it goes."""
        c = w.c._replace(asked=w.c.asked & ~order)
        free: list[int] = []
        stay: list[int] = []
        for number in c.waiting:
            _, m, i, _back = self.core.messages[number]
            needed = HAND_OVER if i == c.plans[m - 1].source else PREPARE
            (stay if c.asked & needed else free).append(number)
        return w._replace(c=c._replace(waiting=tuple(stay)), messages=w.messages | set(free))

    # -- what it hears

    def _answers(self, w: World) -> Iterator[Way]:
        c = w.c
        m = c.open
        sent = self.core.messages.number
        if c.asked & PREPARE:
            for attempt in (1, 2):
                nonce = 10 * m + attempt
                if sent(("prepared", m, nonce)) in w.messages:
                    done = self._answered(w, PREPARE)
                    done = done._replace(c=done.c._replace(nonce=nonce))
                    yield from self._any(done, s.TargetPrepared(), ("controller: prepared", nonce))
            if sent(("not prepared", m)) in w.messages:
                yield from self._any(self._answered(w, PREPARE), s.StepFailed("x"), ("controller: not prepared",))
        if c.asked & HAND_OVER:
            said = self._said(w, Role.SOURCE)
            if said is not None and said[0] is not None:
                done = self._answered(w, HAND_OVER)
                yield from self._any(done, s.Says(Role.SOURCE, *said), ("controller: handed over",))
            elif sent(("not handed over", m)) in w.messages:
                yield from self._any(self._answered(w, HAND_OVER), s.StepFailed("x"), ("controller: not handed over",))
        if c.asked:
            lost = self._nobody_answers(w)
            if lost or w.left.order:
                left = self._answered(w if lost else spent(w, "order"), c.asked)
                for _, label, after in self._any(left, s.StepFailed("x", sure=False), ("controller: no answer",)):
                    yield not lost, label, after

    def _nobody_answers(self, w: World) -> bool:
        """The agent that had the order is dead, or its successor knows nothing of it: the connection breaks."""
        c = w.c
        plan = c.plans[c.open - 1]
        node = w.nodes[plan.target if c.asked & PREPARE else plan.source]
        if not node.up or node.lost:
            return True
        role = busy(node, c.open)
        making = role is not None and self.core.phase(role.state) in (TargetPhase.MAKING, TargetPhase.PREPARING)
        return bool(c.asked & PREPARE) and self._tried(w) and not making

    def _tried(self, w: World) -> bool:
        return self.core.messages.number(("tried", w.c.open, 1)) in w.messages

    def _any(self, w: World, event: s.Event, label: tuple[Any, ...]) -> Iterator[Way]:
        """The answer has been taken, even where the supervisor makes nothing of it."""
        heard = list(self._hear(w, event, label))
        yield from heard or [(False, label, w)]

    def _said(self, w: World, role: Role) -> tuple[RolePhase | None, str | None, bool] | None:
        """What an end answers now; None: nothing."""
        plan = w.c.plans[w.c.open - 1]
        node = w.nodes[plan.source if role is Role.SOURCE else plan.target]
        if not node.up or node.lost:
            return None
        if (here := busy(node, w.c.open)) is not None:
            state = self.core.states[here.state]
            return state.shown[0], state.cause, state.wants_courier
        standing = self.core.standing_of(node.book, f"m{w.c.open}")
        return (standing[1], None, False) if standing else (None, None, False)

    def _snapshots(self, w: World) -> Iterator[Way]:
        c = w.c
        for role, bit in BIT.items():
            if c.watched & bit and not c.asked:
                said = self._said(w, role)
                if said is None:
                    continue
                on = w
                if said[0] is not None and said[0].final:
                    on = w._replace(c=c._replace(watched=c.watched & ~bit))
                yield from self._hear(on, s.Says(role, *said), ("controller: told", role.value, str(said[0])))

    def _faults(self, w: World) -> Iterator[Way]:
        if w.left.silent:
            for role in Role:
                for _, label, after in self._hear(spent(w, "silent"), s.NodeLost(role), ("silent", role.value)):
                    yield True, label, after
        if w.left.abort:
            for _, label, after in self._hear(
                spent(w, "abort"), s.AbortAsked("user"), ("abort asked of the controller",)
            ):
                yield True, label, after
        if w.left.controller:
            yield True, ("controller killed",), self._restarted(w)

    def _restarted(self, w: World) -> World:
        c = w.c._replace(supervisor=self.new, asked=0, watched=0, waiting=())
        up = spent(w, "controller")._replace(c=c)
        if not c.open:
            return up
        (_, _, after), *_ = self._hear(
            up._replace(left=up.left._replace(controller=0)), s.Resumed(c.nonce != 0), ("controller back",)
        )
        return after._replace(left=up.left)

    # -- a cold restart (rule R8)

    def _decide_cold(self, w: World) -> Iterator[Way]:
        """It may be ordered at any time; a migration that is open ends by it."""
        if w.c.open:
            left = w.left
            (_, _, w), *_ = self._hear(w._replace(left=left._replace(controller=0)), s.GivenUp("x"), ())
            w = w._replace(left=left)
        c = w.c
        pending = self.core.project.could_hold(c.owner[0], c.holders)
        for on in range(3):
            if w.nodes[on].lost:
                continue
            k = self.core.project.cold_epoch(c.next_epoch, c.owner[1])
            cold = Cold(k, on, tuple(sorted(pending)))
            decided = c._replace(
                cold=cold,
                next_epoch=max(c.next_epoch, k + 2),
                open=0,
                supervisor=0,
                asked=0,
                watched=0,
                waiting=(),
                nonce=0,
            )
            there = spent(w, "cold")._replace(c=decided)
            for i in pending:
                there = self._send(there, "retire", k, i)
            yield True, ("cold restart decided, on", on), there

    def _cold(self, w: World, cold: Cold) -> Iterator[Way]:
        c = w.c
        for i in cold.pending:
            node = w.nodes[i]
            rest = tuple(j for j in cold.pending if j != i)
            if self._has_retired(w, i, cold.epoch):
                told = w._replace(c=c._replace(cold=cold._replace(pending=rest)))
                yield False, ("controller: has retired", i), told
            if i == cold.on:
                continue  # it has to answer in any case
            if self.fence == "node":
                cut = put(w, i, node._replace(off=True))
                yield False, ("fenced", i), cut._replace(c=c._replace(cold=cold._replace(pending=rest)))
            elif w.floor < cold.epoch:
                rest = tuple(j for j in cold.pending if j == cold.on)
                shut = w._replace(floor=cold.epoch, c=c._replace(cold=cold._replace(pending=rest)))
                yield False, ("fenced by epoch",), shut
        if not cold.pending and not cold.begun:
            begun = w._replace(c=c._replace(cold=cold._replace(begun=True)))
            yield False, ("start ordered", cold.on), self._send(begun, "start", cold.epoch + 1, cold.on)
        if cold.begun:
            last = self.core.last(w.nodes[cold.on].book)
            if w.nodes[cold.on].up and last and last.kind is RecordKind.OWN and last.epoch == cold.epoch + 1:
                owner = (cold.on, cold.epoch + 1)
                holders = tuple(sorted({cold.on} | {i for i, node in enumerate(w.nodes) if node.off}))
                done = c._replace(cold=None, owner=owner, holders=holders)
                yield False, ("controller: started", cold.on), w._replace(c=done)

    def _has_retired(self, w: World, i: int, k: int) -> bool:
        last = self.core.last(w.nodes[i].book)
        return w.nodes[i].up and last is not None and last.kind is RecordKind.RETIRED and last.epoch == k

    def _sweep_on_contact(self, w: World) -> Iterator[Way]:
        """A node that reports its part in a migration that is closed is told how that has ended."""
        for i, node in enumerate(w.nodes):
            for role in node.roles if node.up and not node.lost else ():
                if role.m == w.c.open or role.m > len(w.c.ends) or self.core.over(role.state):
                    continue
                plan = w.c.plans[role.m - 1]
                side = Role.SOURCE if plan.source == i else Role.TARGET
                elsewhere = w.c.owner[0] != i and w.c.owner[1] > plan.epoch_target
                state = self.core.states[role.state]
                match self.core.end_of(w.c.ends[role.m - 1], side, elsewhere):
                    case AbortOrder(source_is_back=back):
                        order: tuple[Any, ...] = ("abort", role.m, i, back)
                    case AnswerOrder(word=word):
                        order = ("carried answer", role.m, Word(word), state.nonce)
                    case _:
                        continue
                if self.core.messages.number(order) not in w.messages:
                    yield False, ("swept on contact", i), self._send(w, *order)

    def _tell_returned(self, w: World) -> Iterator[Way]:
        """A node that was fenced and is heard of again is told what it has missed."""
        for i, node in enumerate(w.nodes):
            if node.off and node.up and w.c.cold is None:
                epoch = w.c.owner[1] - 1
                number = self.core.messages.number(("retire", epoch, i))
                if number not in w.messages:
                    yield False, ("told to retire", i), self._send(w, "retire", epoch, i)
