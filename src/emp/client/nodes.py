"""The pool's bare-metal nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emp.client.nouns import ORDER_S, Noun, part, without_none

if TYPE_CHECKING:
    from emp.model.api import Listing
    from emp.model.node import Node


class Nodes(Noun):
    def list(self) -> Listing[Node]:
        return self.ask(_listing, "GET", "/v1/nodes")

    def get(self, name: str) -> Node:
        """Raises ``NotFound``."""
        return self.ask(_node, "GET", f"/v1/nodes/{part(name, field='node')}")

    def cordon(self, name: str) -> Node:
        """Let the node take nothing new; what runs there goes on."""
        return self.ask(_node, "POST", f"/v1/nodes/{part(name, field='node')}/cordon")

    def uncordon(self, name: str) -> Node:
        return self.ask(_node, "POST", f"/v1/nodes/{part(name, field='node')}/uncordon")

    def fence(self, name: str, *, confirm: bool, reason: str | None = None) -> Node:
        """Prove the node off, so that its EVMs may start elsewhere.

        Without ``confirm`` it does nothing, and raises ``BadInput`` saying what it would do. Otherwise it raises
        ``Refused``, ``FenceFailed``, or ``OutcomeUnknown`` after which it may be asked again.
        """
        body = without_none(confirm=confirm, reason=reason)
        return self.ask(_node, "POST", f"/v1/nodes/{part(name, field='node')}/fence", body, timeout_s=ORDER_S)

    def readmit(self, name: str, *, confirm: bool) -> Node:
        """Take the journal that a quarantined node has now for its own; without ``confirm``: ``BadInput`` says what it
        means."""
        path = f"/v1/nodes/{part(name, field='node')}/readmit"
        return self.ask(_node, "POST", path, {"confirm": confirm})


def _node() -> type[Node]:
    from emp.model.node import Node

    return Node


def _listing() -> type[Listing[Node]]:
    from emp.model.api import Listing
    from emp.model.node import Node

    return Listing[Node]
