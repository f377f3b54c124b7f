"""``emp controller``: the daemon, in the place of this process; ``emp agent`` without a verb does the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

app = typer.Typer(add_completion=False)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def run(ctx: typer.Context) -> None:
    """Become ``python -m emp.controller`` with the same arguments."""
    become(f"emp.{ctx.info_name}", ctx.args)


def become(module: str, arguments: Sequence[str]) -> NoReturn:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
