"""The addresses of one migration, where a cloud routes them: reassigned once it is committed, however long it takes.

::

    source                  controller                 cloud
      | GIVEN ------------------>| assign, to the target ->|
      | forwards                 |<------- has moved them |
      |<------------ moved       |
      | forwards a last time     |

It begins when either end is known to be committed. What is refused is tried again, and people are told: the source
forwards meanwhile what comes to it, so no packet waits. An IPv6 address may be nobody's for that time
(``AddressMover.nobodys``). Nothing is remembered but the migration that is open: a controller that
was killed looks at the cloud, and gives the order again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from emp.controller.agents import Agents
from emp.controller.nodes import Nodes
from emp.controller.reach import Reach
from emp.model.addresses import AddressMove
from emp.model.errors import EmpError, NotFound, OutcomeUnknown, Unavailable
from emp.model.evm import EvmSpec
from emp.model.migration import Migration
from emp.model.orders import AddressMovedOrder

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""between tries"""

Say = Callable[[], Awaitable[None]]


class Reassignment:
    """Of one migration. ``say`` shows that ``alarm`` or ``made`` has changed."""

    def __init__(self, migration: Migration, reach: Reach, agents: Agents, nodes: Nodes, say: Say) -> None:
        self._migration = migration
        self._reach = reach
        self._agents = agents
        self._nodes = nodes
        self._say = say
        self._one_at_a_time = asyncio.Lock()
        self.alarm: str | None = None
        """why the addresses are not the target's yet, for people"""
        self.made: AddressMove | None = None

    @property
    def is_over(self) -> bool:
        return self.made is not None or not self._reach.is_routed

    async def finish(self, spec: EvmSpec, *, tell_again: bool = False) -> None:
        """Have the addresses be the target's, and its source told. Again, or at the same time: once is enough.

        ``tell_again``: its agent may be another by now, that has not heard it.
        """
        async with self._one_at_a_time:
            if self.is_over:
                if self.made is not None and tell_again:
                    await self._tell_source(self.made)
                return
            made = await self._move(spec)
            await self._tell_source(made)
            self.made, self.alarm = made, None
            await self._say()

    async def bring_home(self, spec: EvmSpec) -> None:
        """The EVM stays with the source: so must its addresses, should they have been on their way already."""
        await self._reach.assign(spec, self._migration.source, insist=True)

    async def _move(self, spec: EvmSpec) -> AddressMove:
        live, tries, pause_s = self._migration, 0, FIRST_PAUSE_S
        began_s = asyncio.get_running_loop().time()
        while True:
            tries += 1
            try:
                assigned = await self._reach.assign(spec, live.target)
            except EmpError as error:
                log.error("%s: %s", live.id, error)
                self.alarm = f"{self._whereabouts(spec)}: {error.message}; tried again in {pause_s:g} s"
                await self._say()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            assert assigned is not None
            return AddressMove(
                addresses=len(spec.addresses),
                reassign_s=round(asyncio.get_running_loop().time() - began_s, 3),
                calls=assigned.calls,
                tries=tries,
                ipv6_gap_s=assigned.ipv6_gap_s,
                ipv6_gap_is_least=assigned.ipv6_gap_is_least,
            )

    def _whereabouts(self, spec: EvmSpec) -> str:
        """Say what becomes of packets for the EVM meanwhile."""
        live = self._migration
        if not (lost := self._reach.nobodys(spec)):
            return f"packets for {live.evm} still come to {live.source}, which forwards them and has to stay up"
        return (
            f"packets for {', '.join(lost)} of {live.evm} are lost, as no interface has the address; "
            f"those for addresses that {live.source} still has come to it, which forwards them and has to stay up"
        )

    async def _tell_source(self, made: AddressMove) -> None:
        """Let it end its forwarding; a source that is down, or has forgotten, forwards nothing."""
        live, order = self._migration, AddressMovedOrder(took_s=made.reassign_s)
        while True:
            node = self._nodes.find(live.source)
            if node is None or not node.ready:
                return
            try:
                await self._agents.of(node).address_moved(live.id, order)
            except NotFound as error:
                log.info("%s: %s", live.id, error)
            except (Unavailable, OutcomeUnknown) as error:
                log.info("%s: %s", live.id, error)
                await asyncio.sleep(FIRST_PAUSE_S)
                continue
            return
