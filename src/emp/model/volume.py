"""A volume and its attachments."""

from __future__ import annotations

from enum import StrEnum

from emp.model.base import Model
from emp.model.names import Name, SizeBytes


class VolumeType(StrEnum):
    """What kinds of volume the pool knows. ``io2`` is multi-attach: the target attaches it in the source brownout."""

    IO2 = "io2"

    @property
    def multi_attach(self) -> bool:
        return self is VolumeType.IO2


class NbdEndpoint(Model):
    """Where a node reaches an attached volume: an NBD export under TLS that only this node may open."""

    host: str
    port: int
    export: str
    tls_hostname: str
    """The name that the server's certificate must carry."""


class Attachment(Model):
    """One volume opened to one node under one epoch."""

    volume: str
    node: Name
    epoch: int
    endpoint: NbdEndpoint


class Volume(Model):
    """A volume's record. ``serial`` is what the guest sees at its virtio-blk disk and what is checked before use."""

    id: str
    type: VolumeType
    size_bytes: SizeBytes
    serial: str
    evm: Name | None = None
    attachments: tuple[Attachment, ...] = ()
