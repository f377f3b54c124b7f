"""What an agent does: it takes orders and messages, feeds its roles, carries out their actions, dies, and comes back.

Every way that an action can go is tried, and the agent is killed between any two of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from emp.migration import events as e
from emp.migration.events import Action, Event, Stream, StreamMoved, Timer, TimerFired
from emp.migration.records import OWNING, Record, RecordKind
from emp.migration.states import Source, Target, TargetPhase
from emp.migration.sweep import Sweep
from emp.model.orders import RolePhase
from tests.search import machines
from tests.search.project import Core
from tests.search.world import Busy, Plan, Qemu, World, busy, put, runs, spent, with_qemu, with_role

K = RecordKind
TIMERS = list(Timer)
EVM = "web"
_BETWEEN_AGENTS = ("go", "aborted", "loaded", "answer", "failed", "asks target", "asks source")
_UNFINISHED = (Sweep.LEAVING, Sweep.ARRIVING)

Way = tuple[bool, tuple[Any, ...], World]
"""(does it take a fault, what happened, the next world)"""


class Agents:
    """The moves of all agents. ``fine``: a role's events are looked at one by one, so that others come between them."""

    def __init__(self, core: Core, *, fine: bool) -> None:
        self.core = core
        self.fine = fine
        self.steady = frozenset(range(3))
        """nodes whose epochs only grow, so that an order which is refused now is refused for ever"""
        self._go_on = {timer: core.events.number(TimerFired(timer)) for timer in Timer}
        self._abort = core.events.number(e.AbortAsked("asked"))
        self._posts: dict[int, tuple[Any, ...]] = {}
        self._retired = core.events.number(e.Retired())

    # -- every move that agent i can make by itself

    def moves(self, w: World, i: int) -> Iterator[Way]:
        node = w.nodes[i]
        if not node.up:
            if not node.gone:
                yield from self._restart(w, i)
            return
        if node.lost:
            return
        if w.left.gone and not node.gone:
            lost = self.killed(w._replace(left=w.left._replace(kill=w.left.kill + 1, gone=w.left.gone - 1)), i)
            yield True, ("agent gone for good", i), put(lost, i, lost.nodes[i]._replace(gone=True))
        for role in node.roles:
            if self.core.over(role.state):
                continue
            if role.inbox:
                event = role.inbox[0]
                taken = put(w, i, with_role(node, role._replace(inbox=role.inbox[1:])))
                yield from self.feed(taken, i, role.m, event, ("hears", i, event))
            else:
                yield from self._timers(w, i, role)
            if w.left.abort:
                for _, label, after in self.feed(spent(w, "abort"), i, role.m, self._abort, ("abort asked of", i)):
                    yield True, label, after
        qemu = node.qemu
        if qemu and qemu.status == "iostop" and self.core.kind(node.book) in self.core.project.runnable:
            yield False, ("storage is back, cont on", i), runs(w, i)
        if w.left.kill:
            yield True, ("agent killed", i), self.killed(w, i)
        yield from self._guest_ended(w, i)
        if not node.roles and qemu and qemu.status in ("load", "refused", "comp"):
            yield from self._tries_again(w, i)

    def _tries_again(self, w: World, i: int) -> Iterator[Way]:
        """An owner whose machine stood when its agent came back sends ``cont`` until it is taken."""
        last = self.core.last(w.nodes[i].book)
        if last is not None and self.core.sweep_of(w.nodes[i].book) is Sweep.OWNED:
            yield from self._owned(w, i, last, ("tries again", i))

    def _guest_ended(self, w: World, i: int) -> Iterator[Way]:
        """A guest that has shut itself down is noted as soon as no migration holds its machine."""
        node = w.nodes[i]
        if node.qemu is None or node.qemu.status != "halt":
            return
        if any(not self.core.over(role.state) for role in node.roles):
            return
        last = self.core.last(node.book)
        cleared = put(w, i, node._replace(qemu=None, port=False))
        if last is not None and last.kind in OWNING:
            yield from self._record(cleared, i, Record(K.STOPPED, EVM, last.epoch), ("guest ended", i), off=node.off)

    def _timers(self, w: World, i: int, role: Busy) -> Iterator[Way]:
        for bit, timer in enumerate(TIMERS):
            if role.timers & 1 << bit:
                early = timer in (Timer.DEADLINE, Timer.BLACKOUT)
                if early and not w.left.abort:
                    continue
                fired = put(w, i, with_role(w.nodes[i], role._replace(timers=role.timers & ~(1 << bit))))
                if early:
                    fired = spent(fired, "abort")
                for fault, label, after in self.feed(fired, i, role.m, self._go_on[timer], ("timer", i, timer.value)):
                    yield fault or early, label, after

    # -- one event, and what follows

    def tell(self, w: World, i: int, m: int, event: Event) -> World:
        """Put an event into the inbox of a role, if it is there and not over."""
        node = w.nodes[i]
        role = busy(node, m)
        if role is None or self.core.over(role.state):
            return w
        return put(w, i, with_role(node, role._replace(inbox=(*role.inbox, self.core.events.number(event)))))

    def killed(self, w: World, i: int) -> World:
        node = w.nodes[i]
        dead = put(spent(w, "kill"), i, node._replace(up=False, roles=(), book=node.disk, suspect=False))
        for role in node.roles:
            if not self.core.over(role.state):
                dead = self.unlinked(dead, i, role.m)
        return dead

    def unlinked(self, w: World, i: int, m: int) -> World:
        """Node ``i`` has closed its end of the link of ``m``."""
        plan = w.c.plans[m - 1]
        return self.tell(w, plan.target if i == plan.source else plan.source, m, e.LinkLost())

    def feed(self, w: World, i: int, m: int, event: int, label: tuple[Any, ...]) -> Iterator[Way]:
        todo = [(False, label, w, event)]
        while todo:
            fault, label, w, event = todo.pop()
            role = busy(w.nodes[i], m)
            assert role is not None
            state, actions = self.core.step(role.state, event)
            if state != role.state:
                w = put(w, i, with_role(w.nodes[i], role._replace(state=state)))
                w = self._answer_prepare(w, m, role.state, state)
            ways: list[Way] = [(fault, label, w)]
            for action in actions:
                after: list[Way] = []
                for fault, label, w in ways:
                    if not w.nodes[i].up:
                        after.append((fault, label, w))
                        continue
                    if w.left.kill:
                        yield True, (*label, "killed before", type(action).__name__), self.killed(w, i)
                    for more_fault, more, done in self._act(w, i, m, action):
                        after.append((fault or more_fault, (*label, *more), done))
                ways = after
            for fault, label, w in ways:
                node = w.nodes[i]
                role = busy(node, m)
                if role is None:
                    yield fault, label, w
                    continue
                phase = self.core.states[role.state].shown[0]
                if phase.final:
                    yield fault, label, self._ended(w, i, role, phase)
                elif role.inbox and not self.fine:
                    event = role.inbox[0]
                    todo.append((fault, label, put(w, i, with_role(node, role._replace(inbox=role.inbox[1:]))), event))
                else:
                    yield fault, label, w

    def settled(self, w: World, label: tuple[Any, ...]) -> Iterator[Way]:
        """Unless steps are cut finely, what an agent has been told it looks at before anything else happens."""
        if not self.fine:
            for i, node in enumerate(w.nodes):
                for role in node.roles if node.up else ():
                    if role.inbox and not self.core.over(role.state):
                        taken = put(w, i, with_role(node, role._replace(inbox=role.inbox[1:])))
                        for fault, more, after in self.feed(taken, i, role.m, role.inbox[0], label):
                            for more_fault, most, at_last in self.settled(after, more):
                                yield fault or more_fault, most, at_last
                        return
        yield False, label, w

    def _answer_prepare(self, w: World, m: int, before: int, after: int) -> World:
        """The order to prepare is answered once PREPARED is on disk."""
        if self.core.phase(before) is TargetPhase.PREPARING and self.core.phase(after) is TargetPhase.PREPARED:
            return self.send(w, "prepared", m, int(self.core.states[after].nonce))
        return w

    def _ended(self, w: World, i: int, role: Busy, phase: RolePhase) -> World:
        """A role that is over says what the journal says; only one whose machine is gone says more."""
        if i == w.c.plans[role.m - 1].source:
            w = self.unlinked(w, i, role.m)
        node = w.nodes[i]
        if phase is RolePhase.LOST:
            return put(w, i, with_role(node, role._replace(inbox=(), timers=0)))
        return put(w, i, node._replace(roles=tuple(r for r in node.roles if r.m != role.m)))

    # -- actions

    def _act(self, w: World, i: int, m: int, action: Action) -> Iterator[Way]:
        match action:
            case e.WriteRecord(record):
                yield from self._write(w, i, m, record)
                return
            case e.ClaimVolumes():
                yield False, (), self._claimed(w, i)
                return
            case e.OpenRelays() | e.CloseRelays():
                qemu = w.nodes[i].qemu
                relayed = m if isinstance(action, e.OpenRelays) else 0
                yield False, (), with_qemu(w, i, qemu and qemu._replace(relayed=relayed))
                return
            case e.SetTimer(timer):
                role = busy(w.nodes[i], m)
                assert role is not None
                timers = role.timers | 1 << TIMERS.index(timer)
                yield False, (), put(w, i, with_role(w.nodes[i], role._replace(timers=timers)))
                return
        plan = w.c.plans[m - 1]
        if i == plan.source:
            yield from self._source_acts(w, i, m, action)
        else:
            yield from self._target_acts(w, i, m, plan, action)

    def _claimed(self, w: World, i: int) -> World:
        """The volume server shuts out every epoch older than this node's, and knows its machine by the new one."""
        node = w.nodes[i]
        last = self.core.last(node.book)
        if last is None or last.epoch < w.floor or last.kind not in OWNING:
            return w
        mine = node.qemu and node.qemu._replace(epoch=last.epoch)
        return put(w._replace(floor=last.epoch), i, node._replace(qemu=mine))

    def _write(self, w: World, i: int, m: int, record: Record) -> Iterator[Way]:
        node = w.nodes[i]
        ledger = self.core.append(node.book, record)
        given = w.given | (1 << m if record.kind is K.GIVEN else 0)
        written = put(w._replace(given=given), i, node._replace(book=ledger, disk=ledger))
        yield False, (), self.tell(written, i, m, e.Written(record.kind))
        if w.left.write:
            failing = spent(w, "write")
            failed = e.WriteFailed(record.kind, "EIO")
            there = put(failing._replace(given=given), i, node._replace(disk=ledger))
            yield True, ("write failed, on disk",), self.tell(there, i, m, failed)
            yield True, ("write failed, not on disk",), self.tell(failing, i, m, failed)

    def _source_acts(self, w: World, i: int, m: int, action: Action) -> Iterator[Way]:
        node = w.nodes[i]
        qemu = node.qemu
        status = qemu.status if qemu else ""
        role = busy(node, m)
        assert role is not None
        match action:
            case e.StartStream():
                state = self.core.states[role.state]
                if qemu and status == "run":
                    yield False, (), with_qemu(w, i, qemu._replace(status="copy", to=int(state.nonce)))
                else:
                    yield False, (), self.tell(w, i, m, e.AbortAsked("pre-copy did not start"))
            case e.ContinueStream() if qemu and status == "pre":
                yield False, (), with_qemu(w, i, qemu._replace(status="dev"))
            case e.CancelStream():
                if status == "comp":  # fact 1: a no-op after completed
                    yield False, (), self.tell(w, i, m, StreamMoved(Stream.COMPLETED))
                elif status in machines.STREAMING:
                    for broken in machines.broken(w, i, self.tell):
                        yield False, (), broken
                elif status in ("run", "iostop", "halt"):
                    yield False, (), self.tell(w, i, m, StreamMoved(Stream.BROKEN))
                else:
                    yield False, (), w
            case e.Run() if status in ("comp", "run", "iostop"):
                yield False, (), self.tell(runs(w, i), i, m, e.GuestRuns())
                if w.left.refuse:
                    refused = self.tell(spent(w, "refuse"), i, m, e.RunRefused("lock"))
                    yield True, ("cont refused",), refused
            case e.AwaitGuest() if status == "halt":
                yield False, (), self.tell(w, i, m, e.GuestEnded("shut down"))
            case e.AwaitGuest() if status == "run":
                yield False, (), self.tell(w, i, m, e.GuestRuns())
            case e.AwaitGuest() if status == "iostop":
                yield False, (), self.tell(w, i, m, e.RunRefused("io-error"))
            case e.KillMachine():
                gone = put(w, i, node._replace(qemu=None, port=False))
                yield False, (), self.tell(gone, i, m, e.MachineGone())
            case e.SendGo():
                plan, state = w.c.plans[m - 1], self.core.states[role.state]
                yield False, (), self.send(w, "go", m, plan.epoch_target, state.nonce)
            case e.SendAborted():
                yield False, (), self.send(w, "aborted", m)
            case e.Ask():
                yield False, (), self.send(w, "asks target", m, self.core.states[role.state].nonce)
            case e.Quarantine():
                yield False, (), put(w, i, node._replace(suspect=True))
            case _:
                yield False, (), w

    def _target_acts(self, w: World, i: int, m: int, plan: Plan, action: Action) -> Iterator[Way]:
        node = w.nodes[i]
        qemu = node.qemu
        role = busy(node, m)
        assert role is not None
        state = self.core.states[role.state]
        mine = qemu is not None and qemu.made == int(state.nonce)
        match action:
            case e.MakeMachine():
                if qemu is None:
                    made = with_qemu(w, i, Qemu(int(state.nonce), "inc", False, plan.epoch_target))
                    yield False, (), self.tell(made, i, m, e.MachineReady(int(state.nonce), int(state.nonce)))
                else:
                    yield False, ("another machine is in the way",), self.tell(w, i, m, e.MachineFailed("busy"))
                if w.left.make:
                    yield True, ("no machine",), self.tell(spent(w, "make"), i, m, e.MachineFailed("memory"))
            case e.SendLoaded():
                yield False, (), self.send(w, "loaded", m, state.nonce)
            case e.SendAnswer(word):
                yield False, (), self.send(w, "answer", m, word, state.nonce)
            case e.Ask():
                yield False, (), self.send(w, "asks source", m, state.nonce)
            case e.SendFailed():
                yield False, (), self.send(w, "failed", m)
            case e.OpenPorts():
                yield False, (), put(w, i, node._replace(port=True))
            case e.BlockPorts():
                yield False, (), put(w, i, node._replace(port=False))
            case e.Run() if qemu and mine and qemu.status == "load":
                yield False, (), self.tell(runs(w, i), i, m, e.GuestRuns())
                if w.left.refuse:
                    refused = with_qemu(spent(w, "refuse"), i, qemu._replace(status="refused"))
                    yield True, ("cont refused",), self.tell(refused, i, m, e.RunRefused("lock"))
                sent = with_qemu(w, i, qemu._replace(status="cont"))
                if w.left.reply:
                    yield True, ("no answer to cont",), self.tell(spent(sent, "reply"), i, m, e.RunUnknown())
                if w.left.kill:
                    yield True, ("killed with cont in the socket",), self.killed(sent, i)
            case e.KillMachine():
                if mine:
                    w = put(w, i, node._replace(qemu=None, port=False))
                yield False, (), self.tell(w, i, m, e.MachineGone())
            case _:
                yield False, (), w

    def send(self, w: World, *message: Any) -> World:
        number = self.core.messages.number(message)
        return w if number in w.messages else w._replace(messages=w.messages | {number})

    # -- messages and orders; each may come at any time, again and again

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
                    yield from self.feed(w, i, m, event, ("message", number))
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

    def _takes_orders(self, w: World, i: int) -> bool:
        return w.nodes[i].up and not w.nodes[i].lost and not w.nodes[i].suspect

    def _answer(self, w: World, i: int, m: int, question: str) -> World:
        """From the journal: the role is over, or was never there."""
        book = w.nodes[i].book
        if sworn := self.core.word_of(book, f"m{m}"):
            return self.send(w, "answer", m, *sworn)
        if question == "ask":
            match self.core.reply_of(book, f"m{m}"):
                case e.GoArrived(epoch, nonce):
                    return self.send(w, "go", m, epoch, nonce)
                case e.SourceAborted():
                    return self.send(w, "aborted", m)
        return w

    def _prepare(self, w: World, m: int, number: int) -> Iterator[Way]:
        plan = w.c.plans[m - 1]
        i = plan.target
        node = w.nodes[i]
        if not self._takes_orders(w, i) or busy(node, m):
            return
        if not self.core.allows("check_prepare", node.book, plan.epoch_target):
            yield False, ("order refused", number), self.send(w, "not prepared", m)
            return
        for older in node.roles:
            state = self.core.states[older.state]
            if isinstance(state, Target) and not self.core.over(older.state):
                if not self.core.may_replace(older.state):
                    yield False, ("order refused", number), self.send(w, "not prepared", m)
                else:
                    yield from self.feed(w, i, older.m, self._abort, ("order, an older one goes first", number))
                return
        attempt = next((n for n in (1, 2) if self.core.messages.number(("tried", m, n)) not in w.messages), None)
        if attempt is None:
            return
        nonce = 10 * m + attempt
        role = Target(EVM, f"m{m}", "ABC"[plan.source], str(nonce), plan.epoch_target)
        taken = put(w, i, with_role(node, Busy(m, self.core.state(role))))
        taken = self.send(taken, "tried", m, attempt)
        yield from self.feed(taken, i, m, self.core.events.number(e.Ordered()), ("order", number))

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
            yield False, ("order refused", number), self.send(w, "not handed over", m)
            return
        last = self.core.last(node.book)
        assert last is not None
        role = Source(EVM, f"m{m}", "ABC"[plan.target], nonce, last.epoch, plan.epoch_target, plan.epoch_source)
        taken = put(w, i, with_role(node, Busy(m, self.core.state(role))))
        yield from self.feed(taken, i, m, self.core.events.number(e.Ordered()), ("order", number))

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
                yield from self.feed(w, i, role.m, self._retired, ("retire", number))
                return
        gone = put(w, i, node._replace(qemu=None, port=False, roles=()))
        yield from self._record(gone, i, Record(K.RETIRED, EVM, k), ("retired", number), off=False)

    def _start(self, w: World, i: int, k: int, number: int) -> Iterator[Way]:
        node = w.nodes[i]
        if not self._takes_orders(w, i) or not self.core.allows("check_start", node.book, k):
            return
        if any(not self.core.over(r.state) for r in node.roles):
            return
        for fault, label, w2 in self._record(w, i, Record(K.OWN, EVM, k), ("started", number), off=node.off):
            if not w2.nodes[i].up or self.core.kind(w2.nodes[i].book) is not K.OWN:
                yield fault, label, w2
                continue
            booted = put(w2, i, w2.nodes[i]._replace(qemu=Qemu(0, "run", False, k), port=True, roles=()))
            yield fault, label, runs(booted, i)

    def _record(self, w: World, i: int, record: Record, label: tuple[Any, ...], *, off: bool) -> Iterator[Way]:
        """A record of the agent itself, outside any role."""
        ledger = self.core.append(w.nodes[i].book, record)
        yield False, label, put(w, i, w.nodes[i]._replace(book=ledger, disk=ledger, off=off))
        if w.left.kill:
            yield True, (*label, "killed before the record"), self.killed(w, i)

    # -- after a restart, as ``emp.agent.adoption`` does it

    def _restart(self, w: World, i: int) -> Iterator[Way]:
        node = w.nodes[i]
        qemu = node.qemu
        if qemu and qemu.status == "cont":
            return  # fact 9: the first answer that the new agent gets comes after that command has been run or dropped
        up = put(w, i, node._replace(up=True))
        last = self.core.last(self.core.replayed(node.disk))
        verdict = self.core.sweep_of(node.disk)
        label = ("agent back", i, str(verdict))
        match verdict:
            case "boot":  # only a mutant says so
                boots = up if qemu else with_qemu(up, i, Qemu(0, "run", False, last.epoch if last else 0))
                yield False, label, boots if qemu else runs(boots, i)
            case Sweep.UNKNOWN:
                never_ran = qemu is not None and qemu.status == "inc"
                yield False, label, with_qemu(up, i, None) if never_ran else up
            case Sweep.CLEAR:
                yield False, label, put(up, i, up.nodes[i]._replace(qemu=None, port=False))
            case Sweep.OWNED:
                assert last is not None
                yield from self._owned(up, i, last, label)
            case Sweep.LEAVING:
                assert last is not None and last.migration
                m = int(last.migration[1:])
                completed = qemu is not None and qemu.status == "comp"
                state, event = self.core.resume("resume_source", last, alive=qemu is not None, completed=completed)
                gone = () if qemu else (self.core.events.number(e.MachineGone()),)
                yield False, label, put(up, i, with_role(up.nodes[i], Busy(m, state, (*gone, event))))
            case Sweep.ARRIVING:
                assert last is not None and last.migration
                m = int(last.migration[1:])
                same = qemu is not None and qemu.made == last.pid
                loaded = same and qemu is not None and qemu.status in ("load", "refused")
                state, event = self.core.resume("resume_target", last, alive=same, loaded=loaded)
                yield False, label, put(up, i, with_role(up.nodes[i], Busy(m, state, (event,))))

    def _owned(self, w: World, i: int, last: Record, label: tuple[Any, ...]) -> Iterator[Way]:
        qemu = w.nodes[i].qemu
        if qemu is None:
            yield False, label, put(w, i, w.nodes[i]._replace(port=False))
            return
        qemu = qemu._replace(relayed=0)  # what the agent that was killed had not come to
        w = with_qemu(w, i, qemu)
        opened = put(w, i, w.nodes[i]._replace(port=True))
        stands = self.core.waits_for_its_owner(
            last, loaded=qemu.status in ("load", "refused"), completed=qemu.status == "comp"
        )
        if stands:
            yield False, (*label, "cont"), runs(opened, i)
            if w.left.refuse:
                yield True, (*label, "cont refused"), spent(w, "refuse")
        else:
            yield False, label, opened if qemu.status == "run" else w
