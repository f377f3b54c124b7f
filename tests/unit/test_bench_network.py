"""What ``make bench-network`` makes of its runs: each demand has to fail once for figures that break it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from bench.network import in_turn
from bench.network_capture import Passed
from bench.network_figures import L2, VPC, Case, Run, Stream, cases, row, spread, table, verdict

GOOD = Run(
    rate_hz=1000, stream=Stream(4000, 0), at_rest=Stream(2000, 0), gap_ms=90.0, pause_ms=20.0, target_brownout_s=0.5,
    emulator_ms=68.0, frames_held=70, frames_forwarded=80, resets=0, stall_ms=120.0, ipv6_gap_s=0.1,
)  # fmt: skip
TOO_MUCH = {"stream": Stream(4000, 2641)}
"""of an address that is nobody's for 0.14 s"""


def case(name: str, driver: str = L2) -> Case:
    (found,) = (each for each in cases(driver) if each.name == name)
    return found


def rows(driver: str = L2, changed: Mapping[str, dict[str, Any]] = {}) -> list[dict[str, Any]]:
    """Three good runs of each case; ``changed``: case -> what two of its runs have instead."""
    made = []
    for each in cases(driver):
        other = replace(GOOD, **changed.get(each.name, {}))
        made.append(row(driver, each, [GOOD, other, other]))
    return made


def broken(made: Sequence[dict[str, Any]], driver: str = L2) -> list[str]:
    return [what for what, ok, _ in verdict(made, cases(driver)) if not ok]


def test_what_is_lost_over_ipv6_is_told_and_not_forbidden() -> None:
    lossy = {"stream": Stream(4000, 2600), "gap_ms": 200.0, "emulator_ms": None, "ipv6_gap_s": 0.14}
    made = rows(VPC, {"udp-1k-ipv6": lossy})
    assert broken(made, VPC) == []
    (mine,) = (each for each in made if each["case"] == "udp-1k-ipv6")
    assert (mine["lost"], mine["ipv6_gap_s"]["worst"]) == (5200, 0.14)
    assert mine["ipv6_lost_over_gap_s"] == 2.46
    for wrong in ({"resets": 1}, {"unanswered": 1}, {"stream": Stream(4000, 150, duplicated=1)}, TOO_MUCH):
        found = broken(rows(VPC, {"udp-1k-ipv6": lossy | wrong}), VPC)
        assert [what for what in found if "udp-1k-ipv6" in what], wrong
    mine["ipv6_gap_s"] = mine["ipv6_lost_over_gap_s"] = None
    assert broken(made, VPC) == ["udp-1k-ipv6: nobody's for", "udp-1k-ipv6: lost <= that + 2 + 0.5 s"]


@pytest.mark.parametrize("driver", [L2, VPC])
def test_good_figures_meet_every_demand(driver: str) -> None:
    assert broken(rows(driver), driver) == []


@pytest.mark.parametrize(
    ("name", "update", "demand"),
    [
        ("udp-1k", {"stream": Stream(4000, 1)}, "udp-1k: lost 0, duplicated 0"),
        ("udp-1k", {"stream": Stream(4000, 0, duplicated=1)}, "udp-1k: lost 0, duplicated 0"),
        ("udp-1k", {"gap_ms": 120.1, "emulator_ms": 100.0}, "median gap <= pause + 100 ms"),
        ("udp-1k", {"gap_ms": 94.0}, "rest of the gap <= 5 ms"),
        ("udp-1k", {"emulator_ms": None}, None),
        ("udp-one-way", {"stream": Stream(100_000, 1)}, "udp-one-way: lost 0"),
        ("udp-echo", {"stream": Stream(100_000, 0, reordered=160)}, "udp-echo: reordered"),
        ("tcp-1000", {"resets": 1}, "tcp-1000: TCP resets 0"),
        ("tcp-100", {"unanswered": 1}, "tcp-100: all answer"),
        ("tcp-bulk", {"wrong": 1}, "tcp-bulk: all answer after it, rightly"),
        ("tcp-bulk", {"stall_ms": 340.2}, "tcp-bulk: stall <= gap + 250 ms"),
        ("pods-100", {"target_brownout_s": 0.76}, "target brownout of 100 pods"),
        ("pods-10", {"unanswered": 1}, "pods-10: all answer"),
        ("tcp-1", {"violations": ("n1 sent 1 frames",)}, "tcp-1: who spoke when"),
    ],
)
def test_one_figure_too_bad_breaks_its_demand_alone(name: str, update: dict[str, Any], demand: str | None) -> None:
    found = broken(rows(changed={name: update}))
    assert len(found) == (demand is not None)  # the rest of one run that is known is enough for a median
    assert all(demand in what for what in found if demand)


