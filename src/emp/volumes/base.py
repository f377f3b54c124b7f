"""What the controller needs of a volume driver, and the one call that an agent makes.

The controller alone calls the volume service (the cloud's API), but for ``claim``. Every call is idempotent under
(volume, node, epoch). An attachment carries the epoch of the owner that it is for; ``fence`` makes the service refuse
everything older. A target's attachment is a candidate that changes nothing until its node claims it.
"""

from __future__ import annotations

from typing import Protocol

from emp.model.volume import Attachment, HostDevice, NbdEndpoint, Volume, VolumeType


class VolumeProbe(Protocol):
    """A node's agent sees with it whether the node reaches one attached volume: on a connection apart from QEMU's."""

    async def read(self) -> None:
        """Read a little. Raise ``Unreachable``; the next call tries anew."""
        ...

    async def close(self) -> None: ...


class DeviceResolver(Protocol):
    """A node's agent finds with it what QEMU shall open for an attached volume whose attachment names no endpoint."""

    async def resolve(self, volume: Volume) -> HostDevice | NbdEndpoint:
        """Return the device that has the volume's serial and its size; ask anew for each use.

        Raises ``Unavailable`` while no device has that serial: a kernel shows one a moment after the attachment is
        complete, so ask again. Raises ``Refused`` where a device has the serial and is not the volume: of another size
        or kind, or there are two. Such a device is not opened.
        """
        ...


class VolumeDriver(Protocol):
    async def create(self, *, type: VolumeType, size_bytes: int) -> Volume:  # noqa: A002, the field's name
        ...

    async def describe(self, volume: str) -> Volume:
        """Raise ``NotFound``."""
        ...

    async def list(self) -> tuple[Volume, ...]: ...

    async def delete(self, volume: str) -> None:
        """Raise ``Conflict`` while it is attached."""
        ...

    async def attach(self, volume: str, *, node: str, epoch: int) -> Attachment:
        """Open the volume to ``node``; returns when the node can use it. Same arguments, same answer.

        Raises ``Conflict`` when a single-attach volume is attached elsewhere, ``StaleEpoch`` when fenced.
        """
        ...

    async def detach(self, volume: str, *, node: str, epoch: int) -> None:
        """Close it to ``node`` under ``epoch``. Idempotent; an attachment with another epoch is not touched."""
        ...

    async def fence(self, volume: str, *, epoch: int) -> None:
        """Persist that only attachments of ``epoch`` or newer are served, and close all others."""
        ...


class VolumeClaims(Protocol):
    """A node's agent says that its EVM runs, or runs again, under a new epoch."""

    async def claim(self, attachment: Attachment, *, epoch: int) -> None:
        """Hold the attachment under ``epoch`` and shut out every older one; nothing where ``attachment.claim`` is None.

        By a target after its ACTIVATED (e_t), by a source after OWN(e_s). Same again, same answer. Raises
        ``StaleEpoch`` when a newer epoch holds the volume, ``Conflict`` when the attachment has been closed,
        ``Unavailable`` after which it may be asked again: the guest does not wait for it.
        """
        ...

    async def aclose(self) -> None: ...
