"""What memory is free where, as all records together say; and the one lock under which it is given away.

Who places an EVM or plans a migration holds the lock from the look at the candidates until the record that claims the
memory is written. So no two plans count the same memory, and two EVMs may swap nodes where both fit on both.
"""

from __future__ import annotations

import asyncio

from emp.controller.book import Book
from emp.controller.nodes import Nodes
from emp.controller.placement import Candidate, claimed_by, free_bytes
from emp.model.node import Node


class Capacity:
    def __init__(self, book: Book, nodes: Nodes) -> None:
        self._book = book
        self._nodes = nodes
        self.lock = asyncio.Lock()

    def candidate(self, node: Node, *, but: str | None = None) -> Candidate:
        """Return the node with its free memory; what EVM ``but`` claims is left out."""
        return Candidate(node, free_bytes(node, self._claims(but)))

    def candidates(self, *, but: str | None = None) -> list[Candidate]:
        claims = self._claims(but)
        return [Candidate(node, free_bytes(node, claims)) for node in self._nodes.all()]

    def _claims(self, but: str | None) -> list[tuple[int, frozenset[str]]]:
        claims = []
        for evm in self._book.evms.all():
            name = evm.spec.name
            if name != but:
                migration = self._book.migrations.find(evm.migration) if evm.migration else None
                upkeep = self._book.upkeep.find(name)
                starting_on = upkeep.intent.node if upkeep and upkeep.intent else None
                claims.append((evm.spec.memory_bytes, claimed_by(evm, migration, starting_on)))
        return claims
