"""How errors look: a block on stderr that says what, in which field, and what to do; with ``--json``, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from emp.model.errors import BadInput, EmpError

INTERRUPTED = 130
"""exit code after Ctrl-C, as shells have it"""
BROKEN_PIPE = 141
"""exit code when nobody reads the output any more, as of a program that dies of SIGPIPE"""


def show_error(error: EmpError, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(error.as_dict()), file=sys.stderr)
        return
    rows = [("error", error.message), ("field", error.field), ("hint", error.hint)]
    rows += [("also", _problem(problem)) for problem in error.details.get("problems", ())[1:]]
    red, plain = ("\033[1;31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    for label, text in rows:
        if text:
            first, *more = text.splitlines()
            colour = (red, plain) if label == "error" else ("", "")
            print(f"{colour[0]}{label}:{colour[1]}".ljust(7 + len("".join(colour))) + first, file=sys.stderr)
            for line in more:
                print(f"       {line}", file=sys.stderr)


def _problem(problem: dict[str, Any]) -> str:
    return f"{problem.get('field')}: {problem.get('reason')}"


def usage_error(error: Any, *, as_json: bool) -> int:
    """Show what the command line's parser says; return the exit code."""
    ctx = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    path = ctx.command_path if ctx else "emp"
    parameter = getattr(error, "param", None)
    field = (parameter.metavar or parameter.opts[0]) if parameter is not None else None
    show_error(BadInput(error.format_message(), field=field, hint=f"{path} --help"), as_json=as_json)
    return BadInput.exit_code
