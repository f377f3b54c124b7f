"""``emp migrate``: the request goes out before anything is imported that only its answer or its picture needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from emp.cli.session import Json, Session
from emp.cli.values import parse_duration_s, parse_rate_bytes_per_s
from emp.model.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emp.model.migration import Check, Migration, Policy

app = typer.Typer(add_completion=False)

VOLUME = "volume "
"""how the names of the checks of single volumes begin; the id follows"""


@app.command()
def migrate(
    ctx: typer.Context,
    evm: Annotated[str, typer.Argument(metavar="EVM", help="Name of the EVM.")],
    to: Annotated[str | None, typer.Option(metavar="NODE", help="Where; left out, placement picks.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the migration's id and leave.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and check only.")] = False,
    max_blackout: Annotated[
        str | None, typer.Option(metavar="TIME", help="Longest forecast pause to switch over at; 30ms if left out.")
    ] = None,
    deadline: Annotated[
        str | None, typer.Option(metavar="TIME", help="Longest source brownout, then abort; 15min if left out.")
    ] = None,
    max_bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Per second, such as 100MiB; uncapped if left out.")
    ] = None,
    classic: Annotated[
        bool,
        typer.Option("--classic", help="Detach and attach gp2 and gp3 in the blackout; the guest stands meanwhile."),
    ] = False,
    source_must_be_empty: Annotated[
        bool,
        typer.Option(
            "--source-must-be-empty", help="A volume whose move is refused waits, its I/O too, for the target."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Move a running EVM to another node. Ctrl-C only stops looking: the migration goes on."""
    session: Session = ctx.obj
    policy: dict[str, Any] = {}
    if max_blackout is not None:
        wanted_s = parse_duration_s(max_blackout, field="max-blackout", bare="ms")
        policy["max_blackout_ms"] = round(wanted_s * 1000)
    if deadline is not None:
        policy["deadline_s"] = parse_duration_s(deadline, field="deadline")
    if max_bandwidth is not None:
        policy["max_bandwidth_bytes_per_s"] = parse_rate_bytes_per_s(max_bandwidth, field="max-bandwidth")
    if classic:
        policy["volume_order"] = "classic"
    if source_must_be_empty:
        policy["source_must_be_empty"] = True
    with session.client() as client:
        try:
            migration = client.migrations.start(evm, target=to, policy=policy, dry_run=dry_run)
        except KeyboardInterrupt:
            from emp.cli.follow import left_early

            raise left_early(session, evm, as_json=as_json) from None
        if dry_run:
            _print_plan(migration, as_json)
        elif detach:
            _print_detached(session, migration, as_json)
        else:
            from emp.cli.follow import follow

            follow(session, client, migration, as_json=as_json)


def _print_detached(session: Session, migration: Migration, as_json: bool) -> None:
    """Print the id alone on stdout, for scripts; what people want to know is on stderr."""
    import sys

    from emp.cli.output import print_json

    if as_json:
        print_json(migration)
        return
    print(migration.id, flush=True)
    print(f"{migration.evm}: {migration.source} -> {migration.target}, {migration.placement}", file=sys.stderr)
    print(f"watch it: {session.command(f'migration watch {migration.id}')}", file=sys.stderr)


def _print_checks(title: str, checks: Sequence[tuple[Check, str]]) -> None:
    from emp.cli.output import print_hanging

    if not checks:
        return
    print(title)
    width = max(len(name) for _, name in checks)
    for check, name in checks:
        print_hanging(f"  {'ok' if check.ok else 'NO':2}  {name:{width}}  ", check.message)


def _volume_order(policy: Policy) -> str:
    refused = "wait for the target if refused" if policy.source_must_be_empty else "stay with the source if refused"
    return f"{policy.volume_order.value}; {refused}"


def _print_plan(plan: Migration, as_json: bool) -> None:
    from emp.cli.output import print_facts, print_json, rate, seconds

    failed = [check for check in plan.checks if not check.ok]
    if as_json:
        print_json(plan)
    else:
        policy = plan.policy
        cap = policy.max_bandwidth_bytes_per_s
        print_facts(
            [
                ("evm", plan.evm),
                ("from", plan.source),
                ("to", f"{plan.target}: {plan.placement}"),
                ("max blackout", f"{policy.max_blackout_ms} ms"),
                ("deadline", seconds(policy.deadline_s)),
                ("bandwidth", rate(cap) if cap else "uncapped"),
                ("gp2, gp3", _volume_order(policy)),
            ]
        )
        of_volumes = [
            (check, check.name.removeprefix(VOLUME)) for check in plan.checks if check.name.startswith(VOLUME)
        ]
        _print_checks("checks", [(check, check.name) for check in plan.checks if not check.name.startswith(VOLUME)])
        _print_checks("volumes", of_volumes)
    if failed:
        reasons = "; ".join(f"{check.name}: {check.message}" for check in failed)
        raise Refused(f"EVM {plan.evm} cannot move to {plan.target}: {reasons}", field="target")
    if not as_json:
        print("nothing was done: this was a dry run")
