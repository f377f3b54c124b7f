"""``emp migration``: migrations that run or have run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from emp.cli.output import clock, milliseconds, print_facts, print_json, print_table, seconds
from emp.cli.session import Json, Session
from emp.client import Client
from emp.model.errors import Conflict, NotFound

if TYPE_CHECKING:
    from emp.model.migration import Migration

app = typer.Typer(help="Migrations that run or have run.", no_args_is_help=True, add_completion=False)

Which = Annotated[str, typer.Argument(metavar="ID|EVM", help="Id of a migration, or name of an EVM.")]
_ID = re.compile(r"m-[0-9a-f]{6,}")


@app.command(name="list")
def list_(
    ctx: typer.Context,
    evm: Annotated[str | None, typer.Option(metavar="EVM", help="Of one EVM only.")] = None,
    as_json: Json = False,
) -> None:
    """Show migrations, the newest first."""
    session: Session = ctx.obj
    with session.client() as client:
        migrations = client.migrations.list(evm=evm)
    if as_json:
        print_json(migrations)
        return
    rows = [
        (
            m.id,
            m.evm,
            f"{m.source} -> {m.target}",
            (m.outcome or m.stage).value,
            seconds(m.report.stages.source_brownout_s),
            milliseconds(m.report.stages.blackout_ms),
            clock(m.created_at),
        )
        for m in migrations.items
    ]
    headers = ("MIGRATION", "EVM", "ROUTE", "STATE", "BROWNOUT", "BLACKOUT", "BEGAN")
    print_table(headers, rows, empty="There was no migration yet.")


@app.command()
def show(
    ctx: typer.Context,
    which: Which,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Each thing that was monitored.")] = False,
    as_json: Json = False,
) -> None:
    """Show a migration, or the newest one of an EVM."""
    from emp.cli.lines import step_text
    from emp.cli.report import print_report

    session: Session = ctx.obj
    with session.client() as client:
        migration = _find(client, which)
    if as_json:
        print_json(migration)
        return
    took_s = migration.ended_at - migration.created_at if migration.ended_at else None
    bad = [f"{check.name}: {check.message}" for check in migration.checks if not check.ok]
    print_facts(
        [
            ("migration", migration.id),
            ("evm", migration.evm),
            ("route", f"{migration.source} -> {migration.target}"),
            ("target", migration.placement),
            ("stage", migration.stage.value),
            ("outcome", migration.outcome),
            ("cause", migration.cause),
            ("hint", migration.hint),
            ("volumes", "\n".join(step_text(step, migration) for step in migration.moving)),
            ("abort", migration.abort_asked and f"asked for: {migration.abort_asked}"),
            ("committed", "yes" if migration.committed else "no"),
            ("checks", "\n".join(bad) or f"{len(migration.checks)} passed"),
            ("began", clock(migration.created_at)),
            ("took", None if took_s is None else seconds(took_s)),
        ]
    )
    print_report(migration, verbose=verbose)


@app.command()
def watch(ctx: typer.Context, which: Which, as_json: Json = False) -> None:
    """Follow a migration to its end, as emp migrate does. With --json: one line for each change."""
    from emp.cli.follow import follow

    session: Session = ctx.obj
    with session.client() as client:
        follow(session, client, _find(client, which), as_json=as_json, each=True)


@app.command()
def abort(
    ctx: typer.Context,
    which: Which,
    reason: Annotated[str | None, typer.Option(help="Goes into the migration's record.")] = None,
    as_json: Json = False,
) -> None:
    """Bring the EVM back to its source, and say when it is; or say that the migration is committed."""
    from emp.cli.decide import abort_and_tell

    session: Session = ctx.obj
    with session.client() as client:
        abort_and_tell(session, client, _open(client, which), reason=reason, as_json=as_json)


def _find(client: Client, which: str) -> Migration:
    """Return the migration of that id, else the newest of the EVM of that name."""
    if _ID.fullmatch(which):
        try:
            return client.migrations.get(which)
        except NotFound as error:
            missing = error
        try:
            found = client.migrations.list(evm=which).items
        except NotFound:
            raise missing from None
    else:
        found = client.migrations.list(evm=which).items
    if not found:
        raise NotFound(f"EVM {which} has not migrated yet", field="migration", hint=f"emp migrate {which}")
    return found[0]


def _open(client: Client, which: str) -> str:
    """Return the id of a migration, by itself or as the one that an EVM is in."""
    if _ID.fullmatch(which):
        return which
    migration = client.evms.get(which).migration
    if migration is None:
        raise Conflict(f"EVM {which} is not migrating", field="evm", hint=f"emp migration list --evm {which}")
    return migration
