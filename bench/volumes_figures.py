"""What ``bench.volumes`` makes of its runs: a row per case, a verdict, tables. No lab, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

IO2, GP3, CLASSIC = "io2", "gp3 resume-first", "gp3 classic"
IDLE, BUSY = "idle", "busy"
SEED = {IO2: "0 s", GP3: "~7 s", CLASSIC: "~7 s"}
"""blackout that volumes cost, as the seed of this project states it; it has one order for gp3"""
PAUSE_RATIO = 1.3
"""gp3's median pause may be so many times io2's"""
MANY, MANY_RATIO = 16, 2.5
"""the median pause of so many io2 volumes under I/O may be so many times that of one"""
STALL_SLACK_MS = 500.0
"""above what the cloud takes to detach and attach"""
STEPS = ("hold_s", "detach_s", "attach_s", "land_s")

FIGURES = (
    "runs",
    "vCPU pause ms\n(quartiles)",
    "seed's\nblackout",
    "network\ngap ms",
    "I/O stall\nmedian ms",
    "worst ms",
    "source\nbrownout s",
    "target\nbrownout s",
    "I/O\nerrors",
    "lost",
)


@dataclass(frozen=True)
class Case:
    name: str
    volumes: int
    io: str
    runs: int

    def __str__(self) -> str:
        return f"{self.name}, {self.volumes}, {self.io}"


@dataclass(frozen=True)
class Run:
    """One migration. ``steps``: of each single-attach volume's move, as in ``emp.model.migration.VolumeMove``."""

    vcpu_pause_ms: float
    network_gap_ms: float
    qemu_downtime_ms: float
    source_brownout_s: float
    target_brownout_s: float
    stall_ms: float | None = None
    """worst of all volumes; None: nothing was written"""
    io_errors: int = 0
    acked_lost: int = 0
    journal_hz: float | None = None
    """records a second and volume that the guest has written until the end of the migration"""
    steps: tuple[dict[str, float | None], ...] = ()


