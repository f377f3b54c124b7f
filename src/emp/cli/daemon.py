"""``emp agent`` and ``emp controller``: the daemons, each in the place of this process."""

from __future__ import annotations

import os
import sys

import typer

app = typer.Typer(add_completion=False)


@app.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def run(ctx: typer.Context) -> None:
    """Become ``python -m emp.agent`` or ``python -m emp.controller`` with the same arguments."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", f"emp.{ctx.info_name}", *ctx.args])
