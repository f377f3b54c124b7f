"""What verbs print: models as JSON, tables, and lines. Colours and wrapping at a terminal alone."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel


def print_json(value: BaseModel | dict[str, Any]) -> None:
    """Print one document: on one line, unless at a terminal."""
    indent = 2 if sys.stdout.isatty() else None
    text = json.dumps(value, indent=indent) if isinstance(value, dict) else value.model_dump_json(indent=indent)
    print(text, flush=True)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str) -> None:
    """Print rows under their headers, as wide as they are; at a terminal what does not fit is wrapped."""
    if not rows:
        print(empty)
        return
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*headers, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console(highlight=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in (headers, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_facts(facts: Sequence[tuple[str, str | None]]) -> None:
    """Print ``name  value`` lines, the names aligned, without those that have no value."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        for index, line in enumerate((value or "").splitlines()):
            print(f"{'' if index else name:{width}}  {line}")


def print_hanging(begin: str, text: str) -> None:
    """Print ``text`` behind ``begin``; at a terminal, what does not fit goes on below itself."""
    if not sys.stdout.isatty():
        print(f"{begin}{text}")
        return
    import shutil
    import textwrap

    room = max(20, shutil.get_terminal_size().columns - len(begin))
    for index, line in enumerate(textwrap.wrap(text, room, break_on_hyphens=False)):
        print(f"{' ' * len(begin) if index else begin}{line}")


def clock(at_s: float) -> str:
    """Return a wall-clock time for people: today's without the date."""
    if not at_s:
        return "-"
    then, now = time.localtime(at_s), time.localtime()
    return time.strftime("%H:%M:%S" if then[:3] == now[:3] else "%Y-%m-%d %H:%M", then)


def seconds(value_s: float | None) -> str:
    if value_s is None:
        return "-"
    if value_s >= 120:
        minutes, rest_s = divmod(round(value_s), 60)
        return f"{minutes} min {rest_s} s" if rest_s else f"{minutes} min"
    return f"{value_s:.3g} s" if value_s < 100 else f"{value_s:.0f} s"


def milliseconds(value_ms: float | None) -> str:
    if value_ms is None:
        return "-"
    return f"{value_ms:.3g} ms" if value_ms < 1000 else seconds(value_ms / 1000)


def size(value_bytes: float | None) -> str:
    from emp.model.names import format_size

    return "-" if value_bytes is None else format_size(value_bytes)


def rate(value_bytes_per_s: float | None) -> str:
    return "-" if value_bytes_per_s is None else f"{size(value_bytes_per_s)}/s"
