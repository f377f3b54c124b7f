"""A volume service in memory, keeping the contract of ``emp.volumes.base``."""

from __future__ import annotations

from emp.model.errors import Conflict, EmpError, NotFound, StaleEpoch
from emp.model.volume import Attachment, NbdEndpoint, Volume, VolumeType

HOST = "127.0.0.1"

Attachments = list[tuple[str, str, int]]
"""(volume, node, epoch)"""


class FakeVolumes:
    """The contract of ``VolumeDriver`` in memory. ``failing[verb]`` is raised while it is there."""

    def __init__(self) -> None:
        self.volumes: dict[str, Volume] = {}
        self.fences: dict[str, int] = {}
        self.failing: dict[str, EmpError] = {}
        self.attached: Attachments = []

    async def create(self, *, type: VolumeType, size_bytes: int) -> Volume:  # noqa: A002
        self._check("create")
        name = f"vol-{len(self.volumes) + 1:04}"
        self.volumes[name] = Volume(id=name, type=type, size_bytes=size_bytes, serial=name)
        return self.volumes[name]

    async def describe(self, volume: str) -> Volume:
        self._check("describe")
        if volume not in self.volumes:
            raise NotFound(f"no volume {volume}")
        return self.volumes[volume]

    async def list(self) -> tuple[Volume, ...]:
        self._check("list")
        return tuple(self.volumes.values())

    async def delete(self, volume: str) -> None:
        if (await self.describe(volume)).attachments:
            raise Conflict(f"{volume} is attached")
        del self.volumes[volume]

    async def attach(self, volume: str, *, node: str, epoch: int) -> Attachment:
        self._check("attach")
        found = await self.describe(volume)
        if epoch < self.fences.get(volume, 0):
            raise StaleEpoch(f"{volume} is fenced at {self.fences[volume]}")
        endpoint = NbdEndpoint(host=HOST, port=10809, export=f"{volume}-{node}-{epoch}", tls_hostname="volumes-main")
        made = Attachment(volume=volume, node=node, epoch=epoch, endpoint=endpoint)
        self.attached.append((volume, node, epoch))
        self._set(volume, (*(a for a in found.attachments if a != made), made))
        return made

    async def detach(self, volume: str, *, node: str, epoch: int) -> None:
        found = await self.describe(volume)
        self._set(volume, tuple(a for a in found.attachments if (a.node, a.epoch) != (node, epoch)))

    async def fence(self, volume: str, *, epoch: int) -> None:
        found = await self.describe(volume)
        self.fences[volume] = max(epoch, self.fences.get(volume, 0))
        self._set(volume, tuple(a for a in found.attachments if a.tag >= epoch))

    def holders(self, volume: str) -> dict[str, int]:
        """Node -> epoch under which it may use the volume."""
        return {a.node: a.epoch for a in self.volumes[volume].attachments}

    def _set(self, volume: str, attachments: tuple[Attachment, ...]) -> None:
        self.volumes[volume] = self.volumes[volume].model_copy(update={"attachments": attachments})

    def _check(self, verb: str) -> None:
        if verb in self.failing:
            raise self.failing[verb]
