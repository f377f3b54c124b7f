"""Migrations: begun, followed to their end, aborted, listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from emp.client.events import PATIENCE_S, OnBreak, follow
from emp.client.nouns import Noun, part, read_event, without_none

if TYPE_CHECKING:
    from emp.model.api import Listing
    from emp.model.migration import Migration


ABORT_S = 20.0
"""an abort is answered within five seconds, if only with ``OutcomeUnknown``"""


class Migrations(Noun):
    def start(
        self,
        evm: str,
        *,
        target: str | None = None,
        policy: Mapping[str, Any] | None = None,
        dry_run: bool = False,
    ) -> Migration:
        """Begin a migration and return its plan, at once; with ``dry_run`` only plan it.

        ``target`` None: placement picks. ``policy``: fields of ``emp.model.migration.Policy``, each with its default.
        Raises ``NotFound``, ``BadInput``, ``Conflict``, ``NodeDown``, ``Refused`` or ``NoPlacement``.
        """
        body = without_none(target=target, policy=policy or None, dry_run=dry_run or None)
        return self.ask(_migration, "POST", f"/v1/evms/{part(evm, field='evm')}/migrations", body)

    def list(self, *, evm: str | None = None) -> Listing[Migration]:
        """The newest first. Raises ``NotFound`` for an EVM that is unknown."""
        if evm is not None:
            part(evm, field="evm")
        return self.ask(_listing, "GET", "/v1/migrations", query={"evm": evm})

    def get(self, id: str) -> Migration:  # noqa: A002
        """Return it with its latest progress. Raises ``NotFound``."""
        return self.ask(_migration, "GET", _path(id))

    def events(
        self,
        id: str,  # noqa: A002
        *,
        last_event_id: str = "",
        patience_s: float = PATIENCE_S,
        on_break: OnBreak | None = None,
    ) -> Iterator[Migration]:
        """Yield snapshots, several a second, the last of which is closed.

        While the controller is away (the migration goes on) it waits, and then goes on with every stage that passed.
        Raises ``NotFound``, or ``Unavailable`` after ``patience_s`` seconds without the controller.
        """
        path, model = f"{_path(id)}/events", _migration()
        stream = follow(self.transport, path, last_event_id=last_event_id, patience_s=patience_s, on_break=on_break)
        for event in stream:
            migration = read_event(event, model)
            yield migration
            if migration.stage == "closed":
                return

    def abort(self, id: str, *, reason: str | None = None) -> Migration:  # noqa: A002
        """Go back, and return the migration once it is decided: ``outcome`` aborted, the EVM on its source.

        Raises ``NotFound``, ``Conflict`` when it is over or only goes forward, ``OutcomeUnknown`` when the source does
        not say within five seconds.
        """
        body = without_none(reason=reason)
        return self.ask(_migration, "POST", f"{_path(id)}/abort", body, timeout_s=ABORT_S)


def _path(id: str) -> str:  # noqa: A002
    return f"/v1/migrations/{part(id, field='migration')}"


def _migration() -> type[Migration]:
    from emp.model.migration import Migration

    return Migration


def _listing() -> type[Listing[Migration]]:
    from emp.model.api import Listing
    from emp.model.migration import Migration

    return Listing[Migration]
