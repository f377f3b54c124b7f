"""What this node needs to know of an EVM to build or re-adopt its machine: record and volumes, one file per EVM.

The journal says who may run an EVM, the shelf says what it is. A file is written before the record that makes it
matter.
"""

from __future__ import annotations

import os
from pathlib import Path

from emp.model.base import Model
from emp.model.errors import HostError
from emp.model.evm import EvmSpec
from emp.model.orders import Peer, VolumeGrant


class Entry(Model):
    spec: EvmSpec
    volumes: tuple[VolumeGrant, ...] = ()
    peer: Peer | None = None
    """source: where the target of its last migration is, so that a restarted agent finds it again"""


class Shelf:
    """Files ``<directory>/<evm>.json``, 0600, replaced atomically and on disk when ``put`` returns."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def evms(self) -> frozenset[str]:
        return frozenset(path.stem for path in self._directory.glob("*.json"))

    def put(self, entry: Entry) -> None:
        """Raises ``HostError`` where the disk fails; what was there before is still there then."""
        path = self._directory / f"{entry.spec.name}.json"
        try:
            _replace(path, entry.model_dump_json().encode())
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}", hint="free or repair the disk") from error

    def get(self, evm: str) -> Entry | None:
        path = self._directory / f"{evm}.json"
        return Entry.model_validate_json(path.read_bytes()) if path.exists() else None

    def drop(self, evm: str) -> None:
        (self._directory / f"{evm}.json").unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, content)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    fresh.rename(path)
