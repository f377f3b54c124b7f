"""Fencing a node, letting it back, and readmitting one whose journal is not the one it had.

A fence stays until the node's agent, started anew, has written RETIRED(k) for every EVM that was taken from it
meanwhile; what is owed is on disk before the EVM starts elsewhere. Until then every heartbeat of the node is answered
with a quarantine, and its word is not taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter

from emp.controller import trust
from emp.controller.agents import Agents
from emp.controller.book import Book
from emp.controller.nodes import Nodes, since
from emp.controller.tasks import Tasks
from emp.fencing.base import FenceDriver
from emp.model.errors import BadInput, Conflict, EmpError, OutcomeUnknown, Refused
from emp.model.migration import Stage
from emp.model.node import Node
from emp.model.orders import RetireOrder

log = logging.getLogger(__name__)

PATIENCE_S = 90.0
"""after which a request is answered with ``OutcomeUnknown``; the fencing goes on"""
LEARN_S = 5.0
"""how long a readmission waits for the node to hear of it"""


class Fences:
    def __init__(self, book: Book, nodes: Nodes, agents: Agents, driver: FenceDriver) -> None:
        self._book = book
        self._nodes = nodes
        self._agents = agents
        self._driver = driver
        self._fencing = Tasks("fencing")
        self._collecting = Tasks("what a fenced node owes")
        self._paid: dict[str, dict[str, int]] = {}
        """node -> EVM -> k, of what it has retired since it is back"""
        self._beats: Counter[str] = Counter()
        self._beat = asyncio.Condition()

    async def close(self) -> None:
        await self._fencing.close()
        await self._collecting.close()
        await self._driver.aclose()

    # -------------------------------------------------------------- by a person

    async def fence(self, name: str, *, confirm: bool, reason: str) -> Node:
        """Prove the node off. Without ``confirm``: ``BadInput`` that says what would be done.

        Raises ``NotFound``, ``Refused`` for a node that answers where nothing but a person's word would say that it is
        off, ``FenceFailed``, or ``OutcomeUnknown`` after which it is asked again.
        """
        node = self._nodes.get(name)
        if node.fence is not None:
            return node
        if not confirm:
            raise BadInput(self._what_it_means(node), field="confirm", hint=f"do it: {trust.fence_command(name)}")
        if node.ready and not self._driver.acts:
            raise Refused(
                f"node {name} is not off: its agent answers",
                field="node",
                hint="switch it off, and ask again once it is down",
            )
        task = self._fencing.get(name) or self._fencing.start(name, self._fence(name, reason))
        done, _ = await asyncio.wait([task], timeout=PATIENCE_S)
        if not done:
            raise OutcomeUnknown(
                f"node {name} is not off yet", field="node", hint=f"it goes on; see: emp node show {name}"
            )
        task.result()
        return self._nodes.get(name)

    async def _fence(self, name: str, reason: str) -> None:
        boot_id = self._nodes.get(name).report.boot_id
        proof = await self._driver.fence(name, by=reason)
        await self._nodes.fenced(name, proof.model_copy(update={"boot_id": boot_id}))

    def _what_it_means(self, node: Node) -> str:
        name = node.name
        evms = [evm.spec.name for evm in self._book.evms.all() if evm.owner == name]
        moves = [
            m.id for m in self._book.migrations.all() if name in (m.source, m.target) and m.stage is not Stage.CLOSED
        ]
        how = "it answers, and its EVMs run" if node.ready else since(node)
        return (
            f"node {name} ({how}): fencing it {self._driver.describe(name)}. "
            f"EVMs there: {', '.join(evms) or 'none'}; migrations that are open: {', '.join(moves) or 'none'}. "
            f"Afterwards emp evm recover starts each elsewhere{self._without_a_second_wall(name)}"
        )

    def _without_a_second_wall(self, name: str) -> str:
        """Name what the node would go on writing to if it were not off after all, as no service shuts it out."""
        held = [
            volume.id
            for volume in self._book.volumes.all()
            if not volume.type.fenceable and any(attachment.node == name for attachment in volume.attachments)
        ]
        if not held:
            return ""
        return f". It must be off for certain: nothing else keeps it from writing to {', '.join(held)}"

    async def readmit(self, name: str, *, confirm: bool) -> Node:
        """Take the journal that a quarantined node has now for its own. Raises as ``fence``, or ``Conflict``."""
        node = self._nodes.get(name)
        if node.quarantine is None:
            raise Conflict(f"node {name} is not quarantined", field="node", hint=f"see: emp node show {name}")
        if not confirm:
            raise BadInput(
                f"node {name}: {node.quarantine}. Readmitting it takes what that journal says for the truth: what the "
                "node promised after it is forgotten, and an EVM that has moved away might be believed to be there. "
                "Make sure first, on the other nodes, where each of its EVMs runs, and that no old QEMU is left on it",
                field="confirm",
                hint=f"do it: emp node readmit {name} --confirm",
            )
        log.warning("node %s is readmitted with journal %s", name, node.report.journal_id)
        await self._nodes.change(name, trust.readmitted)
        await self._has_learnt(name)
        return self._nodes.get(name)

    async def _has_learnt(self, name: str) -> None:
        """Return once the node's agent knows, if it reports: its next report is answered, and the one after follows."""
        wanted = self._beats[name] + 2
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEARN_S), self._beat:
                await self._beat.wait_for(lambda: self._beats[name] >= wanted)

    # -------------------------------------------------------------- what a fenced node owes

    async def owe(self, name: str, evm: str, epoch: int) -> bool:
        """Note that the node must write RETIRED(epoch) before its fence is lifted; False where there is no fence."""

        def note(node: Node) -> Node:
            if node.fence is None:
                return node
            owed = node.fence.retire | {evm: epoch}
            return node.model_copy(update={"fence": node.fence.model_copy(update={"retire": owed})})

        node = self._nodes.find(name)
        if node is None or node.fence is None:
            return False
        node = await self._nodes.change(name, note)
        return node.fence is not None

    async def heard(self, node: Node) -> None:
        """A node reports. One that is fenced is back; the answer to the report that lifts its fence tells it so."""
        name = node.name
        async with self._beat:
            self._beats[name] += 1
            self._beat.notify_all()
        if node.fence is None or node.quarantine is not None:
            self._paid.pop(name, None)
        elif self._paid.get(name) == node.fence.retire:
            await self._nodes.change(name, lambda n: _lifted(n, self._paid[name]))
            log.warning(
                "the fence of node %s is lifted; it retired: %s", name, ", ".join(self._paid[name]) or "nothing"
            )
        elif not self._collecting.has(name):
            self._collecting.start(name, self._collect(node, dict(node.fence.retire)))

    async def _collect(self, node: Node, owed: dict[str, int]) -> None:
        """Have a node that is back retire what it owes. What fails is tried again at its next report."""
        for evm, epoch in owed.items():
            await self._agents.of(node).retire(evm, RetireOrder(epoch=epoch))
        try:
            await self._driver.lift(node.name)
        except EmpError as error:  # it is on: it has just answered
            log.warning("the switch of node %s: %s", node.name, error)
        self._paid[node.name] = owed


def _lifted(node: Node, paid: dict[str, int]) -> Node:
    if node.fence is None or node.fence.retire != paid:
        return node
    return node.model_copy(update={"fence": None})
