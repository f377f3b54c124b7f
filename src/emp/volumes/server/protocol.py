"""What travels between the controller, or an agent that claims, and the volume service.

====================================================  =================  ==============  ========================
``GET    /v1/volumes``                                                   -> [``Volume``]
``GET    /v1/volumes/{volume}``                                          -> ``Volume``   404
``PUT    /v1/volumes/{volume}``                       ``CreateVolume``   -> ``Volume``   409 if it is another
``DELETE /v1/volumes/{volume}``                                                          409 while attached
``PUT    /v1/volumes/{volume}/size``                  ``Resize``         -> ``Volume``   422 for less than it has
``PUT    /v1/volumes/{volume}/attachments/{node}/{epoch}``               -> ``Attachment``  409 ``stale_epoch``
``DELETE /v1/volumes/{volume}/attachments/{node}/{epoch}``
``PUT    /v1/volumes/{volume}/fence``                 ``Fence``
``PUT    /v1/volumes/{volume}/claim``                 ``Claim``          -> ``Attachment``  409 ``stale_epoch``
====================================================  =================  ==============  ========================

``claim`` alone is open to agents, each for its own node. Every order may be given twice: the caller names the volume,
so even a lost answer to ``create`` leaves no doubt.
"""

from __future__ import annotations

import re
import secrets

from pydantic import Field, field_validator

from emp.model.base import Model
from emp.model.errors import BadInput
from emp.model.names import Name, SizeBytes, format_size
from emp.model.volume import VolumeType

PREFIX = "/v1/volumes"
VOLUME_ID = r"^vol-[0-9a-f]{17}$"
SIZE_STEP_BYTES = 1 << 20


def new_volume_id() -> str:
    return f"vol-{secrets.token_hex(9)[:17]}"


def check_volume_id(volume: str) -> str:
    """Return ``volume`` if it is an id that the service could have given; raise ``BadInput`` otherwise."""
    if not re.fullmatch(VOLUME_ID, volume):
        raise BadInput(f"{volume[:40]!r} is not a volume's id", field="volume", hint="`emp volume list` shows them")
    return volume


def serial_of(volume: str) -> str:
    """Return what the guest sees as the disk's serial number: 20 characters, as many as the disk has room for."""
    return volume.replace("-", "")


class Resize(Model):
    size_bytes: SizeBytes

    @field_validator("size_bytes")
    @classmethod
    def _in_steps(cls, size_bytes: int) -> int:
        if size_bytes % SIZE_STEP_BYTES:
            raise ValueError(f"{size_bytes} bytes is not a multiple of {format_size(SIZE_STEP_BYTES)}")
        return size_bytes


class CreateVolume(Resize):
    type: VolumeType
    image: Name | None = None
    """what it is made from; None: it is all zeros"""


class Fence(Model):
    epoch: int = Field(ge=1)


class Claim(Model):
    """A node's attachment is held under this epoch from now on, and every older one is closed."""

    epoch: int = Field(ge=1)
    node: Name | None = None
    """None: the caller's own"""