def test_a_pod_may_lose_a_packet_on_l2_and_not_on_vpc() -> None:
    lossy = {"stream": Stream(8000, 1)}
    assert broken(rows(changed={"pods-100": lossy})) == []
    assert broken(rows(VPC, {"pods-100": lossy}), VPC) == ["pods-100: lost 0"]


def test_what_was_chosen_and_not_measured_does_not_hold() -> None:
    assert len(broken([])) == len(cases(L2))
    unsplit = [row(L2, case("udp-1k"), [replace(GOOD, emulator_ms=None)])]
    assert [what for what, ok, _ in verdict(unsplit, [case("udp-1k")]) if not ok] == ["udp-1k: rest of the gap <= 5 ms"]
    nothing = [row(L2, case("udp-1k"), [replace(GOOD, stream=Stream(0, 0))])]
    assert "lost 0" in next(what for what, ok, _ in verdict(nothing, [case("udp-1k")]) if not ok)


def test_a_row_has_sums_of_counts_and_the_split_of_each_run() -> None:
    slow = replace(GOOD, gap_ms=200.0, pause_ms=25.0, emulator_ms=172.0, stream=Stream(4000, 2, 1, 3), stall_ms=260.0)
    made = row(L2, case("udp-1k"), [GOOD, slow, GOOD])
    assert {"sent": 12_000, "lost": 2, "duplicated": 1, "reordered": 3, "tcp_resets": 0}.items() <= made.items()
    assert made["gap_ms"] == {"median": 90.0, "p99": 200.0, "worst": 200.0}
    assert made["split_ms"] == {"pause": 20.0, "emulator": 68.0, "rest": 2.0}
    assert (made["tcp_stall_ms"], made["tcp_stall_over_gap_ms"]) == (260.0, 60.0)
    assert (made["frames_held"], made["frames_forwarded"]) == (210, 240)
    unknown = row(L2, case("udp-1k"), [replace(GOOD, frames_held=None, resets=None, stall_ms=None)])
    assert (unknown["frames_held"], unknown["tcp_resets"], unknown["tcp_stall_ms"]) == (None, None, None)


def test_the_99th_percentile_of_a_hundred_leaves_the_worst_out() -> None:
    assert spread([float(number) for number in range(1, 101)]) == {"median": 50.5, "p99": 99.0, "worst": 100.0}


def test_the_emulators_share_begins_when_the_guest_runs_and_has_a_request() -> None:
    waiting = Passed(to_guest_s=[9.9, 10.2], from_guest_s=[9.99, 10.05, 10.06])
    assert waiting.emulator_ms(10.0) == pytest.approx(50)
    late = Passed(to_guest_s=[10.03], from_guest_s=[10.05])
    assert late.emulator_ms(10.0) == pytest.approx(20), "what it waited for a request is the rest's"
    assert Passed(to_guest_s=[9.9], from_guest_s=[9.99]).emulator_ms(10.0) is None
    assert Passed(from_guest_s=[10.05]).emulator_ms(10.0) is None


def test_on_vpc_the_fast_streams_may_be_slower_but_not_below_5_khz() -> None:
    assert [case(name).rates_hz for name in ("udp-one-way", "udp-echo", "udp-1k")] == [(20_000,), (10_000,), (1000,)]
    for name in ("udp-one-way", "udp-echo"):
        assert case(name, VPC).rates_hz == (20_000, 10_000, 5000)


def test_each_case_gets_its_runs_in_turn() -> None:
    order = in_turn(cases(L2), 4)
    assert all(order.count(each) == 4 for each in cases(L2))
    assert order[: len(cases(L2))] == list(cases(L2)) == order[len(cases(L2)) : 2 * len(cases(L2))][::-1]


def test_the_table_fits_and_shows_unknown_figures_as_such() -> None:
    console = Console(width=150, record=True, force_terminal=False)
    made = [row(L2, each, [replace(GOOD, frames_held=None, emulator_ms=None)]) for each in cases(L2)]
    console.print(table(made))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 150
    assert len([line for line in lines if "-/80" in line]) == len(cases(L2))
