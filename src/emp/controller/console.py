"""An EVM's serial console, as one connection that outlives the machine behind it.

The agent's stream ends when its machine does. If the EVM has moved, or is started again, the new owner's stream goes on
behind it; only when the EVM is stopped or deleted does the client's end too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from emp.controller.agents import Agents
from emp.controller.book import Book
from emp.controller.hub import Hub
from emp.controller.nodes import Nodes
from emp.controller.restart import wants_restart
from emp.model.errors import BadInput, Conflict, EmpError, NotFound
from emp.model.evm import Evm, EvmState
from emp.model.migration import Stage

log = logging.getLogger(__name__)

MAX_INPUT_BYTES = 64 << 10
AGAIN_S = 0.5
"""pause before a stream of the same machine that broke is opened again"""
HELD_S = 15.0
"""how long input waits for the end of a blackout"""
_OVER = (EvmState.STOPPED, EvmState.CRASHED)


@dataclass(frozen=True)
class _Machine:
    """Which machine a stream belongs to."""

    node: str
    epoch: int


class Consoles:
    def __init__(self, book: Book, nodes: Nodes, agents: Agents, hub: Hub) -> None:
        self._book = book
        self._nodes = nodes
        self._agents = agents
        self._hub = hub
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End every stream: the daemon stops."""
        self._closing.set()

    # -------------------------------------------------------------- output

    async def open(self, name: str) -> AsyncGenerator[bytes]:
        """Return the console's output from a little before now on. Raises ``NotFound`` or ``Conflict``."""
        evm = self._book.evms.get(name, field="evm")
        if self._is_over(evm):
            raise Conflict(f"EVM {name} is {evm.state}: it has no console", field="evm", hint=f"emp evm start {name}")
        if evm.owner is not None:
            self._nodes.need_ready(evm.owner, field="evm")
        return self._until_closing(self._follow(name))

    async def _follow(self, name: str) -> AsyncGenerator[bytes]:
        shown = tried = None
        while (machine := await self._next_machine(name, tried)) is not None:
            agent = self._agents.of(self._nodes.get(machine.node))
            try:
                async with contextlib.aclosing(agent.console(name, backlog=machine != shown)) as output:
                    async for data in output:
                        shown = machine
                        yield data
            except EmpError as error:
                log.info("console of EVM %s on %s: %s", name, machine.node, error)
            else:
                shown = machine
            tried = machine

    async def _next_machine(self, name: str, tried: _Machine | None) -> _Machine | None:
        """Return the machine to show after ``tried``, which may be that one again; None when there will be none."""
        found: _Machine | None = None
        over = False

        def look() -> bool:
            nonlocal found, over
            evm = self._book.evms.find(name)
            over = evm is None or self._is_over(evm)
            found = _Machine(evm.owner, evm.epoch) if evm is not None and evm.owner is not None else None
            return over or (found is not None and found != tried)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if tried is None else AGAIN_S):
                await self._book.until(look)
        return None if over else found or await self._next_machine(name, None)

    def _is_over(self, evm: Evm) -> bool:
        upkeep = self._book.upkeep.find(evm.spec.name)
        is_busy = upkeep is not None and upkeep.intent is not None
        return evm.state in _OVER and not is_busy and not wants_restart(evm)

    async def _until_closing(self, output: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
        closing = asyncio.create_task(self._closing.wait(), name="console closing")
        coming: asyncio.Task[bytes] | None = None
        try:
            while not closing.done():
                coming = asyncio.create_task(_next(output), name="console output")
                await asyncio.wait([coming, closing], return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    return
                try:
                    data = coming.result()
                except StopAsyncIteration:
                    return
                yield data
        finally:
            left = [task for task in (coming, closing) if task is not None and not task.done()]
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left)
            await output.aclose()

    # -------------------------------------------------------------- input

    async def type(self, name: str, data: bytes) -> None:
        """Send input to where the EVM runs; in a blackout it waits. Raises ``NotFound``, ``Conflict``, ``NodeDown``."""
        if len(data) > MAX_INPUT_BYTES:
            raise BadInput(f"{len(data)} bytes at once", field="body", hint=f"at most {MAX_INPUT_BYTES}")
        await self._blackout_over(self._book.evms.get(name, field="evm"))
        evm = self._book.evms.get(name, field="evm")
        if evm.owner is None or self._is_over(evm):
            raise Conflict(f"EVM {name} is {evm.state}: it has no console", field="evm")
        live = self._hub.newest(evm.migration or "")
        moved = live is not None and live.migration.stage is Stage.TARGET_BROWNOUT
        node = live.migration.target if live is not None and moved else evm.owner
        try:
            await self._agents.of(self._nodes.need_ready(node, field="evm")).type(name, data)
        except NotFound:
            raise Conflict(f"EVM {name} has no machine on {node} now", field="evm", hint="try again") from None

    async def _blackout_over(self, evm: Evm) -> None:
        if evm.migration is None:
            return
        with self._hub.follow(evm.migration) as snapshots:
            live = self._hub.newest(evm.migration)
            if live is None or live.migration.stage is not Stage.BLACKOUT:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HELD_S):
                    async for snapshot in snapshots:
                        if snapshot.migration.stage is not Stage.BLACKOUT:
                            return


async def _next(output: AsyncGenerator[bytes]) -> bytes:
    return await anext(output)
