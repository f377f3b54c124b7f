"""A power switch in memory, keeping the contract of ``emp.fencing.base``."""

from __future__ import annotations

from emp.model.errors import EmpError
from emp.model.node import Fence


class FakePower:
    """``failing[verb]`` is raised while it is there."""

    acts = True

    def __init__(self) -> None:
        self.off: set[str] = set()
        self.failing: dict[str, EmpError] = {}

    def describe(self, node: str) -> str:
        return f"switches {node} off"

    async def fence(self, node: str, *, by: str) -> Fence:
        if "fence" in self.failing:
            raise self.failing["fence"]
        self.off.add(node)
        return Fence(driver="lab", by=by, at_s=1.0)

    async def lift(self, node: str) -> None:
        if "lift" in self.failing:
            raise self.failing["lift"]
        self.off.discard(node)

    async def aclose(self) -> None:
        return
