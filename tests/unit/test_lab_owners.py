"""Who owned an EVM when, by the moments of the journals' records."""

from __future__ import annotations

import pytest

from emp.faults import Hit
from emp.lab.checkers import owners


def hits(*moments: tuple[float, str, str]) -> dict[str, list[Hit]]:
    """Moments: when, on which node, which record, with the side of its fsync at which it counts."""
    found: dict[str, list[Hit]] = {"n1": [], "n2": []}
    for at_s, node, point in moments:
        found[node].append(Hit(at_s=at_s, point=f"journal.{point}_fsync", action=""))
    return found


GIVEN, ACTIVATED = (1.0, "n1", "given.before"), (2.0, "n2", "activated.before")


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param([GIVEN, ACTIVATED], id="given away"),
        pytest.param([GIVEN, ACTIVATED, (3.0, "n2", "withdrawn.before"), (4.0, "n1", "own.after")], id="never run"),
        pytest.param([GIVEN, (3.0, "n2", "withdrawn.before"), (3.1, "n2", "withdrawn.after")], id="by its word"),
    ],
)
def test_one_owner_after_the_other(moments: list[tuple[float, str, str]]) -> None:
    assert owners.violations(owners.tenures("n1", hits(*moments))) == []


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param([ACTIVATED], id="not given"),
        pytest.param([GIVEN, ACTIVATED, (3.0, "n1", "own.after")], id="taken back"),
    ],
)
def test_two_owners(moments: list[tuple[float, str, str]]) -> None:
    assert len(owners.violations(owners.tenures("n1", hits(*moments)))) == 1


def test_a_target_that_withdraws_gives_the_source_its_evm_back() -> None:
    withdrawn = ((3.0, "n2", "withdrawn.before"), (3.1, "n2", "withdrawn.after"))
    for moments in ((GIVEN, *withdrawn), (GIVEN, ACTIVATED, *withdrawn), (GIVEN, *withdrawn, (4.0, "n1", "own.after"))):
        found = owners.tenures("n1", hits(*moments))
        assert [(found[-1].node, found[-1].since_s), len(owners.violations(found))] == [("n1", 3.1), 0]
    assert len(owners.tenures("n1", hits(*withdrawn))) == 1, "before the commit nothing was given"


def test_a_fence_ends_a_time() -> None:
    booted = hits((5.0, "n2", "own.after"))
    assert len(owners.violations(owners.tenures("n1", booted))) == 1
    assert owners.violations(owners.tenures("n1", booted, fenced=[(4.0, "n1")])) == []
