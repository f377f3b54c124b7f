"""Several drivers as one: each order goes to the driver that the volume's id belongs to.

A pool has one driver that makes volumes, and always the one for storage that every node reaches (``shared``), whose ids
begin with a word of its own. Nobody else needs to know that there are two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from emp.model.errors import BadInput
from emp.model.volume import Attachment, Volume, VolumeType
from emp.volumes.base import VolumeDriver


class VolumeRouter:
    """See ``emp.volumes.base.VolumeDriver``. ``others``: how their ids begin -> driver; all else is ``main``'s.

    ``create`` is ``main``'s alone: what the others have was not made by the pool.
    """

    def __init__(self, main: VolumeDriver, others: Mapping[str, VolumeDriver]) -> None:
        self._main = main
        self._others = dict(others)

    @property
    def name(self) -> str:
        return self._main.name

    async def create(
        self,
        *,
        type: VolumeType,  # noqa: A002 - the protocol's name
        size_bytes: int,
        image: str | None = None,
    ) -> Volume:
        """Raise ``BadInput`` for a type that no driver makes."""
        if type is VolumeType.SHARED:
            hint = "emp volume create shared --url URL tells the pool of one that is there"
            raise BadInput("shared storage is not made by the pool", field="type", hint=hint)
        return await self._main.create(type=type, size_bytes=size_bytes, image=image)

    async def describe(self, volume: str) -> Volume:
        return await self._of(volume).describe(volume)

    async def list(self) -> tuple[Volume, ...]:
        """Raise what any of them raises: a part would pass for the whole."""
        found = [await driver.list() for driver in (self._main, *self._others.values())]
        return tuple(volume for part in found for volume in part)

    async def delete(self, volume: str) -> None:
        await self._of(volume).delete(volume)

    async def resize(self, volume: str, size_bytes: int) -> Volume:
        return await self._of(volume).resize(volume, size_bytes)

    async def expect(self, volume: str, *, node: str, epoch: int) -> None:
        await self._of(volume).expect(volume, node=node, epoch=epoch)

    async def attach(self, volume: str, *, node: str, epoch: int) -> Attachment:
        return await self._of(volume).attach(volume, node=node, epoch=epoch)

    async def detach(self, volume: str, *, node: str, epoch: int, unheld: bool = False) -> None:
        await self._of(volume).detach(volume, node=node, epoch=epoch, unheld=unheld)

    async def fence(self, volume: str, *, epoch: int, unheld: bool = False) -> None:
        await self._of(volume).fence(volume, epoch=epoch, unheld=unheld)

    async def aclose(self) -> None:
        for driver in (self._main, *self._others.values()):
            await driver.aclose()

    async def obstacles(self, volumes: Sequence[str], *, nodes: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for driver in (self._main, *self._others.values()):
            if theirs := [volume for volume in volumes if self._of(volume) is driver]:
                for node, reasons in (await driver.obstacles(theirs, nodes=nodes)).items():
                    found.setdefault(node, {}).update(reasons)
        return found

    @property
    def move_s(self) -> float | None:
        return self._main.move_s

    def _of(self, volume: str) -> VolumeDriver:
        return next((driver for begin, driver in self._others.items() if volume.startswith(begin)), self._main)
