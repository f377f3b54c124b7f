"""The pool's bare-metal nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emp.client.nouns import Noun, part

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


def _node() -> type[Node]:
    from emp.model.node import Node

    return Node


def _listing() -> type[Listing[Node]]:
    from emp.model.api import Listing
    from emp.model.node import Node

    return Listing[Node]
