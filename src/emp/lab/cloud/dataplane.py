"""What makes the simulated cloud's volumes readable: the pool's own volume service, inside of the cloud's process.

The cloud decides who has what, and the service carries it out: one qemu-nbd per volume, node and attachment, open to
that node's certificates alone, and named by the attachment's number. Its fence and its claims stay unused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from emp.lab.cloud.cloud import Showing
from emp.lab.cloud.knobs import Shown
from emp.lab.cloud.plane import PlaneVolume
from emp.model.errors import NotFound
from emp.model.volume import NbdEndpoint, VolumeType
from emp.volumes.devices import Device
from emp.volumes.ebs_view import EPOCH, FENCE
from emp.volumes.server.epochs import EPOCH_LOG, EpochLog
from emp.volumes.server.protocol import CreateVolume
from emp.volumes.server.service import VolumeService

Look = Callable[[str], PlaneVolume | None]
"""volume's id -> the volume as the cloud has it now"""


class OwnersLog(EpochLog):
    """The history of exports under the epochs of the EVM's owners, which stand in the volume's tags.

    As ``emp.volumes.server.epochs`` says, and: ``export`` is the number of the attachment, ``tag`` an attachment that a
    newer epoch has taken over, ``fence`` a fence that was written on the volume. There are no claims.
    """

    def __init__(self, state_dir: Path, instances: Mapping[str, str], look: Look) -> None:
        super().__init__(state_dir / EPOCH_LOG)
        self._instances = instances
        self._look = look
        self._known: dict[str, Mapping[str, str]] = {}

    def note(self, event: str, volume: str, **what: str | int) -> None:
        if event in ("attach", "close"):
            found = self._look(volume)
            owner = _owner(found.tags if found else {}, self._instances[str(what["node"])])
            what |= {"export": what["epoch"], "epoch": owner, "tag": owner}
        super().note(event, volume, **what)

    def recall(self, volume: PlaneVolume) -> None:
        """Know a volume that an earlier process had. It may have died before it noted a fence; twice does no harm."""
        self._known[volume.id] = volume.tags
        if fence := _number(volume.tags.get(FENCE)):
            super().note("fence", volume.id, epoch=fence)

    def forget(self, volume: str) -> None:
        self._known.pop(volume, None)

    def tagged(self, volume: PlaneVolume) -> None:
        """Note what is new of a volume's tags."""
        before, self._known[volume.id] = self._known.get(volume.id, {}), volume.tags
        if (fence := _number(volume.tags.get(FENCE))) > _number(before.get(FENCE)):
            super().note("fence", volume.id, epoch=fence)
        for node, instance in self._instances.items():
            if (owner := _owner(volume.tags, instance)) > _owner(before, instance):
                super().note("tag", volume.id, node=node, epoch=owner, tag=owner)


class ExportPlane:
    """See ``emp.lab.cloud.plane.DataPlane``. ``instances``: node -> instance id."""

    def __init__(self, service: VolumeService, instances: Mapping[str, str], log: OwnersLog) -> None:
        self._service = service
        self._nodes = {instance: node for node, instance in instances.items()}
        self._log = log

    async def on_attached(self, volume: PlaneVolume, instance: str, epoch: int) -> None:
        await self._service.create(volume.id, CreateVolume(type=_type(volume), size_bytes=volume.size_bytes))
        await self._service.attach(volume.id, node=self._nodes[instance], epoch=epoch)

    async def on_detached(self, volume: PlaneVolume, instance: str, epoch: int) -> None:
        """With it goes what the volume was before it grew."""
        node = self._nodes[instance]
        with contextlib.suppress(NotFound):
            for held in self._service.describe(volume.id).attachments:
                if held.node == node:
                    await self._service.detach(volume.id, node=node, epoch=held.epoch)

    async def on_grown(self, volume: PlaneVolume, exports: Sequence[tuple[str, int]]) -> None:
        """An export keeps the size that it began with, so there is a bigger one beside it."""
        with contextlib.suppress(NotFound):  # it has never been attached, and is made when it is
            await self._service.resize(volume.id, volume.size_bytes)
        for instance, epoch in exports:
            await self._service.attach(volume.id, node=self._nodes[instance], epoch=epoch)

    async def on_deleted(self, volume: PlaneVolume) -> None:
        await self._service.delete(volume.id)
        self._log.forget(volume.id)

    def on_tagged(self, volume: PlaneVolume) -> None:
        self._log.tagged(volume)

    def device(self, showing: Showing, node: str, shown: Shown) -> Device:
        """Return what ``node`` sees of a volume that shows there. Raises ``NotFound`` if it is gone again."""
        volume = showing.volume
        found = self._service.describe(volume)
        for held in found.attachments:
            if (held.node, held.epoch) == (node, showing.epoch) and isinstance(held.endpoint, NbdEndpoint):
                return Device(
                    serial=found.serial if shown.serial is None else shown.serial,
                    size_bytes=showing.size_bytes if shown.size_bytes is None else shown.size_bytes,
                    endpoint=held.endpoint,
                )
        raise NotFound(f"{volume} is not attached to {node}", field="volume")


def _type(volume: PlaneVolume) -> VolumeType:
    """The service goes by a type only to count nodes, which the cloud has done: one of AWS's other types is as gp2."""
    return VolumeType(volume.type) if volume.type in set(VolumeType) else VolumeType.GP2


def _owner(tags: Mapping[str, str], instance: str) -> int:
    return _number(tags.get(EPOCH + instance))


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
