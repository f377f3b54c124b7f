"""What ``make bench-volumes`` makes of its runs: each demand has to fail once for figures that break it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from bench.volumes import CASES, in_turn
from bench.volumes_figures import BUSY, CLASSIC, GP3, IDLE, IO2, Case, Run, row, verdict

CLOUD_MS = 7000.0
GOOD = {
    Case(IO2, 1, BUSY, 3): Run(20.0, 90.0, 15.0, 0.3, 4.8, stall_ms=40.0, journal_hz=50.0),
    Case(IO2, 16, BUSY, 3): Run(40.0, 90.0, 30.0, 0.3, 4.8, stall_ms=60.0, journal_hz=50.0),
    Case(GP3, 1, BUSY, 3): Run(22.0, 95.0, 15.0, 0.3, 7.6, stall_ms=7300.0, journal_hz=50.0),
    Case(CLASSIC, 1, BUSY, 3): Run(7200.0, 7250.0, 15.0, 0.3, 0.3, stall_ms=7200.0, journal_hz=50.0),
}


def broken(found: Sequence[tuple[str, bool, str]]) -> list[str]:
    return [what for what, ok, _ in found if not ok]


def rows(**changed: tuple[str, int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Three runs of each case; ``changed``: (case, its number of volumes, what all but the first run have instead)."""
    made = []
    for case, run in GOOD.items():
        update = next(
            (new for name, volumes, new in changed.values() if (name, volumes) == (case.name, case.volumes)), {}
        )
        made.append(row(case, [run, *[replace(run, **update)] * 2]))
    return made


def test_good_figures_meet_every_demand() -> None:
    assert broken(verdict(rows(), CLOUD_MS)) == []


@pytest.mark.parametrize(
    ("name", "volumes", "update", "demand"),
    [
        (GP3, 1, {"vcpu_pause_ms": 26.1}, "1.3 x"),
        (IO2, 16, {"vcpu_pause_ms": 50.1}, "2.5 x"),
        (GP3, 1, {"stall_ms": 7500.1}, "worst I/O stall <= 7.5 s"),
        (CLASSIC, 1, {"vcpu_pause_ms": 6999.0}, "median pause >= 7 s"),
        (IO2, 1, {"io_errors": 1}, "I/O errors"),
        (GP3, 1, {"acked_lost": 1}, "records lost"),
    ],
)
def test_one_figure_too_bad_breaks_its_demand_alone(
    name: str, volumes: int, update: dict[str, Any], demand: str
) -> None:
    (found,) = broken(verdict(rows(one=(name, volumes, update)), CLOUD_MS))
    assert demand in found


def test_the_worst_stall_counts_and_one_run_is_enough_for_it() -> None:
    case, good = next((case, run) for case, run in GOOD.items() if case.name == GP3)
    made = [each for each in rows() if each["case"] != GP3]
    made.append(row(case, [*[good] * 14, replace(good, stall_ms=7600.0)]))
    (found,) = broken(verdict(made, CLOUD_MS))
    assert "worst I/O stall" in found


def test_what_was_not_measured_does_not_hold() -> None:
    assert len(broken(verdict([], CLOUD_MS))) == 6
    idle = row(Case(IO2, 1, IDLE, 1), [Run(20.0, 90.0, 15.0, 0.3, 4.8)])
    assert idle["io_stall_ms"] is None
    assert len(broken(verdict([idle], CLOUD_MS))) == 6


def test_a_row_has_medians_the_worst_stall_sums_of_counts_and_the_steps_of_each_move() -> None:
    step: dict[str, float | None] = {"hold_s": 0.1, "detach_s": 4.6, "attach_s": 2.6, "land_s": 0.1}
    run = Run(20.0, 90.0, 15.0, 0.3, 7.6, stall_ms=7300.0, io_errors=1, steps=(step, step | {"detach_s": None}))
    made = row(Case(GP3, 2, BUSY, 3), [run, replace(run, vcpu_pause_ms=30.0, stall_ms=7400.0), run])
    assert (made["vcpu_pause_ms"], made["io_errors"], made["runs"]) == (20.0, 3, 3)
    assert made["io_stall_ms"] == {"median": 7300.0, "worst": 7400.0}
    assert made["steps"]["detach_s"] == {"median": 4.6, "worst": 4.6}
    assert made["spread"]["vcpu_pause_ms"] == [20.0, 20.0, 25.0]


def test_every_run_has_its_turn_and_the_two_sides_lead_by_turns() -> None:
    order = in_turn(CASES)
    assert {case: order.count(case) for case in CASES} == {case: case.runs for case in CASES}
    sides = [case.name for case in order if (case.volumes, case.io) == (1, BUSY) and case.name in (IO2, GP3)]
    assert sides[:4] == [IO2, GP3, GP3, IO2]
