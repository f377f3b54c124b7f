"""How migrations in the lab are written down: by the demo, and condensed by the bench."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console

from bench import idle
from emp.lab.demo_report import closing_table
from emp.lab.moves import Move, entry
from emp.lab.probing import window
from emp.model.migration import Migration, Outcome, Report, StageTimes


def migration(**figures: Any) -> Migration:
    return Migration(
        id="m-1", evm="web", source="n1", target="n2", epoch_target=2, epoch_source=3, outcome=Outcome.COMPLETED,
        report=Report(**figures),
    )  # fmt: skip


def prober_report(gap_ms: float, lost: int) -> dict[str, Any]:
    figures = {"name": "w", "gap_ms": gap_ms, "sent": 1000, "lost": lost, "duplicated": 0, "received": 1000 - lost}
    return {"targets": {name: {"udp": {"windows": [{"name": "start"}, figures]}} for name in ("evm", "pod")}}


def moved(gap_ms: float = 50.0, lost: int = 3, **figures: Any) -> Move:
    made = Move(migration(**figures), wall_s=2.5, window="w")
    made.read_windows(prober_report(gap_ms, lost))
    return made


def test_overhead_is_what_neither_qemu_nor_the_target_brownout_took() -> None:
    known = moved(qemu_total_ms=1500.0, stages=StageTimes(target_brownout_s=0.25))
    assert entry(known)["overhead_s"] == 0.75
    assert entry(moved())["overhead_s"] is None


def test_figures_come_from_the_migrations_own_window() -> None:
    written = entry(moved(gap_ms=61.5, lost=7))
    assert written["network_gap_ms"] == {"evm": 61.5, "pod": 61.5}
    assert written["packets"]["pod"] == {"sent": 1000, "lost": 7, "duplicated": 0}
    assert window(prober_report(1, 1), "evm", "start") == {"name": "start"}


def test_the_table_fits_and_shows_unknown_figures_as_such() -> None:
    console = Console(width=80, record=True, force_terminal=False)
    console.print(closing_table([moved(), moved(vcpu_pause_ms=12.34, sent_bytes=1 << 30, passes=4)]))
    text = console.export_text()
    assert "12.3 ms" in text
    assert "1 GiB in 4 passes" in text
    assert "3 of 1000" in text
    assert " - " in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_bench_condenses_runs_by_figure() -> None:
    stages = StageTimes(target_brownout_s=0.5)
    runs = [
        entry(
            moved(
                gap_ms=gap_ms,
                lost=lost,
                vcpu_pause_ms=pause_ms,
                qemu_downtime_ms=pause_ms - 5,
                qemu_total_ms=1000.0,
                stages=stages,
            )
        )
        for gap_ms, lost, pause_ms in ((80.0, 5, 9.0), (200.0, 90, 30.0), (70.0, 4, 8.0))
    ]
    median = idle.condensed(runs, statistics.median)
    assert median["vcpu_pause_ms"] == 9.0
    assert median["network_gap_ms"] == {"evm": 80.0}
    assert median["qemu_downtime_ms"] == 4.0
    assert median["packets"]["evm"] == {"lost": 5}
    assert median["overhead_s"] == 1.0
    worst = idle.condensed(runs, max)
    assert (worst["vcpu_pause_ms"], worst["packets"]["evm"]["lost"]) == (30.0, 90)
