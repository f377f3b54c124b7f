"""``emp agent``: the daemon of a node, and what root there may ask it at its local socket, without any controller."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emp.cli.output import print_facts, print_json, print_table, size
from emp.cli.session import Json
from emp.cli.values import parse_duration_s
from emp.client.local import SOCKET, LocalAgent
from emp.model.errors import BadInput, Conflict, HostError, NotFound, OutcomeUnknown

if TYPE_CHECKING:
    from emp.model.orders import RoleStatus

app = typer.Typer(
    help="The daemon of a bare-metal node, and what it tells root there.",
    invoke_without_command=True,
    add_completion=False,
)

Socket = Annotated[Path, typer.Option("--socket", metavar="PATH", help="agent.sock in the agent's run_dir.")]
_ID = re.compile(r"m-[0-9a-f]{6,}")
MOST_S = 30.0
REASON = "asked for on the node"


@app.callback()
def run(
    ctx: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Run the daemon with these settings.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Have the daemon log more.")] = False,
) -> None:
    from emp.cli.daemon import become

    if ctx.invoked_subcommand is not None:
        return
    if config is None:
        raise BadInput("there is nothing to do", field="--config", hint="emp agent --config FILE, or emp agent --help")
    become("emp.agent", ["--config", str(config), *(["--verbose"] if verbose else [])])


@app.command()
def status(socket: Socket = SOCKET, as_json: Json = False) -> None:
    """Show the node, its EVMs, and its part in migrations; needs no controller."""
    with contextlib.closing(LocalAgent(socket)) as agent:
        found = agent.status()
    if as_json:
        print_json(found)
        return
    node = found.node
    evms = [f"{evm.name} ({evm.state}{f': {evm.reason}' if evm.reason else ''})" for evm in node.evms]
    print_facts(
        [
            ("node", node.name),
            ("address", f"{node.address}:{node.port}"),
            ("memory", f"{size(node.memory_used_bytes)} of {size(node.memory_bytes)} used"),
            ("evms", "\n".join(evms) or "none"),
            ("journal", node.journal or f"{node.journal_id} at record {node.journal_seq}".strip()),
        ]
    )
    rows = [
        (role.migration, role.evm, role.role, role.phase, "yes" if role.committed else "no", role.cause or "-")
        for role in found.roles
    ]
    print_table(
        ("MIGRATION", "EVM", "HERE", "PHASE", "COMMITTED", "CAUSE"), rows, empty="It has no part in a migration."
    )


@app.command()
def abort(
    which: Annotated[str, typer.Argument(metavar="ID|EVM", help="Id of a migration, or name of an EVM.")],
    reason: Annotated[str, typer.Option(help="Goes into the migration's record.")] = REASON,
    wait: Annotated[str, typer.Option(metavar="TIME", help="How long to wait for what comes of it.")] = "10s",
    socket: Socket = SOCKET,
    as_json: Json = False,
) -> None:
    """Bring the EVM back to its source, or hear that it is committed; needs no controller."""
    wait_s = parse_duration_s(wait, field="wait")
    if wait_s > MOST_S:
        raise BadInput(f"{wait} is too long", field="wait", hint=f"at most {MOST_S:.0f} s; ask again then")
    with contextlib.closing(LocalAgent(socket)) as agent:
        migration = which if _ID.fullmatch(which) else _migration_of(agent, which)
        role = agent.abort(migration, reason=reason, wait_s=wait_s)
    if as_json:
        print_json(role)
    text = _verdict(role)
    if not as_json:
        print(f"{role.migration}: {text}")


def _migration_of(agent: LocalAgent, evm: str) -> str:
    roles = [role for role in agent.status().roles if role.evm == evm and not role.phase.final]
    if not roles:
        raise NotFound(f"this node has no part in a migration of {evm}", field="evm", hint="emp agent status")
    return roles[-1].migration


def _verdict(role: RoleStatus) -> str:
    """Return what came of an abort. Raises ``Conflict`` when it is committed, ``OutcomeUnknown`` when it is open."""
    from emp.model.orders import Role, RolePhase

    match role.phase:
        case RolePhase.ABORTED:
            return f"{role.evm} is back here, running"
        case RolePhase.WITHDRAWN:
            return f"nothing of {role.evm} is left here; it has not run here"
        case RolePhase.LOST:
            reason = role.cause or "its machine here is gone"
            raise HostError(f"{role.evm} is lost here: {reason}", hint=f"emp evm recover {role.evm}")
    if role.committed or role.phase is RolePhase.RUNNING:
        where = "to the target" if role.role is Role.SOURCE else "here"
        raise Conflict(
            f"migration {role.migration} is committed: it only goes forward; {role.evm} goes {where}",
            field="migration",
            hint="from there it can be migrated back",
        )
    raise OutcomeUnknown(
        f"the abort of {role.migration} is asked for and not decided yet: {role.phase}",
        field="migration",
        hint="emp agent status shows what comes of it; asking again does no harm",
    )
