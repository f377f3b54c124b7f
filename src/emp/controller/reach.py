"""Which node a cloud sends an EVM's addresses to. Where the nodes share a segment there is none, and nothing to do."""

from __future__ import annotations

from emp.addresses.base import AddressMover
from emp.model.addresses import AddressFacts, Assigned
from emp.model.errors import EmpError
from emp.model.evm import EvmSpec


class Reach:
    """``mover`` None: the pool has no such cloud."""

    def __init__(self, mover: AddressMover | None) -> None:
        self._mover = mover

    @property
    def is_routed(self) -> bool:
        return self._mover is not None

    async def assign(self, spec: EvmSpec, node: str, *, insist: bool = False) -> Assigned | None:
        """Have the EVM reached at ``node``; as ``AddressMover.assign``. None: there is nothing to be done."""
        return await self._mover.assign(_of(spec), node=node, insist=insist) if self._mover else None

    def nobodys(self, spec: EvmSpec) -> tuple[str, ...]:
        """As ``AddressMover.nobodys``."""
        return self._mover.nobodys(_of(spec)) if self._mover else ()

    async def release(self, spec: EvmSpec) -> None:
        if self._mover is not None:
            await self._mover.release(_of(spec))

    async def facts(self, spec: EvmSpec) -> AddressFacts | None:
        """Return what pre-flight looks at; a cloud that cannot be asked is one of the facts."""
        if self._mover is None:
            return None
        try:
            return await self._mover.facts(_of(spec))
        except EmpError as error:
            return AddressFacts(problem=error.message)

    async def aclose(self) -> None:
        if self._mover is not None:
            await self._mover.aclose()


def _of(spec: EvmSpec) -> tuple[str, ...]:
    return tuple(address for _, address in spec.addresses)
