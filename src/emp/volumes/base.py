"""What the controller needs of a volume driver, and the one call that an agent makes.

The controller alone calls the volume service (the cloud's API), but for ``claim``. Every call is idempotent under
(volume, node, epoch). An attachment carries the epoch of the owner that it is for; ``fence`` makes the service refuse
everything older. A target's attachment is a candidate that changes nothing until its node claims it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from emp.model.efs import EfsFacts, FileSystem
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

    async def aclose(self) -> None: ...


class VolumeDriver(Protocol):
    @property
    def name(self) -> str:
        """As in the controller's configuration; for people."""
        ...

    async def create(
        self,
        *,
        type: VolumeType,  # noqa: A002 - the protocol's name
        size_bytes: int,
        image: str | None = None,
    ) -> Volume:
        """Make a volume: of zeros, or from an image that the service has.

        Raise ``NotFound`` without that image, ``BadInput`` if it does not fit, ``Refused`` by a driver that knows none.
        """
        ...

    async def describe(self, volume: str) -> Volume:
        """Raise ``NotFound``."""
        ...

    async def list(self) -> tuple[Volume, ...]: ...

    async def delete(self, volume: str) -> None:
        """Raise ``Conflict`` while it is attached."""
        ...

    async def resize(self, volume: str, size_bytes: int) -> Volume:
        """Make it bigger; the size that it has already is no error. What is attached from now on has the new size.

        Raise ``BadInput`` for less than it has, ``Refused`` where this driver does not resize.
        """
        ...

    async def expect(self, volume: str, *, node: str, epoch: int) -> None:
        """Do ahead what ``attach`` with the same arguments would do before it opens the volume, if it can be done now.

        For who moves a single-attach volume, whose I/O waits from its detaching on. Opens nothing, and may do nothing.
        """
        ...

    async def attach(self, volume: str, *, node: str, epoch: int) -> Attachment:
        """Open the volume to ``node``; returns when the node can use it. Same arguments, same answer.

        Raises ``Conflict`` when a single-attach volume is attached elsewhere, ``StaleEpoch`` when fenced.
        """
        ...

    async def detach(self, volume: str, *, node: str, epoch: int, unheld: bool = False) -> None:
        """Close it to ``node`` under ``epoch``. Idempotent; an attachment with another epoch is not touched.

        ``unheld``: no QEMU has it open there and none will, as it has ended or its node is proven off. Only then may a
        service that asks the node to let go of it do without.
        """
        ...

    async def fence(self, volume: str, *, epoch: int, unheld: bool = False) -> None:
        """Persist that only attachments of ``epoch`` or newer are served, and close all others.

        ``unheld``: see ``detach``; of all that are older. Raises ``Refused`` where nobody can be shut out
        (``VolumeType.fenceable``).
        """
        ...

    async def obstacles(self, volumes: Sequence[str], *, nodes: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
        """Return node -> volume -> why it could not be attached there; what could is left out.

        What only the service knows of the place: zones, room. Nothing is kept free, so a later ``attach`` may be
        refused all the same. Raises ``Unavailable`` or ``Forbidden`` where it cannot be asked.
        """
        ...

    @property
    def move_s(self) -> float | None:
        """How long detaching a volume from one node and attaching it to another usually takes, before one has been
        measured; None: there is nothing to attach."""
        ...

    async def aclose(self) -> None: ...


class SharedStorage(Protocol):
    """What is told of storage that every node reaches, besides being a ``VolumeDriver`` for it."""

    async def register(self, url: str, *, size_bytes: int | None = None) -> Volume:
        """Raises ``BadInput``, ``AlreadyExists``, ``Refused`` or ``Unreachable``, naming ``url`` or ``size``."""
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


class RelayState(StrEnum):
    CONNECTING = "connecting"
    """it has not reached the volume yet; clients wait"""
    RUNNING = "running"
    HOLDING = "holding"
    """it waits for what is outstanding, and takes nothing new"""
    HELD = "held"
    """nothing goes to the volume, and there is no connection to it"""


@dataclass(frozen=True)
class RoundTrip:
    """From a request's first sending to the volume until its answer; holding and sending again are included."""

    count: int
    mean_ms: float
    max_ms: float


@dataclass(frozen=True)
class RelayStatus:
    """How a relay is, and what it has done since its process began."""

    state: RelayState
    writes_open: bool
    clients: int
    outstanding: int
    """requests that the volume has not answered"""
    waiting: int
    """requests that have not been sent to the volume"""
    is_flushed: bool
    """held, with nothing outstanding: every acknowledged write is on the volume, and it can be detached"""
    held_since_s: float | None
    """wall clock; None: not held"""
    problem: str | None
    """why the volume could not be reached, if that was the last that happened"""
    port: int | None
    """of the source's end"""
    read_ops: int
    read_bytes: int
    write_ops: int
    """of all kinds: writes, discards, zeroes"""
    write_bytes: int
    flushes: int
    errors: int
    """the volume's own, passed on"""
    reconnects: int
    """connections to the volume that were lost and made again, holds included"""
    round_trip: RoundTrip


class RelayDriver(Protocol):
    """A node's relays, one process per volume: they outlive the agent, which adopts them again.

    A relay is known by a name (a label as in ``emp.model.names``). The source's end *serves* a volume to another node;
    writes wait there until ``open``. The target's end *dials* it, and serves QEMU on a unix socket. Neither ever
    answers with an error of its own: what the volume does not answer waits. The same order again gives the same answer.
    Each raises ``NotFound`` for a name that there is not, ``HostError`` when the process does not run,
    ``OutcomeUnknown`` when it did not answer: give the same order again.
    """

    async def start(self) -> None:
        """Adopt the relays that there are, and start those again that have ended."""
        ...

    async def close(self) -> None:
        """The agent stops; its relays go on."""
        ...

    async def names(self) -> tuple[str, ...]: ...

    async def serve(self, name: str, *, source: HostDevice | NbdEndpoint, size_bytes: int, peer: str) -> NbdEndpoint:
        """Source: serve a volume of this node to the certificate ``peer`` (``agent-n2``) alone; writes wait.

        Returns once the volume answers. Raises ``Refused`` if it has another size, ``Unreachable`` or ``HostError`` if
        it does not answer or open; the relay goes on trying until it is ended. ``Conflict``: the name is in use for
        something else.
        """
        ...

    async def open(self, name: str) -> RelayStatus:
        """Source: let writes through from now on. For good: a relay that was killed and is started again still does."""
        ...

    async def dial(self, name: str, *, machine: str, upstream: NbdEndpoint, size_bytes: int) -> Path:
        """Target: return a unix socket, in a directory of ``machine``, on which the volume is served. As ``serve``."""
        ...

    async def hold(self, name: str, *, within_s: float) -> RelayStatus:
        """Return when all is answered and flushed, and there is no connection to the volume; then it can be detached.

        Raises ``Unreachable`` if that is not so ``within_s``, ``HostError`` if a flush failed or a device stays open.
        It is held all the same: ``switch`` it, which sends again what is outstanding, or ``hold`` it once more.
        """
        ...

    async def switch(self, name: str, source: HostDevice | NbdEndpoint) -> RelayStatus:
        """Let a held relay go on with the volume where it is now, or still is.

        Raises ``Refused`` if what is there has another size or cannot do what the client was told, ``Unreachable`` or
        ``HostError`` if it does not open: it stays held. ``Conflict``: it is not held.
        """
        ...

    async def status(self, name: str) -> RelayStatus: ...

    async def end(self, name: str) -> None:
        """End the relay; return when nothing of it has the volume open. What waits in it is never done. Idempotent."""
        ...


class EfsDriver(Protocol):
    """File systems that guests mount by themselves. None is attached to anything."""

    async def create(self) -> FileSystem:
        """Make one with a mount target in every zone of the pool's nodes; returns when it can be mounted."""
        ...

    async def list(self) -> tuple[FileSystem, ...]:
        """Return those that this pool has made."""
        ...

    async def describe(self, file_system: str) -> FileSystem:
        """Raise ``NotFound``."""
        ...

    async def delete(self, file_system: str) -> None:
        """Remove it and its mount targets; ``Refused`` for one that the pool has not made. Idempotent."""
        ...

    async def facts(self, file_systems: Iterable[str]) -> EfsFacts:
        """Return what pre-flight looks at. Never raises ``EmpError``: ``problem`` says why the cloud did not answer."""
        ...

    async def aclose(self) -> None: ...
