"""The seam to the network's data plane: what lets packets for an address arrive at the interface that has it.

In a lab with the network ``vpc`` it is ``fabric``. Elsewhere there is none: the lab's segment is one, and an address
answers from whichever node has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class PlaneInterface:
    """A network interface at an instance."""

    id: str
    instance: str
    mac: str
    source_dest_check: bool = True
    """what it sends under an address that it does not have is to be dropped"""


class NetworkPlane(Protocol):
    async def on_address_moved(self, address: str, interface: PlaneInterface | None) -> None:
        """Let packets for ``address`` arrive at ``interface`` and nowhere else; return when that is so.

        ``address``: IPv4 or IPv6, or a delegated prefix (``10.77.3.16/28``). None: packets for it go nowhere. A
        secondary address that moves is its old interface's in every answer of the cloud until this has returned. The
        call is repeated after it has raised, for every address after a restart of the cloud, and when something else of
        its interface has changed. Of one address there is one call at a time.
        """
        ...


class NoNetworkPlane:
    """Addresses that nothing is sent to, for the control plane alone."""

    async def on_address_moved(self, address: str, interface: PlaneInterface | None) -> None:
        """Nothing is sent."""
