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


def _print(node: Node, text: str, as_json: bool) -> None:
    if as_json:
        print_json(node)
    else:
        print(text)


def _state(node: Node) -> str:
    """Return how a node is, in words; ready nodes may be cordoned too."""
    if not node.ready:
        return f"down since {clock(node.last_seen_at)}" if node.last_seen_at else "down"
    if node.report.journal:
        return "distrusted"
    return "cordoned" if node.cordoned else "ready"
