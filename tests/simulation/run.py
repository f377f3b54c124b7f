"""One seed: a pool, a few migrations under faults, and after each the question whether all is well."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from emp.controller.services import Services
from emp.model.api import EvmCreate, EvmStart
from emp.model.errors import EmpError
from emp.model.evm import Evm, EvmState
from emp.model.migration import Migration, MigrationRequest, Outcome, Policy, Stage, VolumeOrder
from tests.simulation import faults
from tests.simulation.checks import troubles
from tests.simulation.errors import Stuck, Violation
from tests.simulation.loop import VirtualLoop
from tests.simulation.patches import GROUND
from tests.simulation.world import World

LIMIT_S = 6000.0
SETTLE_S = 300.0
"""virtual seconds in which all must be well once nothing is disturbed any more"""
UNDISTURBED_S = 90.0
"""virtual seconds that a migration gets before everything heals"""


@dataclass
class Result:
    seed: int
    migrations: int = 0
    outcomes: list[str] = field(default_factory=list)
    fired: list[str] = field(default_factory=list)
    moments: int = 0
    virtual_s: float = 0.0
    digest: int = 0
    violation: str | None = None
    trace: list[str] = field(default_factory=list)


def run_seed(seed: int, *, keep_trace: bool = False, planned: list[faults.Planned] | None = None) -> Result:
    """Simulate ``seed``; whatever goes wrong is in the result. ``planned``: one migration with these faults alone."""
    rng = random.Random(seed)
    GROUND.rng, GROUND.ids = rng, itertools.count(1)
    GROUND.skews_s.clear()
    result = Result(seed)
    loop = VirtualLoop(rng, limit_s=LIMIT_S)
    asyncio.set_event_loop(loop)
    world = World(loop, rng, nodes=rng.choice((2, 3, 3)), keep_trace=keep_trace)
    if keep_trace:
        logging.disable(logging.NOTSET)
        logging.getLogger().handlers = [_Tracer(world)]
        logging.getLogger().setLevel(logging.INFO)
    else:
        logging.disable(logging.CRITICAL)
    try:
        loop.run_until_complete(Scenario(world, rng, result, planned).play())
    except (Violation, Stuck) as error:
        result.violation = f"{type(error).__name__}: {error}"
    finally:
        result.moments, result.virtual_s, result.digest = world.moments, loop.now, world.digest
        result.fired += world.fired
        result.trace = list(world.trace)
        _bury(loop)
    return result


def _bury(loop: VirtualLoop) -> None:
    """End what still runs, so that the next seed finds nothing of it."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.set_exception_handler(lambda *_: None)
    if tasks:
        try:
            loop.run_until_complete(asyncio.wait(tasks, timeout=1))
        except (Violation, Stuck):
            tasks.clear()
    loop.close()
    asyncio.set_event_loop(None)


class _Tracer(logging.Handler):
    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self._world.trace.append(f"{self._world.loop.now:10.4f}      {record.name}: {text}")


