"""What the simulated cloud remembers when its process dies: one file, on disk before anything is answered.

Times are readings of the machine's monotonic clock, which goes on while the cloud is away: what is under way goes on.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from emp.lab.cloud.knobs import Knobs
from emp.lab.cloud.network import NetworkMemory
from emp.lab.cloud.records import Volume
from emp.model.base import Model
from emp.model.errors import HostError, NotFound
from emp.wire.files import read_private, write_private


class Memory(Model):
    """Of one ``Cloud``, at ``at_s`` of its clock."""

    format: int = 1
    began: datetime
    """the time of day at ``began_s`` of the clock"""
    began_s: float
    at_s: float
    knobs: Knobs
    volumes: tuple[Volume, ...]
    tokens: dict[str, tuple[dict[str, Any], str]]
    """client token -> the request that it was used with first, and the volume that this made"""
    network: NetworkMemory = NetworkMemory()


class MemoryFile:
    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Memory | None:
        """Return what was written last; None at the very first start. Raises ``HostError`` if it is damaged."""
        try:
            return Memory.model_validate_json(read_private(self._path))
        except NotFound:
            return None
        except ValidationError as error:
            hint = "make the lab anew: without it nobody knows what is attached"
            raise HostError(f"{self._path} is damaged: {error.errors()[0]['msg']}", hint=hint) from None

    def write(self, memory: Memory) -> None:
        """Return when it is on disk; raises ``OSError`` if it may not be."""
        write_private(self._path, memory.model_dump_json().encode())
