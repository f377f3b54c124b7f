"""What the controller needs of a fence driver: proof that a node runs nothing any more (rule R8).

Silence proves nothing: a node that answers nobody may run its EVMs for days. So a cold start elsewhere waits for the
node's own RETIRED(k), or for a fence. Each driver here proves the same thing, that the machine is *off*, because that
alone counts for every kind of volume and address; what cuts off volumes but leaves the guest's addresses answering
(EC2's forced detach, on its own) is not enough for a network driver such as ``l2`` that has no port fence.
"""

from __future__ import annotations

from typing import Protocol

from emp.model.node import Fence


class FenceDriver(Protocol):
    acts: bool
    """False: it only takes a person's word, which a node that answers would belie"""

    def describe(self, node: str) -> str:
        """Return what ``fence`` would do to the node, for the person who has to confirm it."""
        ...

    async def fence(self, node: str, *, by: str) -> Fence:
        """Switch the node off and return once it is proven to be off. Idempotent. ``by``: who asked, for the record.

        Raises ``FenceFailed`` when it is known not to be off, ``OutcomeUnknown`` when it may or may not be: ask again.
        """
        ...

    async def lift(self, node: str) -> None:
        """The node is back and has sworn what it must: leave its switch on. Idempotent. Raises as ``fence`` does."""
        ...

    async def aclose(self) -> None: ...
