"""What a migration was, in the end: its three stages and what they cost, as a table of at most 80 columns."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from emp.cli.output import milliseconds, rate, seconds, size

if TYPE_CHECKING:
    from emp.model.migration import Migration


def print_report(migration: Migration) -> None:
    """Print the table; at a terminal apart from what is above, its names in bold."""
    lines = report_lines(migration)
    if sys.stdout.isatty():
        lines = ["", *(f"\033[1m{line}\033[0m" if index in (0, 2) else line for index, line in enumerate(lines))]
    print("\n".join(lines), flush=True)


def report_lines(migration: Migration) -> list[str]:
    """Return two rows of five figures, each under its name; ``-`` where a stage was not reached."""
    report, stages = migration.report, migration.report.stages
    passes = "-" if report.passes is None else str(report.passes)
    columns = (
        (("source brownout", seconds(stages.source_brownout_s)), ("memory", size(report.memory_bytes))),
        (("blackout", milliseconds(stages.blackout_ms)), ("sent", size(report.sent_bytes))),
        (("target brownout", seconds(stages.target_brownout_s)), ("passes", passes)),
        (("vCPU pause", milliseconds(report.vcpu_pause_ms)), ("dirty rate", rate(report.dirty_bytes_per_s))),
        (("QEMU downtime", milliseconds(report.qemu_downtime_ms)), ("bandwidth", rate(report.bandwidth_bytes_per_s))),
    )
    lines: list[str] = []
    widths = [max(len(text) for row in column for text in row) for column in columns]
    for row in (0, 1):
        for part in (0, 1):
            cells = (column[row][part].rjust(width) for column, width in zip(columns, widths, strict=True))
            lines.append("  ".join(cells))
    if report.clock_error_ms is not None and report.vcpu_pause_ms is not None:
        lines.append(f"blackout and vCPU pause span two hosts' clocks: +-{milliseconds(report.clock_error_ms)}")
    if report.abort_pause_ms is not None:
        lines.append(f"the guest stood still for {milliseconds(report.abort_pause_ms)} before it went back")
    return lines
