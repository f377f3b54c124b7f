"""``emp migration abort``: follows a migration until it is known whether the EVM is back or goes forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emp.cli.follow import Ending, events_of, left_early, make_view, verdict
from emp.cli.output import milliseconds, print_json
from emp.model.errors import Conflict, Unavailable
from emp.model.migration import Outcome

if TYPE_CHECKING:
    from emp.cli.session import Session
    from emp.client import Client
    from emp.model.migration import Migration


def follow_abort(session: Session, client: Client, migration: Migration, *, as_json: bool) -> None:
    """Say that the EVM is back on its source. Raises ``Conflict`` when the migration turns out to be committed."""
    ending = Ending(migration)
    view = make_view(migration, as_json=as_json)
    watch = session.command(f"migration watch {migration.id}")
    try:
        for snapshot in events_of(client, migration, view):
            ending.take(snapshot)
            view.show(snapshot)
            if snapshot.committed:
                break
    except KeyboardInterrupt:
        view.close()
        raise left_early(session, migration.evm, migration.id, as_json=as_json) from None
    except Unavailable as error:
        error.hint = f"the abort was asked for; see what came of it: {watch}"
        raise
    finally:
        view.close()
    last = ending.migration
    if as_json:
        print_json(last)
    if last.outcome is Outcome.LOST and (lost := verdict(ending)) is not None:
        raise lost
    if last.outcome is not Outcome.ABORTED:
        where = f"{last.evm} {'runs on' if last.outcome else 'goes to'} {last.target}"
        hint = f"from there it can be migrated back; watch it: {watch}"
        raise Conflict(f"migration {last.id} is committed: it only goes forward; {where}", field="migration", hint=hint)
    if not as_json:
        pause_ms = last.report.abort_pause_ms
        stood = f"; it stood still for {milliseconds(pause_ms)}" if pause_ms is not None else ""
        print(f"{last.id}: {last.evm} is back on {last.source}, running{stood}")
