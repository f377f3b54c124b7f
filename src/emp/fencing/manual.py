"""A person's word that the node is off: they have pulled the plug, or watched it burn."""

from __future__ import annotations

import time

from emp.model.node import Fence


class ManualFence:
    """See ``emp.fencing.base.FenceDriver``. It asks nothing and nobody: whoever confirms swears to it."""

    acts = False

    def describe(self, node: str) -> str:
        return (
            f"takes your word that {node} is off and stays off until its agent is started anew; if it is not, its EVMs "
            "run twice"
        )

    async def fence(self, node: str, *, by: str) -> Fence:
        return Fence(driver="manual", by=by, at_s=time.time())

    async def lift(self, node: str) -> None:
        """Nothing to do: the person has switched it on."""

    async def aclose(self) -> None:
        """Nothing is open."""
