"""Clears what a node still has of a migration that is over, at the node's next report.

An end that was away to the last is told how the migration ended, as often as it reports that it does not know:

- a **target** of an aborted migration: ``aborted``, and that the source is back. A closed abort means that the source's
  OWN(e_s) was seen, or that it never got the order, so even a copy that has loaded everything goes.
- a **source** of a completed one: the target's answer, ACTIVATED; of an aborted one, if it is behind the commit, the
  target's WITHDRAWN, from the target itself.
- a source that was lost to the last, and **lends** a volume that has been taken over from it: to end that relay.
- an end of a migration of which there is no record: to go back. A target that has loaded everything stays, unless
  another node runs the EVM under a newer epoch: the missing record may have known better.
"""

from __future__ import annotations

import logging

from emp.controller import trust
from emp.controller.agents import AgentClient, Agents
from emp.controller.book import Book
from emp.controller.migrations import Migrations
from emp.controller.nodes import Nodes
from emp.controller.tasks import Tasks
from emp.model.evm import EvmState
from emp.model.migration import Migration, Outcome
from emp.model.node import Node, OpenRole
from emp.model.orders import AbortOrder, AnswerOrder, Role, RolePhase, TakeBackOrder

log = logging.getLogger(__name__)

OVER = "the migration is over"


class Sweep:
    def __init__(self, book: Book, nodes: Nodes, agents: Agents, migrations: Migrations) -> None:
        self._book = book
        self._nodes = nodes
        self._agents = agents
        self._migrations = migrations
        self._tasks = Tasks("sweep")

    async def heard(self, node: Node) -> None:
        """Tell a node that has reported how what it still waits for has ended."""
        if trust.doubt(node) is not None:
            return
        for role in node.report.open_roles:
            key = f"{role.migration} on {node.name}"
            if not self._migrations.is_open(role.migration) and not self._tasks.has(key):
                self._tasks.start(key, self._tell(node, role))
        for lent in node.report.lending:
            key = f"relays of {lent} on {node.name}"
            known = self._book.migrations.find(lent)
            if known and not self._migrations.is_open(lent) and not self._tasks.has(key):
                self._tasks.start(key, self._end_relays(node, known))

    async def close(self) -> None:
        await self._tasks.close()

    async def _tell(self, node: Node, role: OpenRole) -> None:
        migration, agent = self._book.migrations.find(role.migration), self._agents.of(node)
        order = end_of(migration, role, runs_elsewhere=self._runs_elsewhere(node, role))
        log.warning("%s still has the %s of %s: %r", node.name, role.role, role.migration, order)
        match order:
            case AbortOrder():
                told = await agent.abort(role.migration, order)
                if migration and migration.outcome is Outcome.ABORTED and told.phase is RolePhase.GIVEN:
                    await self._carry_withdrawal(agent, migration)
            case AnswerOrder():
                await agent.answer(role.migration, order)

    async def _end_relays(self, node: Node, migration: Migration) -> None:
        """A migration is closed only once its volumes are where the EVM is: nothing goes through these any more."""
        log.warning("%s still lends a volume for %s", node.name, migration.id)
        await self._agents.of(node).take_back(migration.id, TakeBackOrder())

    async def _carry_withdrawal(self, source: AgentClient, migration: Migration) -> None:
        """A source behind its commit goes back only by the target's own word, which it has not been able to hear."""
        target = self._nodes.find(migration.target)
        if target is None or not target.ready or trust.doubt(target) is not None:
            return  # the source reports again
        word = await self._agents.of(target).abort(migration.id, AbortOrder(reason=OVER))
        if word.phase is RolePhase.WITHDRAWN and word.nonce:
            await source.answer(migration.id, AnswerOrder(word=word.phase.value, nonce=word.nonce))

    def _runs_elsewhere(self, node: Node, role: OpenRole) -> bool:
        """Whether another node attests the EVM under an epoch that this role's came before."""
        evm = self._book.evms.find(role.evm)
        return evm is not None and evm.owner != node.name and evm.epoch > role.epoch and evm.state is EvmState.RUNNING


def end_of(migration: Migration | None, role: OpenRole, *, runs_elsewhere: bool) -> AbortOrder | AnswerOrder | None:
    """Return what that end of a migration that is over must be told; None where its own end is near. Pure."""
    if migration is None or migration.outcome is Outcome.LOST:
        return AbortOrder(reason=OVER, source_is_back=runs_elsewhere)
    if migration.outcome is Outcome.ABORTED:
        return AbortOrder(reason=migration.cause or OVER, source_is_back=role.role == Role.TARGET)
    if role.role == Role.SOURCE:
        return AnswerOrder(word=RolePhase.ACTIVATED.value, nonce=migration.nonce or "")
    return None
