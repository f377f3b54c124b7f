"""``emp node``: the pool's bare-metal nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from emp.cli.output import clock, print_facts, print_json, print_table, size
from emp.cli.session import Json, Session

if TYPE_CHECKING:
    from emp.model.node import Node

app = typer.Typer(help="The pool's bare-metal nodes.", no_args_is_help=True, add_completion=False)

Name = Annotated[str, typer.Argument(metavar="NODE", help="Name of the node.")]


@app.command(name="list")
def list_(ctx: typer.Context, as_json: Json = False) -> None:
    """Show every node."""
    session: Session = ctx.obj
    with session.client() as client:
        nodes = client.nodes.list()
    if as_json:
        print_json(nodes)
        return
    rows = [
        (
            node.name,
            _state(node),
            node.report.address,
            size(node.report.memory_bytes),
            size(node.report.memory_used_bytes),
            str(node.report.vcpus),
            str(len(node.report.evms)),
        )
        for node in nodes.items
    ]
    headers = ("NODE", "STATE", "ADDRESS", "MEMORY", "USED", "VCPUS", "EVMS")
    print_table(headers, rows, empty="No node has reported yet.")


@app.command()
def show(ctx: typer.Context, name: Name, as_json: Json = False) -> None:
    """Show one node, and what runs there."""
    session: Session = ctx.obj
    with session.client() as client:
        node = client.nodes.get(name)
    if as_json:
        print_json(node)
        return
    report, versions = node.report, node.report.versions
    evms = [f"{evm.name} ({evm.state}{f': {evm.reason}' if evm.reason else ''})" for evm in report.evms]
    print_facts(
        [
            ("node", node.name),
            ("state", _state(node)),
            ("last seen", clock(node.last_seen_at)),
            ("address", f"{report.address}:{report.port}"),
            ("memory", f"{size(report.memory_used_bytes)} of {size(report.memory_bytes)} used"),
            ("vcpus", str(report.vcpus)),
            ("evms", "\n".join(evms) or "none"),
            ("qemu", f"{versions.qemu} ({versions.accelerator})"),
            ("emp", f"{versions.emp}, protocol {versions.protocol}"),
            ("images", " ".join(sorted(versions.images)) or "none"),
            ("journal", report.journal),
            ("fence", _fence(node)),
            ("quarantine", node.quarantine),
        ]
    )


@app.command()
def cordon(ctx: typer.Context, name: Name, as_json: Json = False) -> None:
    """Let a node take no EVM any more. What runs there goes on."""
    session: Session = ctx.obj
    with session.client() as client:
        node = client.nodes.cordon(name)
    _print(node, f"node {node.name} is cordoned: it takes no EVM, what runs there goes on", as_json)


@app.command()
def uncordon(ctx: typer.Context, name: Name, as_json: Json = False) -> None:
    """Let a node take EVMs again."""
    session: Session = ctx.obj
    with session.client() as client:
        node = client.nodes.uncordon(name)
    _print(node, f"node {node.name} takes EVMs again", as_json)


@app.command()
def fence(
    ctx: typer.Context,
    name: Name,
    confirm: Annotated[bool, typer.Option("--confirm", help="Do it; without this, say what would be done.")] = False,
    reason: Annotated[str | None, typer.Option(help="Who asks and why; goes into the node's record.")] = None,
    as_json: Json = False,
) -> None:
    """Prove a lost node off, so that its EVMs may be started elsewhere: emp evm recover. Lifted once it is back."""
    session: Session = ctx.obj
    with session.client() as client:
        node = client.nodes.fence(name, confirm=confirm, reason=reason)
    _print(node, f"node {node.name} is fenced; start its EVMs elsewhere: emp evm recover EVM", as_json)


@app.command()
def readmit(
    ctx: typer.Context,
    name: Name,
    confirm: Annotated[bool, typer.Option("--confirm", help="Do it; without this, say what it means.")] = False,
    as_json: Json = False,
) -> None:
    """Take the journal that a quarantined node has now for its own."""
    session: Session = ctx.obj
    with session.client() as client:
        node = client.nodes.readmit(name, confirm=confirm)
    _print(node, f"node {node.name} is readmitted: what its journal says counts again", as_json)


def _fence(node: Node) -> str | None:
    """Return who proved the node off, and what it has to give up before the fence is lifted."""
    if node.fence is None:
        return None
    proof = f"{node.fence.driver}, {clock(node.fence.at_s)}: {node.fence.by}"
    owed = ", ".join(sorted(node.fence.retire))
    return f"{proof}\nlifted once it is back and has given up: {owed}" if owed else f"{proof}\nlifted once it is back"


def _print(node: Node, text: str, as_json: bool) -> None:
    if as_json:
        print_json(node)
    else:
        print(text)


def _state(node: Node) -> str:
    """Return how a node is, in words; ready nodes may be cordoned too."""
    if node.fence is not None:
        return "fenced"
    if node.quarantine is not None:
        return "quarantined"
    if not node.ready:
        return f"down since {clock(node.last_seen_at)}" if node.last_seen_at else "down"
    if node.report.journal:
        return "distrusted"
    return "cordoned" if node.cordoned else "ready"
