"""The pool's EFS file systems."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emp.client.nouns import ORDER_S, Noun, part

if TYPE_CHECKING:
    from emp.model.api import Listing
    from emp.model.efs import FileSystem

CREATE_S = 2 * ORDER_S
"""a mount target takes up to a minute and a half on AWS"""


class Efs(Noun):
    def list(self) -> Listing[FileSystem]:
        """Those that this pool has made."""
        return self.ask(_listing, "GET", "/v1/efs")

    def get(self, id: str) -> FileSystem:  # noqa: A002
        """Raises ``NotFound``."""
        return self.ask(_file_system, "GET", f"/v1/efs/{part(id, field='efs')}")

    def create(self) -> FileSystem:
        """Make one that every node reaches. Raises ``Refused`` where the pool has no EFS."""
        return self.ask(_file_system, "POST", "/v1/efs", timeout_s=CREATE_S)

    def delete(self, id: str) -> None:  # noqa: A002
        """Raises ``NotFound``, or ``Conflict`` while an EVM has it mounted."""
        self.transport.send("DELETE", f"/v1/efs/{part(id, field='efs')}", timeout_s=CREATE_S).answer()


def _file_system() -> type[FileSystem]:
    from emp.model.efs import FileSystem

    return FileSystem


def _listing() -> type[Listing[FileSystem]]:
    from emp.model.api import Listing
    from emp.model.efs import FileSystem

    return Listing[FileSystem]