class Scenario:
    def __init__(self, world: World, rng: random.Random, result: Result, planned: list[faults.Planned] | None) -> None:
        self.planned = planned
        self.world = world
        self.rng = rng
        self.result = result

    async def play(self) -> None:
        world, rng = self.world, self.rng
        for daemon in world.daemons:
            daemon.start()
        await self.until(lambda s: len(s.nodes.ready()) == len(world.agents), 30, "the nodes report")
        names = ["web"] if rng.random() < 0.7 else ["web", "db"]
        for name in names:
            volumes = tuple(f"{rng.choice(('io2', 'gp3'))}:1GiB" for _ in range(rng.choice((0, 1, 1, 2))))
            memory_bytes = rng.choice((64, 256, 512)) << 20
            await self.person(
                lambda s, n=name, v=volumes, m=memory_bytes: s.evms.create(  # type: ignore[misc]
                    EvmCreate(name=n, memory_bytes=m, volumes=v)
                )
            )
        for _ in range(rng.choice((1, 2, 3)) if self.planned is None else 1):
            await self.migrate(rng.choice(names), faults.draw(rng) if self.planned is None else self.planned)
            await self.settle()
        for name in names:  # whatever came before, the next one succeeds
            migration = await self.migrate(name, [])
            await self.settle()
            if migration is None or migration.outcome is not Outcome.COMPLETED:
                why = f"{migration.outcome}, {migration.cause}" if migration else "refused"
                self.world.violated(f"an undisturbed migration of {name} did not succeed: {why}")

    # -- one migration

    async def migrate(self, name: str, planned: list[faults.Planned]) -> Migration | None:
        world, rng = self.world, self.rng
        evm = self.services.book.evms.get(name)
        others = [node for node in world.agents if node != evm.owner]
        target = rng.choice(others)
        policy = Policy(
            max_blackout_ms=rng.choice((10, 30, 300)),
            deadline_s=rng.choice((20.0, 60.0)),
            blackout_deadline_s=rng.choice((2.0, 5.0, 10.0)),
            volume_order=rng.choice((VolumeOrder.RESUME_FIRST, VolumeOrder.RESUME_FIRST, VolumeOrder.CLASSIC)),
            source_must_be_empty=rng.random() < 0.2,
        )
        assert evm.owner is not None
        world.begins(name, evm.owner, target)
        world.armed = list(planned)
        world.wants_abort = False
        request = MigrationRequest(target=target, policy=policy)
        try:
            begun = await self.person(lambda s: s.migrations.begin(name, request))
        except EmpError as error:
            world.note(f"not begun: {error}")
            begun = None
        self.result.migrations += 1
        until = world.loop.now + UNDISTURBED_S
        while world.loop.now < until and not self.is_over(name):
            if world.wants_abort and begun is not None and world.controller.services is not None:
                world.wants_abort = False
                await self.try_abort(begun.id)
            await asyncio.sleep(0.25)
        faults.heal(world)
        world.track = None
        await self.until(lambda s: self.is_over(name), SETTLE_S, "the migration is closed")
        latest = self.services.migrations.all(evm=name) if self.services.book.migrations.held else []
        migration = latest[0] if latest else None
        if migration is not None:
            self.result.outcomes.append(str(migration.outcome))
            if migration.outcome is not Outcome.COMPLETED and not migration.cause:
                world.violated(f"migration {migration.id} was {migration.outcome} without a cause")
        return migration if begun is not None else None

    async def try_abort(self, migration: str) -> None:
        try:
            await self.person(lambda s: s.migrations.abort(migration, "asked by a person"))
        except EmpError as error:
            self.world.note(f"abort: {error}")

    def is_over(self, name: str) -> bool:
        services = self.world.controller.services
        if services is None or not self.world.controller.alive:
            return False
        open_ones = [m for m in services.book.migrations.all() if m.evm == name and m.stage is not Stage.CLOSED]
        return not open_ones

    # -- and then

    async def settle(self) -> None:
        """All is well within ``SETTLE_S``; a person does what the runbook says of an EVM that ended."""
        deadline, asked = self.world.loop.now + SETTLE_S, False
        while True:
            found = troubles(self.world)
            if not found:
                await asyncio.sleep(1.0)  # and it stays so
                if not troubles(self.world):
                    return
            if self.world.loop.now > deadline:
                self.world.violated(f"not well after {SETTLE_S:g} s: {'; '.join(found)}")
            if self.world.loop.now > deadline - SETTLE_S / 2 or not asked:
                asked = await self.help() or asked
            await asyncio.sleep(0.5)

    async def help(self) -> bool:
        """Start what was shut down from inside, as a person would: nothing else may need one."""
        done = False
        for evm in self.services.book.evms.all():
            if evm.state is EvmState.STOPPED and evm.migration is None and not self.is_busy(evm):
                self.world.note(f"a person starts {evm.spec.name}")
                try:
                    await self.person(lambda s, n=evm.spec.name: s.evms.start(n, EvmStart()))  # type: ignore[misc]
                except EmpError as error:
                    self.world.note(f"start: {error}")
                done = True
        return done

    def is_busy(self, evm: Evm) -> bool:
        upkeep = self.services.book.upkeep.find(evm.spec.name)
        return upkeep is not None and upkeep.intent is not None

    # -- a person at the API

    @property
    def services(self) -> Services:
        services = self.world.controller.services
        assert services is not None
        return services

    async def person(self, call: Callable[[Services], Awaitable[Any]]) -> Any:
        """Ask the controller; raises its error, or ``EmpError`` if it died meanwhile."""
        process = self.world.controller.process
        assert process is not None

        async def ask() -> Any:
            return await call(self.services)

        task = process.spawn(ask(), "a person asks")
        await asyncio.wait([task])
        if task.cancelled():
            raise EmpError("the controller went away")
        return task.result()

    async def until(self, condition: Callable[[Services], bool], within_s: float, what: str) -> None:
        deadline = self.world.loop.now + within_s
        while True:
            services = self.world.controller.services
            if services is not None and self.world.controller.alive and condition(services):
                return
            if self.world.loop.now > deadline:
                self.world.violated(f"not within {within_s:g} s: {what}")
            await asyncio.sleep(0.25)
