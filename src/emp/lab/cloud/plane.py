"""The seam to the data plane: what makes an attached volume readable and writable at its node, and at no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class PlaneVolume:
    """A volume as the data plane needs it, at the moment that it is asked."""

    id: str
    type: str
    size_bytes: int
    tags: Mapping[str, str]

    @property
    def serial(self) -> str:
        """What a node sees: the id without its dash."""
        return self.id.replace("-", "")


class DataPlane(Protocol):
    """``epoch`` counts the attachments of a volume: no two have the same, so an export named by it is never another's.

    It is the cloud's own; which owner of an EVM an attachment was made for stands in the volume's tags
    (``emp.volumes.ebs``). Every call is repeated after it has raised, and must then do what is left.
    """

    async def on_attached(self, volume: PlaneVolume, instance: str, epoch: int) -> None:
        """Open it; return when ``instance`` can use it. The attachment is ``attaching`` till then."""
        ...

    async def on_detached(self, volume: PlaneVolume, instance: str, epoch: int) -> None:
        """Close it; return when nothing can be written through it any more. ``detaching`` till then."""
        ...

    async def on_deleted(self, volume: PlaneVolume) -> None:
        """Remove its data. Nothing is attached."""
        ...

    async def on_grown(self, volume: PlaneVolume, exports: Sequence[tuple[str, int]]) -> None:
        """Make it as big as ``volume`` is now; return when each instance of ``exports`` can use all of it.

        By the epoch named with it, as if attached anew; what it had before stays open, until it is detached.
        """
        ...

    def on_tagged(self, volume: PlaneVolume) -> None:
        """Its tags have been set anew, and are on disk."""
        ...


class NoDataPlane:
    """Volumes without data, for tests of the control plane alone."""

    async def on_attached(self, volume: PlaneVolume, instance: str, epoch: int) -> None:
        """Nothing is opened."""

    async def on_detached(self, volume: PlaneVolume, instance: str, epoch: int) -> None:
        """Nothing was open."""

    async def on_deleted(self, volume: PlaneVolume) -> None:
        """There is no data."""

    async def on_grown(self, volume: PlaneVolume, exports: Sequence[tuple[str, int]]) -> None:
        """There is nothing to grow."""

    def on_tagged(self, volume: PlaneVolume) -> None:
        """Nobody reads them."""