def row(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the figures of one case: medians, unless they say worst, or are counts, which are sums."""
    stalls = [run.stall_ms for run in runs if run.stall_ms is not None]
    rates = [run.journal_hz for run in runs if run.journal_hz is not None]
    stall = {"median": round(statistics.median(stalls), 1), "worst": round(max(stalls), 1)} if stalls else None
    return {
        "case": case.name,
        "volumes": case.volumes,
        "io": case.io,
        "runs": len(runs),
        "vcpu_pause_ms": _median(run.vcpu_pause_ms for run in runs),
        "network_gap_ms": _median(run.network_gap_ms for run in runs),
        "io_stall_ms": stall,
        "source_brownout_s": _median(run.source_brownout_s for run in runs),
        "target_brownout_s": _median(run.target_brownout_s for run in runs),
        "io_errors": sum(run.io_errors for run in runs),
        "acked_lost": sum(run.acked_lost for run in runs),
        "qemu_downtime_ms": _median(run.qemu_downtime_ms for run in runs),
        "journal_hz": _median(rates) if rates else None,
        "spread": {
            "vcpu_pause_ms": spread([run.vcpu_pause_ms for run in runs]),
            "network_gap_ms": spread([run.network_gap_ms for run in runs]),
            "io_stall_ms": spread(stalls),
        },
        "steps": {
            step: {"median": round(statistics.median(took), 3), "worst": round(max(took), 3)}
            for step in STEPS
            if (took := [moved for run in runs for move in run.steps if (moved := move[step]) is not None])
        },
    }


def spread(figures: Sequence[float]) -> list[float] | None:
    """Return the quartiles; None for fewer than two figures."""
    if len(figures) < 2:
        return None
    return [round(quartile, 1) for quartile in statistics.quantiles(figures, n=4, method="inclusive")]


def _median(figures: Iterable[float]) -> float:
    return round(statistics.median(figures), 3)


def verdict(rows: Sequence[dict[str, Any]], cloud_ms: float) -> list[tuple[str, bool, str]]:
    """Return (what is demanded, whether it is so, the figures). ``cloud_ms``: to detach and to attach a volume.

    What was not measured does not hold.
    """
    found: list[tuple[str, bool, str]] = []
    one, gp3, many = (_row(rows, name, number) for name, number in ((IO2, 1), (GP3, 1), (IO2, MANY)))
    found.append(_ratio(f"{GP3}: median pause <= {PAUSE_RATIO:g} x io2's", gp3, one, PAUSE_RATIO))
    found.append(_ratio(f"{MANY} io2: median pause <= {MANY_RATIO:g} x of one", many, one, MANY_RATIO))
    bound_ms = cloud_ms + STALL_SLACK_MS
    stalls = [each["io_stall_ms"]["worst"] for each in rows if each["case"] == GP3 and each["io_stall_ms"]]
    figures = f"{max(stalls) / 1000:.2f} s" if stalls else "not measured"
    found.append(
        (f"{GP3}: worst I/O stall <= {bound_ms / 1000:g} s", bool(stalls) and max(stalls) <= bound_ms, figures)
    )
    classic = [each["vcpu_pause_ms"] for each in rows if each["case"] == CLASSIC]
    figures = f"{min(classic) / 1000:.2f} s" if classic else "not measured"
    found.append(
        (f"{CLASSIC}: median pause >= {cloud_ms / 1000:g} s", bool(classic) and min(classic) >= cloud_ms, figures)
    )
    for name, what in (("io_errors", "I/O errors in the guest"), ("acked_lost", "acknowledged records lost")):
        total = sum(each[name] for each in rows)
        written = any(each["io_stall_ms"] for each in rows)
        found.append((f"no {what}", written and total == 0, str(total) if written else "not measured"))
    return found


def _row(rows: Sequence[dict[str, Any]], name: str, volumes: int) -> dict[str, Any] | None:
    wanted = (name, volumes, BUSY)
    return next((each for each in rows if (each["case"], each["volumes"], each["io"]) == wanted), None)


def _ratio(what: str, mine: dict[str, Any] | None, other: dict[str, Any] | None, bound: float) -> tuple[str, bool, str]:
    if mine is None or other is None:
        return what, False, "not measured"
    ratio = mine["vcpu_pause_ms"] / other["vcpu_pause_ms"]
    runs = f"{mine['runs']} and {other['runs']} runs"
    return what, ratio <= bound, f"{mine['vcpu_pause_ms']:.1f} / {other['vcpu_pause_ms']:.1f} ms = {ratio:.2f}; {runs}"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table("case", "volumes", "I/O", box=None)
    for name in FIGURES:
        made.add_column(name, justify="right")
    for each in rows:
        quartiles, stall = each["spread"]["vcpu_pause_ms"], each["io_stall_ms"]
        between = f" ({quartiles[0]:.0f}-{quartiles[2]:.0f})" if quartiles else ""
        made.add_row(
            each["case"],
            str(each["volumes"]),
            each["io"],
            str(each["runs"]),
            f"{each['vcpu_pause_ms']:.1f}{between}",
            SEED[each["case"]],
            f"{each['network_gap_ms']:.0f}",
            *((f"{stall['median']:.0f}", f"{stall['worst']:.0f}") if stall else ("", "")),
            f"{each['source_brownout_s']:.2f}",
            f"{each['target_brownout_s']:.2f}",
            str(each["io_errors"]),
            str(each["acked_lost"]),
        )
    return made


def steps_table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(
        "case", "volumes", "I/O", "QEMU's downtime ms", *(f"{step[:-2]} s (worst)" for step in STEPS), box=None
    )
    for column in made.columns[3:]:
        column.justify = "right"
    for each in rows:
        took = (each["steps"].get(step) for step in STEPS)
        times = (f"{one['median']:.2f} ({one['worst']:.2f})" if one else "" for one in took)
        made.add_row(each["case"], str(each["volumes"]), each["io"], f"{each['qemu_downtime_ms']:.0f}", *times)
    return made
