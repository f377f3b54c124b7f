"""The command ``emp``: finds the noun's module, runs the verb, turns every error into a block and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer
import typer.core
import typer.main

from emp.cli.failure import BROKEN_PIPE, INTERRUPTED, show_error, usage_error
from emp.cli.session import Session
from emp.cli.words import spare_text
from emp.model.errors import EmpError


class _Entry(NamedTuple):
    module: str
    help: str


NOUNS = {
    "evm": _Entry("emp.cli.evm", "Make, list, start, stop, recover and delete EVMs; attach to their console."),
    "migrate": _Entry("emp.cli.migrate", "Move a running EVM to another node."),
    "migration": _Entry("emp.cli.migration", "List, show, watch and abort migrations."),
    "node": _Entry("emp.cli.node", "List, show, cordon, fence and readmit bare-metal nodes."),
    "volume": _Entry("emp.cli.volume", "Make, list, show, attach, resize and delete volumes."),
    "lab": _Entry("emp.lab.cli", "A whole pool on this machine, in network namespaces."),
    "agent": _Entry("emp.cli.agent", "Run the daemon of a bare-metal node, or ask it on the node."),
    "controller": _Entry("emp.cli.daemon", "Run the daemon of a pool."),
}


class _Lazy(typer.core.TyperGroup):
    """Knows every noun by its line of help, and imports the one that is used."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        for name, entry in NOUNS.items():
            self.add_command(typer.core.TyperCommand(name, help=entry.help))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = typer.main.get_command(importlib.import_module(NOUNS[name].module).app)
        return name, command, rest


app = typer.Typer(cls=_Lazy, help="Move running EVMs between bare-metal nodes.", no_args_is_help=True)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"emp {version('emp')}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    context: Annotated[
        str | None,
        typer.Option(help="Which pool is meant; else EMP_CONTEXT, else the only one known.", metavar="NAME"),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    ctx.obj = Session(context)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; an error is on stderr."""
    as_json = _wants_json(arguments)
    spare_text()
    try:
        command = typer.main.get_command(app)
        if "_EMP_COMPLETE" in os.environ:
            command.main(list(arguments), prog_name="emp")
        with command.make_context("emp", list(arguments)) as ctx:
            command.invoke(ctx)
        sys.stdout.flush()
    except typer.Exit as end:
        return end.exit_code
    except EmpError as error:
        show_error(error, as_json=as_json)
        return error.exit_code
    except typer.TyperException as error:
        return usage_error(error, as_json=as_json)
    except BrokenPipeError:
        _silence()
        return BROKEN_PIPE
    except KeyboardInterrupt as stop:
        print("interrupted", *getattr(stop, "__notes__", ()), sep="\n", file=sys.stderr)
        return INTERRUPTED
    return 0


def _wants_json(arguments: Sequence[str]) -> bool:
    """Return whether errors are to be JSON. ``emp lab demo --json FILE`` writes a file, for people who look on."""
    words = list(arguments)
    own = words[: words.index("--")] if "--" in words else words
    return "--json" in own and own[:2] != ["lab", "demo"]


def _silence() -> None:
    """Nobody reads what is printed: let what is still in the buffer go nowhere."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)
