"""What the agents' reports, or their silence, mean for the EVMs' records. What says nothing new writes nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from emp.controller import attested, trust
from emp.controller.book import Book, Edit, change
from emp.controller.nodes import since
from emp.controller.restart import Restarts
from emp.model.errors import EmpError
from emp.model.evm import Evm, EvmState
from emp.model.node import EvmReport, Node

log = logging.getLogger(__name__)

DOUBTS = 3
"""reports in a row that must contradict the record before it gives way: a report may be older than the record"""


class Reports:
    def __init__(self, book: Book, restarts: Restarts) -> None:
        self._book = book
        self._restarts = restarts
        self._doubts: Counter[tuple[str, str]] = Counter()
        self._strangers: set[tuple[str, str]] = set()

    async def heard(self, node: Node) -> None:
        """Fold in a node's report, if its word is taken."""
        if (why := trust.doubt(node)) is not None:
            await self._silence(node.name, f"node {node.name} cannot speak for it: {why}")
            return
        told = {report.name: report for report in node.report.evms}
        for name, report in told.items():
            if self._book.evms.find(name) is None:
                self._note_stranger(node.name, name)
            else:
                await self._fold(name, lambda evm, r=report: self._told(evm, node.name, r))  # type: ignore[misc]
        for evm in self._book.evms.all():
            if evm.owner == node.name and evm.spec.name not in told:
                await self._fold(evm.spec.name, lambda e: self._not_told(e, node.name))

    async def lost(self, node: Node) -> None:
        """The node has stopped reporting, or is fenced."""
        name = node.name
        await self._silence(name, f"node {name} is fenced" if node.fence else f"node {name} is down: {since(node)}")

    async def _silence(self, node: str, reason: str) -> None:
        """How the EVMs of that node are is not known any more."""
        for evm in self._book.evms.all():
            if evm.owner == node and not self._is_busy(evm):
                await self._fold(evm.spec.name, lambda e: attested.owner_is_silent(e, reason))

    def _told(self, evm: Evm, node: str, report: EvmReport) -> Evm:
        if self._is_busy(evm):
            return evm
        if node != evm.owner:
            return attested.from_elsewhere(evm, node, report) if evm.migration is None else evm
        if report.epoch < evm.epoch and not self._doubted(evm, node):
            return evm
        if report.epoch >= evm.epoch:
            self._doubts.pop((evm.spec.name, node), None)
        if evm.migration is None:
            evm = evm.model_copy(update={"epoch": report.epoch})
        return attested.from_owner(evm, report)

    def _not_told(self, evm: Evm, node: str) -> Evm:
        if self._is_busy(evm) or evm.migration is not None or evm.owner != node or evm.state in attested.ENDED:
            return evm
        return attested.owner_forgot(evm) if self._doubted(evm, node) else evm

    def _is_busy(self, evm: Evm) -> bool:
        """Whether something is being done to the EVM, whose end will say how it is."""
        upkeep = self._book.upkeep.find(evm.spec.name)
        return upkeep is not None and upkeep.intent is not None

    def _doubted(self, evm: Evm, node: str) -> bool:
        """Count one more report that contradicts the record; return whether it is enough."""
        self._doubts[evm.spec.name, node] += 1
        return self._doubts[evm.spec.name, node] >= DOUBTS

    def _note_stranger(self, node: str, name: str) -> None:
        if (node, name) not in self._strangers:
            self._strangers.add((node, name))
            log.warning("node %s reports EVM %s, of which there is no record", node, name)

    async def _fold(self, name: str, update: Callable[[Evm], Evm]) -> None:
        evm = self._book.evms.find(name)
        if evm is not None and (after := update(evm)) != evm:
            edits: list[Edit[Any]] = [change(self._book.evms, name, update)]
            if after.owner is not None and after.owner != evm.owner:  # a hand-over that this controller had missed
                edits.append(change(self._book.upkeep, name, lambda upkeep: upkeep.held_by(after.owner)))
            try:
                await self._book.write(*edits)
            except EmpError as error:
                log.error("the state of EVM %s could not be recorded: %s", name, error)
        if (now := self._book.evms.find(name)) is not None and evm is not None:
            if now.state is not evm.state:
                log.info("EVM %s: %s -> %s%s", name, evm.state, now.state, f" ({now.reason})" if now.reason else "")
            if not self._is_busy(now) and now.state is not EvmState.UNKNOWN:
                self._restarts.look_at(now)
