"""A node's agent at its local unix socket: for root on the node, and without any controller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from emp.client.nouns import Noun, part
from emp.client.transport import TIMEOUT_S, LocalTransport

if TYPE_CHECKING:
    from emp.model.orders import LocalStatus, RoleStatus

SOCKET = Path("/run/emp/agent.sock")
"""``agent.sock`` in the agent's ``run_dir``"""


class LocalAgent(Noun):
    """Raises ``Unreachable`` where there is no agent, or not for us."""

    def __init__(self, socket: Path = SOCKET) -> None:
        super().__init__(LocalTransport(socket))

    def status(self) -> LocalStatus:
        """Return the node as it is now, and its part in migrations."""
        return self.ask(_status, "GET", "/v1/status")

    def abort(self, migration: str, *, reason: str, wait_s: float) -> RoleStatus:
        """Ask for the way back, and return this node's part once that is decided, or after ``wait_s`` (at most 30).

        Raises ``NotFound`` for a migration that this node has no part in; ``OutcomeUnknown`` without an answer.
        """
        path = f"/v1/migrations/{part(migration, field='migration')}/abort"
        return self.ask(_role, "POST", path, {"reason": reason, "wait_s": wait_s}, timeout_s=wait_s + TIMEOUT_S)

    def close(self) -> None:
        self.transport.close()


def _status() -> type[LocalStatus]:
    from emp.model.orders import LocalStatus

    return LocalStatus


def _role() -> type[RoleStatus]:
    from emp.model.orders import RoleStatus

    return RoleStatus
