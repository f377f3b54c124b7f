"""What the volume service remembers: one JSON file, replaced as a whole and on disk before anything is acted on."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from emp.model.base import Model
from emp.model.errors import HostError, NotFound
from emp.model.names import Name
from emp.model.volume import VolumeType
from emp.wire.files import read_private, write_private


class AttachmentRecord(Model):
    node: Name
    epoch: int
    port: int
    claimed: int = 0
    """the newest epoch that its node has claimed it under; 0: none"""

    @property
    def tag(self) -> int:
        """What is measured against the fence."""
        return max(self.epoch, self.claimed)


class VolumeRecord(Model):
    id: str
    type: VolumeType
    size_bytes: int
    image: Name | None = None
    """what it was made from"""
    fence: int = 0
    """attachments with an older tag are refused"""
    attachments: tuple[AttachmentRecord, ...] = ()

    def find(self, node: str, epoch: int) -> AttachmentRecord | None:
        return next((a for a in self.attachments if (a.node, a.epoch) == (node, epoch)), None)


class _File(Model):
    format: int = 1
    volumes: tuple[VolumeRecord, ...] = ()


class State:
    """The volumes by id. ``put`` and ``drop`` return when the change is on disk; ``OSError`` if it may not be."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.volumes: dict[str, VolumeRecord] = {}

    def load(self) -> None:
        """Read the file, if there is one. Raise ``HostError`` if it cannot be trusted: guessing would undo fences."""
        try:
            content = read_private(self._path)
        except NotFound:
            return
        try:
            volumes = _File.model_validate_json(content).volumes
        except ValidationError as error:
            raise HostError(
                f"{self._path} is damaged: {error.errors()[0]['msg']}",
                hint="restore it; without it, fences and attachments are unknown",
            ) from None
        self.volumes = {volume.id: volume for volume in volumes}

    def put(self, volume: VolumeRecord) -> None:
        self._save({**self.volumes, volume.id: volume})

    def drop(self, volume: str) -> None:
        self._save({key: value for key, value in self.volumes.items() if key != volume})

    def _save(self, volumes: dict[str, VolumeRecord]) -> None:
        write_private(self._path, _File(volumes=tuple(volumes.values())).model_dump_json(indent=1).encode())
        self.volumes = volumes
