"""Follows a migration to its end: shows it as it goes, then what it was, and ends with the exit code that fits.

Leaving early changes nothing: the migration is the pool's, and the line that says so says how to come back to it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import typer

from emp.cli.failure import INTERRUPTED
from emp.cli.output import print_json, seconds
from emp.cli.report import print_report
from emp.client.events import PATIENCE_S
from emp.model.errors import EmpError, HostError, MigrationAborted, Unavailable
from emp.model.migration import Outcome, Stage

if TYPE_CHECKING:
    from emp.cli.session import Session
    from emp.client import Client
    from emp.model.migration import Migration


class View(Protocol):
    """How a migration is shown while it goes."""

    def show(self, migration: Migration) -> None: ...
    def on_break(self, loss: EmpError | None) -> None:
        """The controller has gone (``loss`` says why), or is back (None)."""

    def close(self) -> None: ...


class Silent:
    """For ``--json``; ``each``: one line of JSON for each snapshot."""

    def __init__(self, *, each: bool) -> None:
        self._each = each

    def show(self, migration: Migration) -> None:
        if self._each:
            print(migration.model_dump_json(), flush=True)

    def on_break(self, loss: EmpError | None) -> None:
        return

    def close(self) -> None:
        return


def make_view(migration: Migration, *, as_json: bool, each: bool = False) -> View:
    """Return the picture for where our output goes: a program, a log or a terminal."""
    if as_json:
        return Silent(each=each)
    if not sys.stdout.isatty():
        from emp.cli.lines import Lines

        return Lines()
    from emp.cli.screen import Screen

    return Screen(migration)


class Ending:
    """The last snapshot of a migration, and the stage in which it was decided."""

    def __init__(self, migration: Migration) -> None:
        self.migration = migration
        self._stage = None if migration.stage is Stage.CLOSED else migration.stage

    def take(self, migration: Migration) -> None:
        self.migration = migration
        if migration.stage is not Stage.CLOSED:
            self._stage = migration.stage

    @property
    def stage(self) -> Stage:
        """The last stage before the end; where it was not seen, as the figures tell."""
        report = self.migration.report
        if self._stage is not None:
            return self._stage
        if self.migration.outcome is Outcome.COMPLETED:
            return Stage.TARGET_BROWNOUT
        if report.abort_pause_ms is not None or report.stages.source_brownout_s is not None:
            return Stage.BLACKOUT
        return Stage.SOURCE_BROWNOUT if report.sent_bytes else Stage.PREPARATION


def follow(session: Session, client: Client, migration: Migration, *, as_json: bool, each: bool = False) -> None:
    """Show it until it is closed, then its figures.

    Raises ``MigrationAborted``, ``HostError`` when the EVM was lost, or ``Unavailable`` when the controller stays away.
    """
    ending = Ending(migration)
    view = make_view(migration, as_json=as_json, each=each)
    try:
        if migration.stage is Stage.CLOSED:
            view.show(migration)
        else:
            for snapshot in events_of(client, migration, view):
                ending.take(snapshot)
                view.show(snapshot)
    except KeyboardInterrupt:
        view.close()
        raise left_early(session, migration.evm, migration.id, as_json=as_json) from None
    except Unavailable as error:
        error.hint = f"the migration goes on; watch it: {session.command(f'migration watch {migration.id}')}"
        raise
    finally:
        view.close()
    conclude(ending, as_json=as_json and not each, quiet=as_json)


def events_of(client: Client, migration: Migration, view: View) -> Iterator[Migration]:
    """Return what comes of a migration, over breaks that ``view`` tells of."""
    return client.migrations.events(migration.id, patience_s=PATIENCE_S, on_break=view.on_break)


def conclude(ending: Ending, *, as_json: bool, quiet: bool) -> None:
    """Print what the migration was. Raises what its outcome means, unless it is completed."""
    migration = ending.migration
    if as_json:
        print_json(migration)
    error = verdict(ending)
    if not quiet:
        if error is None:
            took_s = (migration.ended_at or migration.created_at) - migration.created_at
            print(f"{migration.id}: {migration.evm} runs on {migration.target}, completed in {seconds(took_s)}")
        if error is None or migration.report.sent_bytes:
            print_report(migration)
    if error is not None:
        raise error


def verdict(ending: Ending) -> EmpError | None:
    """Return the error that a migration which is over ended in."""
    migration, stage = ending.migration, ending.stage.replace("-", " ")
    details = {"migration": migration.id, "stage": ending.stage.value, "cause": migration.cause}
    cause = migration.cause or "no reason given"
    if migration.outcome is Outcome.ABORTED:
        text = f"migration {migration.id} was aborted in the {stage}: {cause}"
        home = f"{migration.evm} runs on {migration.source}, as before"
        return MigrationAborted(text, hint=f"{home}; {migration.hint}" if migration.hint else home, **details)
    if migration.outcome is Outcome.LOST:
        text = f"migration {migration.id} lost EVM {migration.evm} in the {stage}: {cause}"
        return HostError(text, hint=migration.hint or f"emp evm show {migration.evm}", **details)
    return None


def left_early(session: Session, evm: str, migration: str | None = None, *, as_json: bool) -> typer.Exit:
    """Say on stderr that a migration goes on, and how to come back to it; return the end of this process."""
    if migration is None:
        what = f"the order was sent: EVM {evm} may be migrating"
        ways = {"look": session.command(f"migration list --evm {evm}")}
    else:
        what = f"detached: migration {migration} of {evm} goes on"
        ways = {
            "watch it": session.command(f"migration watch {migration}"),
            "abort it": session.command(f"migration abort {migration}"),
        }
    if as_json:
        details = {"evm": evm, "migration": migration}
        hint = "; ".join(f"{name}: {command}" for name, command in ways.items())
        body = {"code": "detached", "message": what, "field": None, "hint": hint, "details": details}
        print(json.dumps(body), file=sys.stderr)
    else:
        print(what, *(f"  {name}: {command}" for name, command in ways.items()), sep="\n", file=sys.stderr)
    return typer.Exit(INTERRUPTED)


def break_text(loss: EmpError | None) -> str:
    """Return what is told of a controller that goes or comes back."""
    if loss is None:
        return "the controller is back"
    return f"{loss.message}; the migration goes on, trying again for {PATIENCE_S:.0f} s"
