"""``emp migration abort``: says that the EVM is back on its source, or why that is not so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emp.cli.output import milliseconds, print_json
from emp.model.errors import OutcomeUnknown, Unavailable

if TYPE_CHECKING:
    from emp.cli.session import Session
    from emp.client import Client


def abort_and_tell(session: Session, client: Client, migration: str, *, reason: str | None, as_json: bool) -> None:
    """Ask, and print the answer, which is the decision. Raises ``Conflict`` when it is committed or was over before."""
    try:
        decided = client.migrations.abort(migration, reason=reason)
    except (OutcomeUnknown, Unavailable) as error:
        look = session.command(f"migration watch {migration}")
        error.hint = f"{error.hint}; {look}" if error.hint else f"see what came of it: {look}"
        raise
    if as_json:
        print_json(decided)
        return
    pause_ms = decided.report.abort_pause_ms
    stood = f"; it stood still for {milliseconds(pause_ms)}" if pause_ms is not None else ""
    print(f"{decided.id}: {decided.evm} is back on {decided.source}, running{stood}")
