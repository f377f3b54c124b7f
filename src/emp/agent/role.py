"""What the two roles of a migration have in common: a queue of events, the core's ``step``, actions, timers, snapshots.

One task per role takes the events in order. Quick actions are done before the next event is looked at, slow ones in a
task of their own that feeds its result back. The snapshot that the controller watches is made from the state, so a
watcher that was away misses nothing that still matters.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Generic, TypeVar

from emp import faults
from emp.agent.assembly import Assembly
from emp.agent.journal import Journal, JournalWriteFailed
from emp.agent.signal import Signal
from emp.migration.events import (
    AbortAsked,
    Action,
    Event,
    SetTimer,
    Timer,
    TimerFired,
    WriteFailed,
    WriteRecord,
    Written,
)
from emp.migration.states import Source, Target
from emp.model.errors import EmpError
from emp.model.migration import Progress, Stage, WatchLine
from emp.model.orders import Role as RoleName
from emp.model.orders import RoleFigures, RolePhase, RoleStatus

log = logging.getLogger(__name__)

State = TypeVar("State", bound=Source | Target)

REPEAT_S = 1.0
RETRY_S, RETRY_MOST_S = 0.1, 5.0
"""``cont`` that was refused is sent again after the first, then after twice as long, up to the second"""
ANSWER_S = 2.0
"""how long a restarted source waits for its target's answer, its guest paused; a good link takes milliseconds"""
_COALESCE_S = 0.01
_QUIET_S = 0.1
"""a snapshot of a blackout waits this long, or for the role's end: telling must not take the processor from doing"""


class Role(Generic[State]):
    """One end of one migration, from the order to the end."""

    name: RoleName

    def __init__(
        self,
        state: State,
        step: Callable[[State, Event], tuple[State, tuple[Action, ...]]],
        journal: Journal,
        deadlines_s: dict[Timer, float],
    ) -> None:
        self.state = state
        self.figures = RoleFigures()
        self.progress = Progress()
        self.watched: tuple[WatchLine, ...] = ()
        self.changed = Signal()
        self.dropped = False
        """it never began, and nobody knows of it any more"""
        self._step = step
        self._journal = journal
        self._deadlines_s = {Timer.REPEAT: REPEAT_S, Timer.ANSWER: ANSWER_S, Timer.RETRY: RETRY_S, **deadlines_s}
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._timers: dict[Timer, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[None] | None = None

    # -- what happens

    def begin(self, event: Event) -> None:
        """Start the role with its first event."""
        self.feed(event)
        self._main = asyncio.create_task(self._loop(), name=f"{self.name} of {self.state.migration}")

    def feed(self, event: Event) -> None:
        self._events.put_nowait(event)

    async def _loop(self) -> None:
        while not self.phase.final:
            event = await self._events.get()
            before = self.state
            self.state, actions = self._step(before, event)
            for action in actions:
                try:
                    await self._reach(action)
                except Exception as error:
                    log.exception("%s: %s", self.state.migration, action)
                    self.feed(AbortAsked(f"{type(action).__name__} failed: {error}"))
            if actions or self.state != before:
                log.info("%s %s: %s -> %s", self.state.migration, self.name, event, self.state.phase)
            if self.phase.final:
                await self.ended()
            if self.state != before:
                self.changed.notify()
        for timer in self._timers.values():
            timer.cancel()

    async def _reach(self, action: Action) -> None:
        if faults.board is None:
            await self._act(action)
        else:
            await faults.board.around(f"{self.name}.{faults.name_of(action)}", lambda: self._act(action))

    async def _act(self, action: Action) -> None:
        match action:
            case WriteRecord(record):
                try:
                    await self._journal.append(record)
                except JournalWriteFailed as error:
                    log.error("%s: %s", self.state.migration, error)
                    self.feed(WriteFailed(record.kind, str(error)))
                else:
                    self.written(record.kind.value)
                    self.feed(Written(record.kind))
            case SetTimer(timer):
                self._set_timer(timer)
            case _:
                await self.act(action)

    def _set_timer(self, timer: Timer) -> None:
        if old := self._timers.get(timer):
            old.cancel()
        loop = asyncio.get_running_loop()
        after_s = self._deadlines_s[timer]
        self._timers[timer] = loop.call_later(after_s, self.feed, TimerFired(timer))
        if timer is Timer.RETRY:
            self._deadlines_s[timer] = min(2 * after_s, RETRY_MOST_S)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a slow action beside the event loop of this role."""
        task = asyncio.create_task(work, name=f"{self.name}: {getattr(work, '__name__', work)}")
        self._tasks.add(task)
        task.add_done_callback(self._spawned_done)
        return task

    def _spawned_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s: %s failed", self.state.migration, task.get_name(), exc_info=error)
            self.feed(AbortAsked(f"{task.get_name()} failed: {error}"))

    async def dismantled(self, assembly: Assembly | None) -> None:
        """Return when nothing of the machine is left: what follows swears to that, so it is tried until it is true."""
        while assembly is not None:
            try:
                await assembly.dismantle()
            except (EmpError, OSError) as error:
                log.error("%s: its machine is not gone yet: %s", self.state.migration, error)
                await asyncio.sleep(REPEAT_S)
            else:
                return

    # -- what a role adds

    async def act(self, action: Action) -> None:
        raise NotImplementedError

    def written(self, kind: str) -> None:
        """A record is on disk."""

    async def ended(self) -> None:
        """The role's phase is final; nobody has been told yet."""

    # -- what others see

    @property
    def phase(self) -> RolePhase:
        return self.state.shown[0]

    @property
    def status(self) -> RoleStatus:
        phase, stage = self.state.shown
        return RoleStatus(
            migration=self.state.migration,
            evm=self.state.evm,
            role=self.name,
            phase=phase,
            stage=stage,
            committed=self.state.committed,
            cause="; ".join(filter(None, (self.state.cause, self.state.trouble))) or None,
            progress=self.progress,
            figures=self.figures,
            nonce=self.state.nonce,
            wants_courier=self.state.wants_courier,
            watch=self.watched,
        )

    def measured(self, **figures: float | int | None) -> None:
        self.figures = self.figures.model_copy(update=figures)

    async def watch(self) -> AsyncGenerator[RoleStatus]:
        """Yield a snapshot now and after each change; ends with the final one."""
        while True:
            seen = self.changed.version
            status = self.status
            yield status
            if status.phase.final or self.dropped:
                return
            await self.changed.beyond(seen)
            if not self.phase.final and self._main is not None:
                blackout = self.state.shown[1] is Stage.BLACKOUT
                await asyncio.wait([self._main], timeout=_QUIET_S if blackout else _COALESCE_S)

    def drop(self) -> None:
        """End every watch of a role that could not begin: asked again, this node says that it knows of none."""
        self.dropped = True
        self.changed.notify()

    async def until(self, condition: Callable[[], bool], *, timeout_s: float) -> bool:
        """Return once ``condition`` holds (looked at after each step), or False after ``timeout_s``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self.changed.beyond(self.changed.version)
        return condition()

    async def until_final(self) -> None:
        """Return when the role is over and everything it had to do is done."""
        if self._main is not None:
            await asyncio.shield(self._main)

    async def close(self) -> None:
        """Stop driving (the agent stops); nothing happens to the machines. The journal brings the role back."""
        for timer in self._timers.values():
            timer.cancel()
        tasks = [*self._tasks, *([self._main] if self._main else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
