"""The exhaustive check of the protocol, in every ``make test``: the worlds hold, and every mutant is found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.search.configurations import HOLD, LIMITS
from tests.search.mutants import MUTANTS
from tests.search.run import Results, run, table

RULES = {f"R{number}" for number in range(1, 13)}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    """Every search once, on all processors; the tables are printed for a reader."""
    found = run()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{table(found)}")
    yield found


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", range(len(HOLD)), ids=[one.name for one in HOLD])
def test_nothing_that_can_happen_breaks_the_protocol(results: Results, number: int) -> None:
    found = results.holds[number]
    assert found.wrong is None, "\n  ".join([found.wrong or "", *found.history])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", range(len(LIMITS)), ids=[one.name for one in LIMITS])
def test_a_limit_that_the_design_states_is_where_it_says(results: Results, number: int) -> None:
    assert results.limits[number].wrong is not None, f"no longer a limit: {LIMITS[number].expected}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("number", range(len(MUTANTS)), ids=[f"{one.rule}: {one.what}" for one in MUTANTS])
def test_a_rule_that_is_broken_on_purpose_is_found(results: Results, number: int) -> None:
    assert results.mutants[number].wrong is not None


def test_every_rule_has_a_mutant() -> None:
    assert {mutant.rule for mutant in MUTANTS} >= RULES
