"""What becomes of each action of a role's: every way that it can go, and the agent's death before it is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from emp.migration import events as e
from emp.migration.events import Action, Event, Stream, StreamMoved, Timer
from emp.migration.records import OWNING, Record, RecordKind
from tests.search import machines
from tests.search.project import Core
from tests.search.world import Plan, Qemu, World, busy, put, runs, spent, with_qemu, with_role

K = RecordKind
TIMERS = list(Timer)
EVM = "web"

Way = tuple[bool, tuple[Any, ...], World]
"""(does it take a fault, what happened, the next world)"""


class Hands:
    """Whatever an agent does to the world."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def tell(self, w: World, i: int, m: int, event: Event) -> World:
        """Put an event into the inbox of a role, if it is there and not over."""
        node = w.nodes[i]
        role = busy(node, m)
        if role is None or self.core.over(role.state):
            return w
        return put(w, i, with_role(node, role._replace(inbox=(*role.inbox, self.core.events.number(event)))))

    def send(self, w: World, *message: Any) -> World:
        number = self.core.messages.number(message)
        return w if number in w.messages else w._replace(messages=w.messages | {number})

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

    def record(self, w: World, i: int, record: Record, label: tuple[Any, ...], *, off: bool) -> Iterator[Way]:
        """A record of the agent itself, outside any role."""
        ledger = self.core.append(w.nodes[i].book, record)
        yield False, label, put(w, i, w.nodes[i]._replace(book=ledger, disk=ledger, off=off))
        if w.left.kill:
            yield True, (*label, "killed before the record"), self.killed(w, i)

    # -- actions

    def act(self, w: World, i: int, m: int, action: Action) -> Iterator[Way]:
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
