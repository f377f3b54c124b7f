"""EVMs: made, started, stopped, deleted, and their serial consoles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from emp.client.nouns import ORDER_S, Noun, part, without_none

if TYPE_CHECKING:
    from emp.model.api import EvmCreate, Listing
    from emp.model.clock import GuestClock
    from emp.model.evm import Evm
    from emp.model.network import EvmNetwork

CONSOLE_QUIET_S = 24 * 3600.0
"""a console without output for so long is given up"""
TYPE_S = 30.0
"""input waits for the end of a blackout"""
TYPE_BYTES = 32 << 10


class Evms(Noun):
    def list(self) -> Listing[Evm]:
        return self.ask(_listing, "GET", "/v1/evms")

    def get(self, name: str) -> Evm:
        """Raises ``NotFound``."""
        return self.ask(_evm, "GET", _path(name))

    def network(self, name: str) -> EvmNetwork:
        """Return what it does on the wire, as its node last reported. Raises ``NotFound``."""
        return self.ask(_network, "GET", f"{_path(name)}/network")

    def clock(self, name: str) -> GuestClock:
        """Return how right its guest's wall clock is, as its node last reported. Raises ``NotFound``."""
        return self.ask(_clock, "GET", f"{_path(name)}/clock")

    def create(self, request: EvmCreate | Mapping[str, Any]) -> Evm:
        """Return the EVM once its QEMU runs. ``request``: an ``EvmCreate``, or its fields.

        Raises ``BadInput``, ``AlreadyExists``, ``NotFound``, ``Conflict``, ``Refused``, ``NodeDown`` or ``HostError``.
        """
        return self.ask(_evm, "POST", "/v1/evms", request, timeout_s=ORDER_S)

    def start(self, name: str, *, node: str | None = None) -> Evm:
        """Cold start, on ``node`` if that is said. Raises ``Conflict`` if it is not stopped, ``NodeDown``, ..."""
        return self.ask(_evm, "POST", f"{_path(name)}/start", without_none(node=node), timeout_s=ORDER_S)

    def recover(self, name: str, *, node: str | None = None) -> Evm:
        """Cold start of an EVM whose node or migration is lost; ``NodeDown`` says which node must be fenced first."""
        return self.ask(_evm, "POST", f"{_path(name)}/recover", without_none(node=node), timeout_s=ORDER_S)

    def stop(self, name: str, *, grace_s: float | None = None) -> Evm:
        """Shut it down; ``grace_s`` seconds after the power button it is powered off, 0: at once."""
        body = without_none(grace_s=grace_s)
        return self.ask(_evm, "POST", f"{_path(name)}/stop", body, timeout_s=ORDER_S)

    def delete(self, name: str, *, grace_s: float | None = None) -> None:
        """Remove the EVM, its addresses, and the volumes made with it."""
        path = _path(name)
        self.transport.send("DELETE", path, query=without_none(grace_s=grace_s), timeout_s=ORDER_S).answer()

    def attach_volume(self, name: str, volume: str) -> Evm:
        """Give it a volume: plugged if it runs. Raises ``NotFound``, ``Conflict``, ``NodeDown``, ``HostError``."""
        return self.ask(_evm, "POST", f"{_path(name)}/volumes", {"volume": volume}, timeout_s=ORDER_S)

    def detach_volume(self, name: str, volume: str, *, in_use: bool = False) -> Evm:
        """Take a volume away; ``Conflict`` while the guest uses it, unless ``in_use``."""
        path = f"{_path(name)}/volumes/{part(volume, field='volume')}"
        query = {"in_use": "true"} if in_use else None
        return self.ask(_evm, "DELETE", path, query=query, timeout_s=ORDER_S)

    def console(self, name: str) -> Iterator[bytes]:
        """Yield the serial console's output, from a little before now, until the EVM is stopped or deleted.

        Goes on over migrations. Raises ``NotFound``, ``Conflict`` where there is no machine, ``Unavailable``.
        """
        return self.transport.send("GET", f"{_path(name)}/console", timeout_s=CONSOLE_QUIET_S).stream()

    def type(self, name: str, data: bytes) -> None:
        """Send input to the serial console."""
        path = f"{_path(name)}/console"
        for start in range(0, len(data), TYPE_BYTES):
            piece = data[start : start + TYPE_BYTES]
            call = self.transport.send("POST", path, piece, content_type="application/octet-stream", timeout_s=TYPE_S)
            call.answer()


def _path(name: str) -> str:
    return f"/v1/evms/{part(name, field='evm')}"


def _network() -> type[EvmNetwork]:
    from emp.model.network import EvmNetwork

    return EvmNetwork


def _clock() -> type[GuestClock]:
    from emp.model.clock import GuestClock

    return GuestClock


def _evm() -> type[Evm]:
    from emp.model.evm import Evm

    return Evm


def _listing() -> type[Listing[Evm]]:
    from emp.model.api import Listing
    from emp.model.evm import Evm

    return Listing[Evm]
