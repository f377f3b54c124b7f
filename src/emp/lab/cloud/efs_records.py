"""What the simulated EFS remembers, and how it is written down. Times that count are seconds of the cloud's clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import TypeAdapter


class Life(StrEnum):
    """https://docs.aws.amazon.com/efs/latest/ug/API_MountTargetDescription.html"""

    CREATING = "creating"
    AVAILABLE = "available"
    DELETING = "deleting"


@dataclass
class FileSystem:
    id: str
    token: str
    created: datetime
    performance: str
    throughput: str
    provisioned_mibps: float | None
    encrypted: bool
    zone: str | None
    """of a One Zone file system"""
    tags: dict[str, str]
    life: Life = Life.CREATING
    due_s: float | None = None
    """when it leaves ``creating``, or when the data plane is to be asked to remove it; None: nothing is due"""


@dataclass
class MountTarget:
    id: str
    file_system: str
    subnet: str
    zone: str
    vpc: str
    address: str
    interface: str
    groups: list[str]
    life: Life = Life.CREATING
    due_s: float | None = None
    """when the data plane is to be asked"""


@dataclass
class AccessPoint:
    id: str
    token: str
    file_system: str
    path: str
    """of the directory that is its root"""
    user: dict[str, Any] | None
    creation: dict[str, Any] | None
    """owner and permissions that the directory gets if it is not there"""
    tags: dict[str, str]
    life: Life = Life.CREATING
    due_s: float | None = None


@dataclass
class EfsState:
    """Everything, by id."""

    file_systems: dict[str, FileSystem] = field(default_factory=dict)
    mount_targets: dict[str, MountTarget] = field(default_factory=dict)
    access_points: dict[str, AccessPoint] = field(default_factory=dict)
    written_s: float = 0.0
    """reading of the clock at which it was written down"""

    def to_json(self, now_s: float) -> bytes:
        self.written_s = now_s
        return _STATE.dump_json(self, indent=1)

    @classmethod
    def from_json(cls, text: bytes, now_s: float) -> EfsState:
        """Read it again: what was due so many seconds later is due as much later now. Raises ``ValueError``."""
        state = _STATE.validate_json(text)
        for record in state.records:
            if record.due_s is not None:
                record.due_s += now_s - state.written_s
        return state

    @property
    def records(self) -> list[FileSystem | MountTarget | AccessPoint]:
        return [*self.file_systems.values(), *self.mount_targets.values(), *self.access_points.values()]


_STATE = TypeAdapter(EfsState)
