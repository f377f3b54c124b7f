"""What a verb knows of the command line round it: which pool is meant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from emp.client import Client

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True)
class Session:
    context: str | None
    """as given by ``--context``"""

    def client(self) -> Client:
        """Raises ``NotFound`` or ``BadInput`` where no pool is meant."""
        return Client.from_context(self.context)

    def command(self, words: str) -> str:
        """Return a command for people to type, that means the same pool."""
        return f"emp --context {self.context} {words}" if self.context else f"emp {words}"
