"""The soak's own verdict: it must see a violation, a leak and growth, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fault.matrix import cells
from tests.fault.soak import Run, Soak, drawable

MIB = 1 << 20


def soaked(*, wrong: str | None = None, growth_bytes: int = 0, leak: int = 0, connected: int = 0) -> Soak:
    """Forty migrations; what is given goes wrong in the last quarter."""
    soak = Soak(seed=7, rests=[{"agent of n1": 5, "agent of n2": 3}, {"agent of n1": 4, "agent of n2": 4 + connected}])
    for number in range(40):
        late = number >= 30
        soak.runs.append(
            Run(
                "F1.H-1s",
                "C",
                [wrong] if wrong and number == 35 else [],
                {"agent of n1": 60 * MIB + number % 3 * MIB + (growth_bytes if late else 0)},
                {"agent of n1": 20 + number % 4 + (leak if late else 0)},
                {"agent of n1": 5 + number % 2},
            )
        )
    return soak


def test_a_sound_soak_holds() -> None:
    record = soaked().record()
    assert (record["held"], record["violations"], record["outcomes"]) == (True, 0, {"C": 40})
    assert record["rss"]["agent"]["second_quarter_bytes"] == 61 * MIB


@pytest.mark.parametrize("bad", [{"wrong": "two copies ran"}, {"growth_bytes": 5 * MIB}, {"leak": 1}, {"connected": 1}])
def test_what_is_planted_is_seen(bad: dict[str, Any]) -> None:
    assert not soaked(**bad).record()["held"]


def test_no_cell_is_drawn_after_which_the_guest_is_another() -> None:
    drawn = drawable()
    assert len(drawn) > 60
    assert all("K" not in cell.expected for cell in drawn)
    assert {cell.row for cell in cells()} - {cell.row for cell in drawn} >= {25, 26, 28, 29}
