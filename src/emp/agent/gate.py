"""What a node may do now: nothing before it has adopted what was here, nothing new while its word is in doubt.

A node in quarantine touches nothing, takes no new part in anything, and answers nothing from its journal: "unknown",
never WITHDRAWN (rule R5). Roles that are running know more than the journal and go on.
"""

from __future__ import annotations

from emp.model.errors import Unavailable


class Gate:
    def __init__(self) -> None:
        self.starting: str | None = "the agent is still adopting what was here before"
        self.distrust: str | None = None
        """why the journal of this node is not to be believed: for as long as this agent runs"""
        self.ordered: str | None = None
        """the controller's reason, until it takes it back: it remembers a later journal, or has fenced the node"""

    @property
    def closed(self) -> str | None:
        """Why the node takes no new orders."""
        return self.starting or self.quarantine

    @property
    def quarantine(self) -> str | None:
        return self.distrust or self.ordered

    def check(self) -> None:
        """May something new begin? Raises ``Unavailable``."""
        self._check(self.closed)

    def check_adopted(self) -> None:
        """May a role that is running be asked? Raises ``Unavailable``."""
        self._check(self.starting)

    def check_retire(self) -> None:
        """RETIRE is how a fence is lifted, so that the controller's own quarantine lets it through."""
        self._check(self.starting or self.distrust)

    def check_journal(self) -> None:
        """May the journal be quoted? Raises ``Unavailable``."""
        self._check(self.quarantine)

    @staticmethod
    def _check(reason: str | None) -> None:
        if reason:
            raise Unavailable(reason, hint="see: emp node show, docs/journal.md")
