"""What a migration in the lab looks like in ``build/demo.json`` and in the closing table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from emp.model.migration import Migration
from emp.model.names import format_size

CHECKS = {
    "same_addresses": "every IP address has the MAC that it had, at the controller and on the wire",
    "same_boot": "EVM and pod are the boot that they were, and their counters only grew",
    "memory_intact": "every page of the rewritten memory holds what was written last",
    "tcp_alive": "the TCP connections to EVM and pod are the ones opened at the start",
    "volume_intact": "every acknowledged record is on the volume, in an unbroken chain",
    "nothing_left": "no process, namespace, interface, mount or file is left on this machine",
}


@dataclass(frozen=True)
class Move:
    """One migration as pool, user and client saw it."""

    migration: Migration
    wall_s: float
    """from the start to the end of ``emp migrate``"""
    windows: Mapping[str, Mapping[str, Any]]
    """``evm``, ``pod`` -> the prober's UDP figures for the time of the migration"""


def overhead_s(move: Move) -> float | None:
    """Return the wall time of ``emp migrate`` less QEMU's own total time less the target brownout."""
    report = move.migration.report
    if report.qemu_total_ms is None or report.stages.target_brownout_s is None:
        return None
    return move.wall_s - report.qemu_total_ms / 1000 - report.stages.target_brownout_s


def entry(move: Move) -> dict[str, Any]:
    """Return the migration as it stands in ``demo.json`` and ``idle.json``; figures that are not known are null."""
    migration, report = move.migration, move.migration.report
    return {
        "evm": migration.evm,
        "source": migration.source,
        "target": migration.target,
        "outcome": migration.outcome,
        "stages": report.stages.model_dump(),
        "vcpu_pause_ms": report.vcpu_pause_ms,
        "qemu_downtime_ms": report.qemu_downtime_ms,
        "network_gap_ms": {name: figures["gap_ms"] for name, figures in move.windows.items()},
        "packets": {
            name: {key: figures[key] for key in ("sent", "lost", "duplicated")}
            for name, figures in move.windows.items()
        },
        "memory_bytes": report.memory_bytes,
        "sent_bytes": report.sent_bytes,
        "passes": report.passes,
        "overhead_s": rounded(overhead_s(move), 3),
    }


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def closing_table(moves: Sequence[Move]) -> Table:
    """Return one column per migration, stage by stage."""
    table = Table("", *(f"{move.migration.source} -> {move.migration.target}" for move in moves), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    entries = [entry(move) for move in moves]

    def row(name: str, values: Sequence[str]) -> None:
        table.add_row(name, *values)

    row("source brownout", [_seconds(one["stages"]["source_brownout_s"]) for one in entries])
    row("blackout", [_ms(one["stages"]["blackout_ms"]) for one in entries])
    row("target brownout", [_seconds(one["stages"]["target_brownout_s"]) for one in entries])
    row("vCPUs paused", [_ms(one["vcpu_pause_ms"]) for one in entries])
    row("QEMU's own downtime", [_ms(one["qemu_downtime_ms"]) for one in entries])
    for name in moves[0].windows if moves else ():
        label = {"evm": "EVM", "pod": "pod"}.get(name, name)
        row(f"longest gap, {label}", [_ms(one["network_gap_ms"][name]) for one in entries])
        row(
            f"packets lost, {label}",
            [f"{one['packets'][name]['lost']} of {one['packets'][name]['sent']}" for one in entries],
        )
    row("memory sent", [_sent(one) for one in entries])
    row("overhead", [_seconds(one["overhead_s"]) for one in entries])
    return table


def _sent(one: Mapping[str, Any]) -> str:
    if one["sent_bytes"] is None:
        return "-"
    return f"{format_size(one['sent_bytes'])} in {one['passes'] if one['passes'] is not None else '?'} passes"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
