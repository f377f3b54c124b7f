"""The closing table of migrations in the lab, and what the demo checks. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from emp.lab.moves import Move, entry
from emp.model.names import format_size

CHECKS = {
    "same_addresses": "each IP with its MAC, at the controller and on the wire",
    "same_boot": "EVM and pod as booted, their counters only grew",
    "memory_intact": "each rewritten page holds what was written last",
    "tcp_alive": "the TCP connections are those of the start",
    "volume_intact": "each acknowledged record is there, in one chain",
    "nothing_left": "no process, namespace, link, mount or file",
}


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
    for name in entries[0]["packets"] if entries else ():
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
