"""What a migration was, in the end: its stages and what they cost, in 80 columns; volumes that were moved, in 100."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from emp.cli.output import milliseconds, rate, seconds, size

if TYPE_CHECKING:
    from emp.model.addresses import AddressMove
    from emp.model.migration import Migration, Report, VolumeMove

_WIDTH = 80


def print_report(migration: Migration, *, verbose: bool = False) -> None:
    """Print the table; at a terminal apart from what is above, its names in bold."""
    lines = report_lines(migration, verbose=verbose)
    if sys.stdout.isatty():
        lines = ["", *(f"\033[1m{line}\033[0m" if index in (0, 2) else line for index, line in enumerate(lines))]
    print("\n".join(lines), flush=True)


def report_lines(migration: Migration, *, verbose: bool = False) -> list[str]:
    """Return two rows of five figures, each under its name, ``-`` where a stage was not reached; then what failed.

    ``verbose``: every check of what was monitored.
    """
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
    if report.frames_forwarded is not None:
        held = report.frames_held or 0
        lost = f", {report.frames_lost} lost" if report.frames_lost else ""
        lines.append(f"frames for the EVM: {held} held on the source, {report.frames_forwarded} forwarded in all{lost}")
    if report.connections_carried:
        lines.append(f"tracked connections: {report.connections_carried} made known to the target")
    if report.clock is not None:
        said, *more = report.clock.in_words
        lines += [f"guest clock: {said}", *more]
    if report.addresses is not None:
        lines.append(address_line(report.addresses))
    lines += volume_lines(report.volumes)
    return lines + watch_lines(report, all_checks=verbose)


def address_line(move: AddressMove) -> str:
    """Return what it took until the cloud sent to the target."""
    tries = f" in {move.tries} tries" if move.tries > 1 else ""
    least = "at least " if move.ipv6_gap_is_least else ""
    gap = "" if move.ipv6_gap_s is None else f"; those of IPv6 were nobody's for {least}{seconds(move.ipv6_gap_s)}"
    return f"the cloud reassigned {move.addresses} addresses within {seconds(move.reassign_s)}{tries}{gap}"


def volume_lines(moves: Sequence[VolumeMove]) -> list[str]:
    """Return a row for each volume that was moved: how long its I/O waited and for what, and what the relay carried."""
    if not moves:
        return []
    rows: list[tuple[str, ...]] = [("VOLUME", "I/O HELD", "HOLD", "DETACH", "ATTACH", "LAND", "RELAYED", "MEAN", "MAX")]
    for move in moves:
        steps_s = (move.hold_s, move.detach_s, move.attach_s, move.land_s)
        steps = (milliseconds(None if step_s is None else step_s * 1000) for step_s in steps_s)
        relayed = size(move.read_bytes + move.written_bytes)
        mean, longest = milliseconds(move.mean_ms), milliseconds(move.max_ms)
        rows.append((move.volume, milliseconds(move.held_ms), *steps, relayed, mean, longest))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join((row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:]))) for row in rows]
    return lines + [f"{move.volume} was moved in {move.tries} tries" for move in moves if move.tries > 1]


def watch_lines(report: Report, *, all_checks: bool = False) -> list[str]:
    """Return what was monitored: the check that failed, or with ``all_checks`` each one; else how many were well."""
    shown = [line for line in report.watch if all_checks or not line.ok]
    if not shown:
        return [f"monitored: {len(report.watch)} checks, all well"] if report.watch else []
    rows = [("MONITORED", "", "WORST SEEN", "ALLOWED")]
    rows += [(line.check, "ok" if line.ok else "NO", line.worst or "-", line.threshold) for line in shown]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    widths[2] = min(widths[2], _WIDTH - widths[0] - widths[1] - max(len(row[3]) for row in rows) - 6)
    return ["  ".join((*(_fit(cell, width) for cell, width in zip(row, widths, strict=False)), row[3])) for row in rows]


def _fit(text: str, width: int) -> str:
    return (text if len(text) <= width else f"{text[: width - 3]}...").ljust(width)
