"""``emp lab``: a whole pool on this machine, to try it, to test it, and to break it."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from emp.lab import verbs
from emp.lab.down import down as clear_lab
from emp.lab.preflight import become_root
from emp.lab.state import LabFiles, chosen, lab_names
from emp.lab.up import Options, broken_parts
from emp.lab.up import up as make_lab
from emp.model.errors import EmpError, NotFound
from emp.model.names import format_size, parse_size

app = typer.Typer(
    help="A whole pool on this machine: real daemons and real EVMs, in network namespaces.", no_args_is_help=True
)
out = Console(highlight=False, soft_wrap=True)
err = Console(highlight=False, soft_wrap=True, stderr=True)

DEFAULT_NAME = "lab"

Name = Annotated[str | None, typer.Option("--name", help="Which lab; needed only where there are several.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Where = Annotated[str, typer.Argument(help="A node (n1, n2, ...), ctl, vol or client.")]
Role = Annotated[str, typer.Argument(help="agent, controller, volumes, or qemu:EVM.")]


@app.callback()
def _as_root() -> None:
    become_root()
    signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind as for Ctrl-C, so that nothing half made is left."""
    sys.exit(128 + number)


def _say(line: str) -> None:
    err.print(line, style="dim", markup=False)


def _print_json(value: Any) -> None:
    out.print_json(json.dumps(value)) if out.is_terminal else print(json.dumps(value))


@app.command()
def up(
    name: Annotated[str, typer.Option("--name", help="Name of the lab, of its pool and its context.")] = DEFAULT_NAME,
    nodes: Annotated[int, typer.Option(help="Number of bare-metal nodes.")] = 2,
    port: Annotated[
        int | None, typer.Option(help="Of the controller, on 127.0.0.1; the first free one if left out.")
    ] = None,
    memory: Annotated[str, typer.Option(help="That each node offers to EVMs.")] = "4GiB",
    vcpus: Annotated[int, typer.Option(min=1, help="That each node offers to EVMs.")] = 8,
    as_json: Json = False,
) -> None:
    """Make a lab; when this returns, its pool can be used."""
    options = Options(name, nodes, port, parse_size(memory, field="memory"), vcpus)
    state = make_lab(options, _say)
    if as_json:
        _print_json(asdict(state) | {"url": f"https://127.0.0.1:{state.port}", "places": _places(LabFiles(name))})
        return
    out.print(
        f"The lab [bold]{name}[/bold] is up: {nodes} nodes of {format_size(options.memory_bytes)}, {vcpus} vCPUs."
    )
    out.print(f"  emp --context {name} node list\n  emp --context {name} evm create web\n  emp lab down --name {name}")


@app.command()
def down(name: Name = None, as_json: Json = False) -> None:
    """Remove a lab and every trace of it, whatever state it is in."""
    gone = None
    with suppress(NotFound):  # no lab at all: there is nothing to remove, which is what was asked for
        files = chosen(name)
        name, gone = files.name, clear_lab(files)
    if as_json:
        _print_json({"name": name, "removed": bool(gone)})
    else:
        out.print(f"The lab {name} is gone." if gone else "There is no such lab: nothing to remove.", markup=False)


@app.command(name="list")
def list_(as_json: Json = False) -> None:
    """Show the labs on this machine."""
    rows = [_summary(name) for name in lab_names()]
    if as_json:
        _print_json(rows)
        return
    table = Table("LAB", "NODES", "URL", "STATE", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], str(row["nodes"] or "-"), row["url"] or "-", row["state"])
    out.print(table if rows else "There is no lab on this machine; `emp lab up` makes one.")


def _summary(name: str) -> dict[str, Any]:
    files = LabFiles(name)
    try:
        state = files.load()
    except NotFound:
        return {"name": name, "nodes": None, "url": None, "state": "half made; emp lab down clears it"}
    dead = broken_parts(files, state)
    health = f"broken (dead: {', '.join(dead)})" if dead else "up"
    return {"name": name, "nodes": state.nodes, "url": f"https://127.0.0.1:{state.port}", "state": health}


def _places(files: LabFiles) -> list[dict[str, Any]]:
    return [asdict(place) for place in verbs.status(files)]


@app.command()
def status(name: Name = None, as_json: Json = False) -> None:
    """Show what runs in each place of a lab."""
    files = chosen(name)
    if as_json:
        _print_json(_summary(files.name) | {"places": _places(files)})
        return
    table = Table("PLACE", "ADDRESS", "DAEMON", "STATE", "PID", "EVMS", box=None, pad_edge=False)
    for place in verbs.status(files):
        table.add_row(
            place.name, place.address, place.role, place.state, str(place.pid or "-"), " ".join(place.evms) or "-"
        )
    summary = _summary(files.name)
    out.print(f"lab {files.name}  {summary['url']}  {summary['state']}", markup=False)
    out.print(table)


@app.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def exec_(
    where: Where, command: Annotated[list[str], typer.Argument(help="Command, after --.")], name: Name = None
) -> None:
    """Run a command in a place, as root: emp lab exec n1 -- ip address"""
    verbs.execute(chosen(name), where, command[1:] if command[:1] == ["--"] else command)


@app.command()
def kill(where: Where, role: Role, name: Name = None) -> None:
    """Kill a daemon or an EVM's QEMU (SIGKILL)."""
    pid = verbs.kill(chosen(name), where, role)
    out.print(f"{role} on {where} (pid {pid}) is dead", markup=False)


@app.command()
def stop(where: Where, role: Role, name: Name = None) -> None:
    """Freeze a daemon or an EVM's QEMU (SIGSTOP)."""
    pid = verbs.stop(chosen(name), where, role)
    out.print(f"{role} on {where} (pid {pid}) is frozen", markup=False)


@app.command()
def cont(where: Where, role: Role, name: Name = None) -> None:
    """Let what was frozen go on (SIGCONT)."""
    pid = verbs.cont(chosen(name), where, role)
    out.print(f"{role} on {where} (pid {pid}) goes on", markup=False)


@app.command()
def start(where: Where, role: Role, name: Name = None) -> None:
    """Start again a daemon that has died."""
    verbs.start(chosen(name), where, role)
    out.print(f"{role} on {where} is started", markup=False)


@app.command()
def demo(
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result to FILE.")
    ] = None,
) -> None:
    """Migrate an EVM there and back in a lab of its own, and show what happened."""
    from emp.lab.demo import run

    sys.exit(0 if run(as_json) else 1)


def main() -> None:
    """``python -m emp.cli.lab``."""
    try:
        app()
    except EmpError as error:
        err.print(f"error: {error}", markup=False)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
