"""What an agent does by itself: it feeds its roles, carries out their actions, dies, and comes back.

Every way that an action can go is tried (``hands``), and the agent is killed between any two of them. What it is told
and ordered is in ``orders``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from emp.migration import events as e
from emp.migration.events import Timer, TimerFired
from emp.migration.records import OWNING, Record, RecordKind
from emp.migration.states import TargetPhase
from emp.migration.sweep import Sweep
from emp.model.orders import RolePhase
from tests.search.hands import EVM, TIMERS, Hands, Way
from tests.search.project import Core
from tests.search.world import Busy, Qemu, World, busy, put, runs, spent, with_qemu, with_role

K = RecordKind


class Agents:
    """The moves of all agents. ``fine``: a role's events are looked at one by one, so that others come between them."""

    def __init__(self, core: Core, *, fine: bool) -> None:
        self.core = core
        self.fine = fine
        self.hands = Hands(core)
        self._go_on = {timer: core.events.number(TimerFired(timer)) for timer in Timer}
        self._abort = core.events.number(e.AbortAsked("asked"))

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
            lost = self.hands.killed(w._replace(left=w.left._replace(kill=w.left.kill + 1, gone=w.left.gone - 1)), i)
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
            yield True, ("agent killed", i), self.hands.killed(w, i)
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
            yield from self.hands.record(
                cleared, i, Record(K.STOPPED, EVM, last.epoch), ("guest ended", i), off=node.off
            )

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
                        yield True, (*label, "killed before", type(action).__name__), self.hands.killed(w, i)
                    for more_fault, more, done in self.hands.act(w, i, m, action):
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
            return self.hands.send(w, "prepared", m, int(self.core.states[after].nonce))
        return w

    def _ended(self, w: World, i: int, role: Busy, phase: RolePhase) -> World:
        """A role that is over says what the journal says; only one whose machine is gone says more."""
        if i == w.c.plans[role.m - 1].source:
            w = self.hands.unlinked(w, i, role.m)
        node = w.nodes[i]
        if phase is RolePhase.LOST:
            return put(w, i, with_role(node, role._replace(inbox=(), timers=0)))
        return put(w, i, node._replace(roles=tuple(r for r in node.roles if r.m != role.m)))

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
