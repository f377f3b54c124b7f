"""Carries out what is intended for a volume of an EVM that runs: attach, detach, resize, from any step again.

The attachment of a volume that is plugged gets an epoch of its own, newer than its EVM's ownership: the volume may have
been another's since, and its fence would refuse an older one. The next migration's is newer still.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from emp.controller.agents import AgentClient
from emp.controller.book import Book, Edit, Intent, Upkeep, Verb, change
from emp.controller.volumes import Volumes
from emp.model.errors import Conflict
from emp.model.evm import Evm, EvmSpec
from emp.model.node import EvmReport
from emp.model.orders import VolumeGrant, VolumesOrder
from emp.model.volume import Volume

T = TypeVar("T")


class Patiently(Protocol):
    """Repeats an order until it is known what became of it (``Boot``)."""

    async def __call__(
        self, name: str, node: str | None, call: Callable[[], Awaitable[T]], *, sent: bool = True
    ) -> T: ...


class Plugs:
    def __init__(self, book: Book, volumes: Volumes, agent: Callable[[str], AgentClient], patiently: Patiently) -> None:
        self._book = book
        self._volumes = volumes
        self._agent = agent
        self._patiently = patiently

    async def carry_out(self, name: str, intent: Intent) -> None:
        """Raises the error that ended it; the caller then calls ``give_up``."""
        match intent.verb:
            case Verb.ATTACH:
                await self._attach(name, intent)
            case Verb.DETACH:
                await self._detach(name, intent)
            case Verb.RESIZE:
                await self._resize(name, intent)
            case _:
                raise ValueError(f"{intent.verb} is not about a volume")

    async def give_up(self, name: str, intent: Intent) -> None:
        """An order was refused: nothing of an attach is left; what was detached or resized stays so."""
        volume = _volume(intent)
        if intent.verb is Verb.ATTACH:
            await self._patiently(name, None, lambda: self._volumes.release((volume,)))
            await self._finish(name, freed=volume)
        else:
            await self._finish(name)

    async def _attach(self, name: str, intent: Intent) -> None:
        volume = _volume(intent)
        grant = await self._open(name, intent)
        await self._patiently(name, None, lambda: self._volumes.fence((volume,), epoch=intent.epoch))
        spec = self._evm(name).spec.with_volume(volume, intent.slot)
        await self._order(name, spec, grants=(grant,))
        await self._finish(name, spec=spec)

    async def _detach(self, name: str, intent: Intent) -> None:
        volume = _volume(intent)
        if volume in self._evm(name).spec.volumes:
            spec = self._evm(name).spec.without_volume(volume)
            await self._order(name, spec, in_use=intent.in_use)
            # The guest has it no longer, whatever comes now.
            await self._book.update(self._book.evms, name, lambda evm: evm.model_copy(update={"spec": spec}))
        await self._patiently(name, None, lambda: self._volumes.release((volume,)))
        await self._finish(name, freed=volume)

    async def _resize(self, name: str, intent: Intent) -> None:
        """The bigger volume is attached to its node beside the smaller, and the machine changes over to it."""
        volume = _volume(intent)
        await self._patiently(name, None, lambda: self._volumes.resize(volume, intent.size_bytes))
        grant = await self._open(name, intent)
        await self._order(name, self._evm(name).spec, grants=(grant,))
        await self._patiently(name, None, lambda: self._volumes.fence((volume,), epoch=intent.epoch))
        await self._finish(name)

    # -------------------------------------------------------------- steps

    async def _open(self, name: str, intent: Intent) -> VolumeGrant:
        owner, volume = self._owner(name), _volume(intent)
        (grant,) = await self._patiently(
            name, None, lambda: self._volumes.attach((volume,), node=owner, epoch=intent.epoch)
        )
        return grant

    async def _order(
        self, name: str, spec: EvmSpec, *, grants: tuple[VolumeGrant, ...] = (), in_use: bool = False
    ) -> None:
        owner = self._owner(name)
        order = VolumesOrder(epoch=self._evm(name).epoch, spec=spec, grants=grants, in_use=in_use)

        async def give() -> EvmReport:
            return await self._agent(owner).change_volumes(name, order)

        await self._patiently(name, owner, give)

    async def _finish(self, name: str, *, spec: EvmSpec | None = None, freed: str | None = None) -> None:
        """The intent goes; the EVM's record becomes ``spec``, the volume ``freed`` nobody's, in one step."""

        def done(upkeep: Upkeep) -> Upkeep:
            own = tuple(each for each in upkeep.own_volumes if each != freed)
            return upkeep.model_copy(update={"intent": None, "own_volumes": own})

        def changed(evm: Evm) -> Evm:
            return evm.model_copy(update={"reason": None} | ({"spec": spec} if spec else {}))

        def free(record: Volume | None) -> Volume | None:
            return record and record.model_copy(update={"evm": None})

        volumes = [Edit(self._book.volumes, freed, free)] if freed else []
        await self._book.write(change(self._book.upkeep, name, done), change(self._book.evms, name, changed), *volumes)

    # -------------------------------------------------------------- records

    def _evm(self, name: str) -> Evm:
        return self._book.evms.get(name)

    def _owner(self, name: str) -> str:
        owner = self._evm(name).owner
        if owner is None:
            raise Conflict(f"EVM {name} is on no node", field="evm")
        return owner


def _volume(intent: Intent) -> str:
    assert intent.volume is not None
    return intent.volume
