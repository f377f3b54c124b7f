"""What the controller needs of a cloud that routes addresses: that they are at the node where their EVM is.

An order may be given again at any time: it looks first, and what is done already is left. So a controller that was
killed in between just gives it again. The controller alone calls; the nodes forward to taps (``emp.network.vpc``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from emp.model.addresses import AddressFacts, Assigned


class AddressMover(Protocol):
    async def assign(self, addresses: Sequence[str], *, node: str, insist: bool = False) -> Assigned:
        """Have what is sent to ``addresses`` arrive at ``node``, whoever has them now; return once the cloud says so.

        ``insist``: an earlier order for another node may be on its way, so order it also where all looks well. All of
        them go in as few calls as can be. Raises ``Refused`` where the cloud does not do it and why (no
        interface has a free slot, an address is of a delegated prefix), ``Unreachable`` and ``Unavailable`` (nothing
        was done), ``OutcomeUnknown`` (it may be under way), after all of which the same order may be given again.
        """
        ...

    async def release(self, addresses: Sequence[str]) -> None:
        """Take ``addresses`` from every interface of the pool; return once none has them. Idempotent."""
        ...

    def nobodys(self, addresses: Sequence[str]) -> tuple[str, ...]:
        """Return which of ``addresses`` were no interface's when it was last looked: what is sent to them is lost.

        A cloud that cannot reassign an address in one step has it so between two orders, the second of which may fail.
        """
        ...

    async def facts(self, addresses: Sequence[str]) -> AddressFacts:
        """Return what the cloud says of ``addresses`` and of the pool's interfaces; raises as ``assign``."""
        ...

    async def aclose(self) -> None: ...
