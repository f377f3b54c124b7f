"""Messages and orders as agents take them; each may come at any time, again and again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from emp.migration import events as e
from emp.migration.events import Event
from emp.migration.records import Record, RecordKind
from emp.migration.states import Source, Target
from emp.migration.sweep import Sweep
from tests.search.agents import Agents
from tests.search.hands import EVM, Way
from tests.search.world import Busy, Qemu, World, busy, put, runs, with_role

K = RecordKind
_BETWEEN_AGENTS = ("go", "aborted", "loaded", "answer", "failed", "asks target", "asks source")
_UNFINISHED = (Sweep.LEAVING, Sweep.ARRIVING)


class Orders:
    def __init__(self, agents: Agents) -> None:
        self.core = agents.core
        self.steady = frozenset(range(3))
        """nodes whose epochs only grow, so that an order which is refused now is refused for ever"""
        self._agents = agents
        self._hands = agents.hands
        self._abort = self.core.events.number(e.AbortAsked("asked"))
        self._posts: dict[int, tuple[Any, ...]] = {}
        self._retired = self.core.events.number(e.Retired())

    def take(self, w: World, number: int) -> Iterator[Way]:
        post = self._posts.get(number)
        if post is None:
            post = self._posts[number] = self._post(self.core.messages[number])
        if post[0] == "word":
            _, m, to_source, event, question, to = post
            if w.c.cut and self.core.messages[number][0] in _BETWEEN_AGENTS:
                return
            plan = w.c.plans[m - 1]
            i = to if to is not None else plan.source if to_source else plan.target
            node = w.nodes[i]
            if not node.up or node.lost:
                return
            role = busy(node, m)
            if role is not None and not self.core.over(role.state):
                if self.core.step(role.state, event) != (role.state, ()):
                    yield from self._agents.feed(w, i, m, event, ("message", number))
            elif question and not node.suspect:
                yield False, ("message, answered from the journal", number), self._answer(w, i, m, question)
        elif post[0] == "prepare":
            yield from self._prepare(w, post[1], number)
        elif post[0] == "hand over":
            yield from self._hand_over(w, post[1], post[2], number)
        elif post[0] == "retire":
            yield from self._retire(w, post[2], post[1], number)
        elif post[0] == "start":
            yield from self._start(w, post[2], post[1], number)

    def _post(self, message: tuple[Any, ...]) -> tuple[Any, ...]:
        """For a word to a role: (migration, to the source?, event, may the journal answer it?, node if it is given)."""
        event: Event
        to: int | None = None
        match message:
            case ("go" | "carried go", int(m), int(epoch), str(nonce)):
                to_source, event, question = False, e.GoArrived(epoch, nonce), "go"
            case ("aborted", int(m)):
                to_source, event, question = False, e.SourceAborted(), ""
            case ("loaded", int(m), str(nonce)):
                to_source, event, question = True, e.TargetLoaded(nonce), ""
            case ("answer" | "carried answer", int(m), word, str(nonce)):
                to_source, event, question = True, e.TargetAnswered(word, nonce), ""
            case ("failed", int(m)):
                to_source, event, question = True, e.TargetFailed("x"), ""
            case ("asks target", int(m), str(nonce)):
                to_source, event, question = False, e.PeerAsks(nonce), "ask"
            case ("asks source", int(m), str(nonce)):
                to_source, event, question = True, e.PeerAsks(nonce), "ask"
            case ("abort", int(m), int(node), bool(back)):
                event = e.SourceAborted() if back else e.AbortAsked("asked")
                to_source, question, to = False, "", node
            case _:
                return message
        return "word", m, to_source, self.core.events.number(event), question, to

    def _takes_orders(self, w: World, i: int) -> bool:
        return w.nodes[i].up and not w.nodes[i].lost and not w.nodes[i].suspect

    def _answer(self, w: World, i: int, m: int, question: str) -> World:
        """From the journal: the role is over, or was never there."""
        book = w.nodes[i].book
        if sworn := self.core.word_of(book, f"m{m}"):
            return self._hands.send(w, "answer", m, *sworn)
        if question == "ask":
            match self.core.reply_of(book, f"m{m}"):
                case e.GoArrived(epoch, nonce):
                    return self._hands.send(w, "go", m, epoch, nonce)
                case e.SourceAborted():
                    return self._hands.send(w, "aborted", m)
        return w

    def _prepare(self, w: World, m: int, number: int) -> Iterator[Way]:
        plan = w.c.plans[m - 1]
        i = plan.target
        node = w.nodes[i]
        if not self._takes_orders(w, i) or busy(node, m):
            return
        if not self.core.allows("check_prepare", node.book, plan.epoch_target):
            yield False, ("order refused", number), self._hands.send(w, "not prepared", m)
            return
        for older in node.roles:
            state = self.core.states[older.state]
            if isinstance(state, Target) and not self.core.over(older.state):
                if not self.core.may_replace(older.state):
                    yield False, ("order refused", number), self._hands.send(w, "not prepared", m)
                else:
                    yield from self._agents.feed(w, i, older.m, self._abort, ("order, an older one goes first", number))
                return
        attempt = next((n for n in (1, 2) if self.core.messages.number(("tried", m, n)) not in w.messages), None)
        if attempt is None:
            return
        nonce = 10 * m + attempt
        role = Target(EVM, f"m{m}", "ABC"[plan.source], str(nonce), plan.epoch_target)
        taken = put(w, i, with_role(node, Busy(m, self.core.state(role))))
        taken = self._hands.send(taken, "tried", m, attempt)
        yield from self._agents.feed(taken, i, m, self.core.events.number(e.Ordered()), ("order", number))

    def _hand_over(self, w: World, m: int, nonce: str, number: int) -> Iterator[Way]:
        plan = w.c.plans[m - 1]
        i = plan.source
        node = w.nodes[i]
        if not self._takes_orders(w, i) or busy(node, m):
            return
        others = [r for r in node.roles if not self.core.over(r.state)]
        runs_here = node.qemu is not None and node.qemu.status == "run"
        linked = self._takes_orders(w, plan.target) and not w.c.cut
        if (
            others
            or not runs_here
            or not linked
            or not self.core.allows("check_hand_over", node.book, plan.epoch_target)
        ):
            yield False, ("order refused", number), self._hands.send(w, "not handed over", m)
            return
        last = self.core.last(node.book)
        assert last is not None
        role = Source(EVM, f"m{m}", "ABC"[plan.target], nonce, last.epoch, plan.epoch_target, plan.epoch_source)
        taken = put(w, i, with_role(node, Busy(m, self.core.state(role))))
        yield from self._agents.feed(taken, i, m, self.core.events.number(e.Ordered()), ("order", number))

    def _retire(self, w: World, i: int, k: int, number: int) -> Iterator[Way]:
        node = w.nodes[i]
        if not self._takes_orders(w, i):
            return
        last = self.core.last(node.book)
        if last and last.kind is K.RETIRED and last.epoch == k:
            return
        if not self.core.allows("check_epoch", node.book, k):
            return
        for role in node.roles:
            if not self.core.over(role.state):
                yield from self._agents.feed(w, i, role.m, self._retired, ("retire", number))
                return
        gone = put(w, i, node._replace(qemu=None, port=False, roles=()))
        yield from self._hands.record(gone, i, Record(K.RETIRED, EVM, k), ("retired", number), off=False)

    def _start(self, w: World, i: int, k: int, number: int) -> Iterator[Way]:
        node = w.nodes[i]
        if not self._takes_orders(w, i) or not self.core.allows("check_start", node.book, k):
            return
        if any(not self.core.over(r.state) for r in node.roles):
            return
        for fault, label, w2 in self._hands.record(w, i, Record(K.OWN, EVM, k), ("started", number), off=node.off):
            if not w2.nodes[i].up or self.core.kind(w2.nodes[i].book) is not K.OWN:
                yield fault, label, w2
                continue
            booted = put(w2, i, w2.nodes[i]._replace(qemu=Qemu(0, "run", False, k), port=True, roles=()))
            yield fault, label, runs(booted, i)

    # -- what can never do anything any more

    def live_messages(self, w: World) -> frozenset[int]:
        """Drop what the project's own checks refuse, now and, as epochs only grow, for ever."""
        if not w.c.plans or not self.steady:
            return w.messages
        dead = [number for number in w.messages if self._dead(w, self.core.messages[number])]
        return w.messages.difference(dead) if dead else w.messages

    def _dead(self, w: World, message: tuple[Any, ...]) -> bool:
        kind, m = message[0], message[1]
        if kind in ("retire", "start"):
            i = message[2]
            return i in self.steady and not self.core.allows("check_epoch", w.nodes[i].disk, m)
        if m == w.c.open:
            return False
        plan = w.c.plans[m - 1]
        source_over = self._over(w, plan.source, m, "check_hand_over", plan.epoch_target)
        target_over = self._over(w, plan.target, m, "check_prepare", plan.epoch_target)
        match kind:
            case "loaded" | "answer" | "carried answer" | "failed" | "hand over" | "prepared" | "not handed over":
                return source_over
            case "aborted" | "prepare" | "tried" | "not prepared":
                return target_over
            case "abort":
                return source_over if message[2] == plan.source else target_over
        return source_over and target_over

    def _over(self, w: World, i: int, m: int, check: str, epoch: int) -> bool:
        """No role of ``m`` is here, none would come back with a restart, and a late order would be refused."""
        node = w.nodes[i]
        role = busy(node, m)
        if i not in self.steady or (role is not None and not self.core.over(role.state)):
            return False
        last = self.core.last(node.disk)
        if last is not None and last.migration == f"m{m}" and self.core.sweep_of(node.disk) in _UNFINISHED:
            return False
        return not self.core.allows(check, node.disk, epoch)
