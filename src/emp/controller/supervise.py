"""Carries out what ``emp.migration.supervisor`` decides for one migration, and tells it what happened.

The two agents do the migration between themselves; here volumes are attached, the two orders given, both ends watched,
and the record kept. The record is written where a stage begins; what lies between goes to ``Hub`` alone. Orders that
are out are waited for before their end is asked to go back: an abort must not overtake what it aborts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from emp import faults
from emp.controller import trust
from emp.controller.steps import Steps, Tools
from emp.controller.tally import Tally
from emp.migration import supervisor
from emp.migration.supervisor import Phase, Says, StepFailed, Supervisor, step
from emp.model.errors import EmpError, NotFound, OutcomeUnknown
from emp.model.migration import Migration, Outcome, VolumeOrder
from emp.model.node import Node
from emp.model.orders import AbortOrder, Role, RolePhase, RoleStatus

log = logging.getLogger(__name__)

REWATCH_S = 0.5
"""pause before an end that gave no final word is watched again"""

LINGER_S = 1.0
AGAIN_S = 2.0
"""pause before a refused clearing-up is tried again"""
COURIER_S = 1.0
"""pause before a word is carried again"""
DECIDE_S = 5.0
"""how long an abort waits for its decision"""

T = TypeVar("T")


class Supervision:
    """One migration, from its plan or from the restart of the controller to its end."""

    def __init__(self, tools: Tools, migration: Migration) -> None:
        self._tools = tools
        self._tally = Tally(migration)
        self._steps = Steps(tools, self._tally, self._show_moves)
        self._state = Supervisor()
        self._events: asyncio.Queue[supervisor.Event] = asyncio.Queue()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turned = asyncio.Condition()
        self._unknown: set[Role] = set()
        """ends whose agent knows nothing of this migration"""
        self._trouble: dict[Role, EmpError] = {}
        """why an end could not be told what it has to be told"""

    @property
    def live(self) -> Migration:
        return self._tally.migration

    @property
    def id(self) -> str:
        return self.live.id

    # -------------------------------------------------------------- from outside

    async def abort(self, reason: str) -> Migration:
        """Begin to go back, if that is still possible, and wait for the decision; return how it stands then.

        Raises ``OutcomeUnknown`` when it is not known within ``DECIDE_S``.
        """
        self._tally.abort_asked(reason)
        self._feed(supervisor.AbortAsked(reason))
        try:
            async with asyncio.timeout(DECIDE_S):
                await self.until(lambda: self._is_decided)
        except TimeoutError:
            raise self._undecided() from None
        return self.live

    @property
    def has_landed(self) -> bool:
        """Whether the EVM runs on the target and its source is clear: what is left is to have all follow it."""
        return self._state.phase is Phase.DETACHING and self._state.outcome is Outcome.COMPLETED

    @property
    def _is_decided(self) -> bool:
        return self.live.committed or self.live.outcome is not None

    def _undecided(self) -> OutcomeUnknown:
        source = self.live.source
        trouble = self._trouble.get(Role.SOURCE)
        why = f"{source} cannot be reached: {trouble.message}" if trouble else f"{source} has not decided yet"
        return OutcomeUnknown(
            f"migration {self.id} is asked to go back, and may or may not: {why}",
            field="migration",
            hint=f"it is asked again until it answers; on {source} itself: emp agent abort {self.id}; "
            f"see: emp migration show {self.id}",
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once ``condition`` holds; it is looked at after every turn."""
        async with self._turned:
            await self._turned.wait_for(condition)

    @property
    def needs_recovery(self) -> bool:
        """Whether an end is lost in a way that nothing but a cold restart helps: fenced, or it has forgotten."""
        nodes = [self._tools.nodes.find(self._steps.node_of(role)) for role in Role]
        fenced = any(node is not None and node.fence is not None for node in nodes)
        return fenced or (self.live.committed and bool(self._unknown))

    async def give_up(self, reason: str) -> None:
        """Close it as lost: a cold restart follows, which retires both ends first."""
        self._feed(supervisor.GivenUp(reason))
        await self.until(lambda: self._state.phase is Phase.CLOSED)

    def node_down(self, node: Node) -> None:
        for role in Role:
            if self._steps.node_of(role) == node.name:
                self._feed(supervisor.NodeLost(role))

    async def run(self, *, resumed: bool) -> None:
        """Supervise until it is closed. An error that nobody foresaw makes it look at both ends anew."""
        self._feed(supervisor.Resumed(self.live.nonce is not None) if resumed else supervisor.Begun())
        try:
            while self._state.phase is not Phase.CLOSED:
                event = await self._events.get()
                try:
                    await self._turn(event)
                except Exception:
                    log.exception("migration %s: looking at both ends anew", self.id)
                    await self._start_anew()
            await self._linger()
        finally:
            await self._end_tasks()

    # -------------------------------------------------------------- one turn

    async def _turn(self, event: supervisor.Event) -> None:
        before = self._state
        self._state, actions = step(before, event)
        if actions or self._state != before:
            log.info("migration %s: %s -> %s", self.id, event, self._state.phase)
        self._tally.stands(self._state)
        self._tally.waits(self._waits_for())
        for action in actions:
            await self._reach(action)
        if self._state.phase is not Phase.CLOSED:
            await self._save()
        self._tools.hub.show(self.live, self._tools.book.migrations.revision_of(self.id))
        if self._state.phase is not before.phase:
            self._feed_lost_nodes()
        async with self._turned:
            self._turned.notify_all()

    def _waits_for(self) -> str | None:
        """What a person should know of a migration that cannot go on, and of what they may do."""
        lost = [self._steps.node_of(role) for role in self._lost_roles()]
        if alarms := [*self._steps.moves.alarms.values(), *filter(None, [self._steps.reassignment.alarm])]:
            return "; ".join(alarms)
        if self._state.outcome is Outcome.COMPLETED or self._state.phase not in (Phase.WATCHING, Phase.SETTLING):
            return None
        if lost and self._state.phase is Phase.WATCHING:
            return (
                f"waits for {' and '.join(lost)}, whose agent does not answer; if that is lost for good: "
                f"{trust.fence_command(lost[0])}, then emp evm recover {self.live.evm}"
            )
        if self._state.wanted and not self.live.moving:  # in the classic order the target is only not there yet
            trouble = next(iter(self._trouble.values()), None)
            ends = f"{self.live.source} and {self.live.target} cannot reach each other"
            return f"{ends}; {f'nor can they be reached: {trouble.message}' if trouble else 'their words are carried'}"
        return None

    async def _reach(self, action: supervisor.Action) -> None:
        if faults.board is None:
            await self._act(action)
        else:
            await faults.board.around(f"controller.{faults.name_of(action)}", lambda: self._act(action))

    async def _act(self, action: supervisor.Action) -> None:
        match action:
            case supervisor.Attach():
                self._spawn("attach", self._attach())
            case supervisor.Prepare():
                self._spawn("prepare", self._prepare())
            case supervisor.HandOver():
                self._spawn("hand over", self._hand_over())
            case supervisor.Watch(role):
                self._spawn(f"watch {role}", self._watch(role))
            case supervisor.Abort(role, reason, source_is_back):
                # A copy that has loaded everything heeds only the second: it must not wait behind the first.
                name = f"abort {role}" + (" for good" if source_is_back else "")
                self._spawn(name, self._abort(role, reason, source_is_back))
            case supervisor.CarryGo():
                self._spawn("carry go", self._carry(Role.TARGET, self._steps.carry_go))
            case supervisor.CarryAnswer(phase):
                self._spawn("carry answer", self._carry(Role.SOURCE, lambda: self._steps.carry_answer(phase)))
            case supervisor.Detach(role):
                self._spawn("detach", self._detach(role))
            case supervisor.RecordOwner(role):
                lost = self._state.outcome is Outcome.LOST
                await self._steps.record_owner(role, lost=(self._state.cause or "lost") if lost else None)
            case supervisor.Close(outcome, cause):
                await self._hear_the_other_end()
                await self._steps.close(outcome, cause, silent=self._lost_roles())
                log.info("migration %s of %s: %s%s", self.id, self.live.evm, outcome, f" ({cause})" if cause else "")

    async def _hear_the_other_end(self) -> None:
        """One end's last word can close a migration that this process has only just taken up: the report needs both."""
        for role in self._tally.unheard:
            if role in self._lost_roles():
                continue
            watch = self._steps.agent(role).watch(self.id)
            with contextlib.suppress(EmpError, TimeoutError, StopAsyncIteration):
                async with asyncio.timeout(LINGER_S), contextlib.aclosing(watch) as said:
                    self._tally.heard(await anext(said))

    def _feed_lost_nodes(self) -> None:
        """Tell a phase that has just begun of nodes that were down before it."""
        for role in self._lost_roles():
            self._feed(supervisor.NodeLost(role))

    def _lost_roles(self) -> list[Role]:
        """Return the ends whose node does not report now."""
        nodes = {role: self._tools.nodes.find(self._steps.node_of(role)) for role in Role}
        return [role for role, node in nodes.items() if node is None or not node.ready]

    async def _save(self) -> None:
        try:
            await self._steps.save()
        except EmpError as error:  # both ends know better; it is written with the next change
            log.error("migration %s: its record could not be written: %s", self.id, error)

    # -------------------------------------------------------------- what is done beside

    async def _attach(self) -> None:
        await self._steps.attach()
        self._feed(supervisor.Attached())

    async def _prepare(self) -> None:
        await self._steps.prepare()
        self._feed(supervisor.TargetPrepared())

    async def _hand_over(self) -> None:
        self._hear(await self._steps.hand_over())

    async def _abort(self, role: Role, reason: str, source_is_back: bool) -> None:
        await self._answered("prepare" if role is Role.TARGET else "hand over")
        wait_s = DECIDE_S if role is Role.SOURCE else 0.0
        order = AbortOrder(reason=reason, source_is_back=source_is_back, wait_s=wait_s)
        try:
            self._hear(await self._until_done(lambda: self._told(role, lambda: self._steps.abort(role, order))))
        except NotFound:
            self._hear_nothing(role)

    async def _told(self, role: Role, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Tell that end something, and remember what stands in the way while it does."""
        try:
            answer = await call()
        except EmpError as error:
            self._trouble[role] = error
            raise
        self._trouble.pop(role, None)
        return answer

    async def _carry(self, role: Role, carry: Callable[[], Coroutine[Any, Any, RoleStatus]]) -> None:
        """Carry one word to that end; whether it arrived or not, it is looked at again after a while."""
        try:
            self._hear(await self._told(role, carry))
        except EmpError as error:
            log.info("migration %s: a word to its %s: %s", self.id, role, error)
        await asyncio.sleep(COURIER_S)
        asyncio.get_running_loop().call_soon(self._feed, supervisor.CourierDue())  # once this task is over

    async def _move(self) -> None:
        await self._until_done(self._steps.move)

    async def _show_moves(self) -> None:
        moves = self._steps.moves
        self._tally.moved(tuple(moves.made.values()))
        if readdressed := self._steps.reassignment.made:
            self._tally.readdressed(readdressed)
        await self._steps.handovers.note(moves.alarms, moves.made, moves.tries)
        self._tally.waits(self._waits_for())
        await self._save()
        self._tools.hub.show(self.live, self._tools.book.migrations.revision_of(self.id))

    async def _readdress(self, *, tell_again: bool) -> None:
        await self._until_done(lambda: self._steps.readdress(tell_again=tell_again))

    async def _detach(self, role: Role) -> None:
        if role is Role.TARGET:  # it goes back, though it was committed
            await self._end_task("readdress")
        await self._answered("attach")
        await self._answered("move")
        await self._until_done(lambda: self._steps.detach(role))
        self._feed(supervisor.Detached())

    async def _watch(self, role: Role) -> None:
        """Follow one end until its last word, over every break of the connection."""
        await self._answered("prepare")
        await self._answered("hand over")  # on whose way nothing else stands
        while True:
            try:
                async with contextlib.aclosing(self._steps.agent(role).watch(self.id)) as statuses:
                    async for status in statuses:
                        self._hear(status)
                        if status.phase.final and not self._is_doubted(role):  # else its last word is yet to be taken
                            return
            except NotFound:
                self._hear_nothing(role)
            except EmpError as error:
                log.info("migration %s: %s", self.id, error)
            await asyncio.sleep(REWATCH_S)

    def _hear(self, status: RoleStatus) -> None:
        if self._is_doubted(status.role):
            return
        self._unknown.discard(status.role)
        self._tally.heard(status)
        classic = self.live.policy.volume_order is VolumeOrder.CLASSIC
        if classic and (status.role, status.phase) == (Role.TARGET, RolePhase.ACTIVATED):  # it waits for its volumes
            self._spawn("move", self._move())
        self._readdress_after(status)
        self._feed(Says(status.role, status.phase, status.cause, status.wants_courier))

    def _readdress_after(self, status: RoleStatus) -> None:
        """Begin at the first word of the commit: the source forwards until the addresses are the target's.

        While it does its agent is told again, as it may be another one by now.
        """
        begins = status.committed and self._state.outcome is not Outcome.ABORTED and self._tools.reach.is_routed
        forwards = status.phase is RolePhase.GIVEN
        if begins and (forwards or not self._steps.reassignment.is_over):
            self._spawn("readdress", self._readdress(tell_again=forwards))

    def _hear_nothing(self, role: Role) -> None:
        """Its agent knows nothing of this migration."""
        if not self._is_doubted(role):
            self._unknown.add(role)
            self._feed(Says(role, None))

    def _is_doubted(self, role: Role) -> bool:
        """Whether the word of that end is not taken."""
        node = self._tools.nodes.find(self._steps.node_of(role))
        return node is not None and trust.doubt(node) is not None

    async def _until_done(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What clears up after a migration is repeated until it has happened, whatever stands in its way."""
        while True:
            try:
                return await call()
            except NotFound:
                raise
            except EmpError as error:
                log.error("migration %s: %s; trying again", self.id, error)
                await asyncio.sleep(AGAIN_S)

    async def _answered(self, order: str) -> None:
        """Wait until that order, if it is on its way, has been answered: nothing that undoes it may overtake it."""
        if task := self._tasks.get(order):
            await asyncio.wait([task])

    # -------------------------------------------------------------- tasks

    def _feed(self, event: supervisor.Event) -> None:
        self._events.put_nowait(event)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run a slow action beside; what runs already is not begun twice."""
        if name in self._tasks and not self._tasks[name].done():
            work.close()
            return
        task = asyncio.create_task(self._guarded(work), name=f"{name} {self.id}")
        task.add_done_callback(lambda _: work.close())  # one that is cancelled before its first step never awaits it
        self._tasks[name] = task

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """A failure is a failed step. Only a refusal and what was never sent are sure not to have happened."""
        try:
            await work
        except EmpError as error:
            self._feed(StepFailed(str(error), sure=not isinstance(error, OutcomeUnknown)))
        except Exception:
            log.exception("migration %s: looking at both ends anew", self.id)
            await asyncio.sleep(REWATCH_S)
            self._feed(supervisor.Resumed(self.live.nonce is not None))

    async def _end_task(self, name: str) -> None:
        if task := self._tasks.get(name):
            task.cancel()
            await asyncio.wait([task])

    async def _start_anew(self) -> None:
        await self._end_tasks()
        await asyncio.sleep(REWATCH_S)
        self._state, waiting = Supervisor(), self._events
        self._events = asyncio.Queue()
        self._feed(supervisor.Resumed(self.live.nonce is not None))  # before what waits: it says where that is met
        while not waiting.empty():
            self._feed(waiting.get_nowait())

    async def _linger(self) -> None:
        """Let the watches hear their ends out: one broken off in its TLS handshake would leave a socket open."""
        if left := [task for task in self._tasks.values() if not task.done()]:
            await asyncio.wait(left, timeout=LINGER_S)

    async def _end_tasks(self) -> None:
        tasks = [task for task in self._tasks.values() if not task.done()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._tasks.clear()
