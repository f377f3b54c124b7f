"""What happens after a guest has ended by itself. The rule is pure; ``Restarts`` waits out the back-off.

=============  ==================================  =======================================
policy         shutdown from inside                panic, or QEMU's death
=============  ==================================  =======================================
``never``      stays stopped                       stays as it is
``on-failure``  stays stopped                      started again on the same node
``always``     started again on the same node      started again on the same node
=============  ==================================  =======================================

Each start in a row waits twice as long: 1, 2, 4, ... 60 s. The count is kept with the EVM, is shown in its ``reason``,
and begins anew once the EVM has run for ten minutes or a person starts it. It is a cold start with a fresh epoch, on
the node whose agent attested the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from emp.controller.book import Book, Upkeep
from emp.controller.tasks import Tasks
from emp.model.errors import EmpError
from emp.model.evm import Evm, EvmState, RestartPolicy

log = logging.getLogger(__name__)

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0
STABLE_S = 600.0


def wants_restart(evm: Evm) -> bool:
    """Return whether the policy asks for a cold start of the EVM as it stands."""
    if not evm.want_running or evm.migration is not None or evm.owner is None:
        return False
    match evm.spec.restart:
        case RestartPolicy.NEVER:
            return False
        case RestartPolicy.ON_FAILURE:
            return evm.state in (EvmState.PANICKED, EvmState.CRASHED)
        case RestartPolicy.ALWAYS:
            return evm.state in (EvmState.PANICKED, EvmState.CRASHED, EvmState.STOPPED)


def delay_s(restarts: int) -> float:
    """Return the back-off before the next start, ``restarts`` having been made in a row."""
    return float(min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(restarts, 16)))


Start = Callable[[str], Awaitable[object]]


class Restarts:
    """At most one wait per EVM, either for its restart or for its count to begin anew."""

    def __init__(self, book: Book, start: Start, *, stable_s: float = STABLE_S) -> None:
        self._book = book
        self._start = start
        self.stable_s = stable_s
        self._tasks = Tasks("restart")

    def look_at(self, evm: Evm) -> None:
        """Begin to wait if the EVM, as it stands now, gives reason to; called after each change of its state."""
        name = evm.spec.name
        if self._tasks.has(name):
            return
        if wants_restart(evm):
            self._tasks.start(name, self._restart(name))
        elif evm.state is EvmState.RUNNING and self._upkeep(name).restarts:
            self._tasks.start(name, self._settle(name))

    async def close(self) -> None:
        await self._tasks.close()

    async def _restart(self, name: str) -> None:
        while (evm := self._book.evms.find(name)) is not None and wants_restart(evm):
            if self._upkeep(name).intent is not None:
                return
            count = self._upkeep(name).restarts
            wait_s = delay_s(count)
            log.warning("EVM %s is %s: restart %d in %g s", name, evm.state, count + 1, wait_s)
            await self._explain(name, count + 1, wait_s)
            await asyncio.sleep(wait_s)
            evm = self._book.evms.find(name)
            if evm is None or not wants_restart(evm):
                return
            await self._count(name, count + 1)
            try:
                await self._start(name)
            except EmpError as error:
                log.error("restart %d of EVM %s failed: %s", count + 1, name, error)

    async def _settle(self, name: str) -> None:
        """Forget the count once the EVM has run for long enough without a break."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.stable_s):
                await self._book.until(lambda: not self._runs(name))
        if self._runs(name):
            await self._count(name, 0)
        elif (evm := self._book.evms.find(name)) is not None and wants_restart(evm):
            await self._restart(name)

    def _runs(self, name: str) -> bool:
        evm = self._book.evms.find(name)
        return evm is not None and evm.state in (EvmState.RUNNING, EvmState.MIGRATING, EvmState.PAUSED)

    def _upkeep(self, name: str) -> Upkeep:
        return self._book.upkeep.find(name) or Upkeep()

    async def _count(self, name: str, restarts: int) -> None:
        await self._book.update(
            self._book.upkeep, name, lambda upkeep: upkeep.model_copy(update={"restarts": restarts})
        )

    async def _explain(self, name: str, number: int, wait_s: float) -> None:
        def explain(evm: Evm) -> Evm:
            what = (evm.reason or str(evm.state)).split("; restart ")[0]
            return evm.model_copy(update={"reason": f"{what}; restart {number} after {wait_s:g} s"})

        await self._book.update(self._book.evms, name, explain)
