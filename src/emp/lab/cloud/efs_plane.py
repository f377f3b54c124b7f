"""The seam to EFS's data plane: what answers NFS at a mount target's address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class PlaneTarget:
    """A mount target: which file system answers at which address."""

    id: str
    file_system: str
    address: str


@dataclass(frozen=True)
class PlanePoint:
    """An access point: a directory, and whose it is to be if it has to be made."""

    id: str
    file_system: str
    path: str
    creation: Mapping[str, Any] | None
    """``OwnerUid``, ``OwnerGid``, ``Permissions`` (octal text); None: it is made by nobody"""


class EfsPlane(Protocol):
    """Every call is repeated after it has raised, and after a restart of the cloud: it must then do what is left."""

    async def on_opened(self, target: PlaneTarget) -> None:
        """Serve; return when a client can mount. The mount target is ``creating`` till then."""
        ...

    async def on_closed(self, target: PlaneTarget) -> None:
        """Serve no more; return when nothing can be written through it. ``deleting`` till then."""
        ...

    async def on_access_point(self, point: PlanePoint) -> None:
        """Make the directory of an access point, if it is not there and may be made."""
        ...

    async def on_removed(self, file_system: str) -> None:
        """Remove its data. It has no mount target."""
        ...


class NoEfsPlane:
    """File systems without data, for tests of the control plane alone."""

    async def on_opened(self, target: PlaneTarget) -> None:
        """Nothing is served."""

    async def on_closed(self, target: PlaneTarget) -> None:
        """Nothing was served."""

    async def on_access_point(self, point: PlanePoint) -> None:
        """There are no directories."""

    async def on_removed(self, file_system: str) -> None:
        """There is no data."""
