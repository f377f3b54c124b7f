"""Plays the cells of the fault matrix on a real pool: ``make test-faults`` all of them, ``make test`` a few.

Each cell holds a migration at its point, breaks something, lets go, heals the pool, and then asks two things: did it
end as the matrix says, and has any checker seen a violation on the way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest

from tests.fault.breaks import BLACKOUT_DEADLINE_S, LATE_S
from tests.fault.matrix import Cell, cells, missing, not_applicable
from tests.fault.record import SHOWN, FaultRecord
from tests.fault.stage import HEALED_S, SLOW_BYTES_PER_S, Stage, Stages, until

LASTING_S = 2 * LATE_S
"""how long a fault that heals with the pool alone lasts"""
POLICY = {
    "blackout_deadline_s": BLACKOUT_DEADLINE_S, "max_bandwidth_bytes_per_s": SLOW_BYTES_PER_S, "deadline_s": 30.0,
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each cell that was chosen by ``--faults``."""
    if "cell" in metafunc.fixturenames:
        everything = metafunc.config.getoption("faults") == "all"
        chosen = [cell for cell in cells() if everything or cell.quick]
        metafunc.parametrize("cell", chosen, ids=lambda cell: cell.name)


def at_rest(stage: Stage) -> bool:
    """Whether the EVM runs on one node alone and its migration is over, as far as that can be known now."""
    ended = stage.ended
    return stage.runs_alone() is not None and (ended is None or ended.outcome is not None)


def play(stage: Stage, cell: Cell) -> str:
    """Return how it ended; raise ``AssertionError`` where a point was not reached or the pool did not recover."""
    with cell.setup(stage):
        cell.hold.arm(stage)
        stage.begin(**{**POLICY, **cell.policy})
        cell.hold.wait(stage)
    script = cell.breaks(stage)
    next(script)
    cell.hold.release(stage)
    assert next(script, "over") == "over"
    waited = True
    with contextlib.suppress(AssertionError):
        until(lambda: at_rest(stage), "it comes to rest", timeout_s=LATE_S if cell.waits else LASTING_S)
        waited = False
    stage.heal()
    with contextlib.suppress(AssertionError):
        until(lambda: not stage.settled(), "the pool is whole", timeout_s=HEALED_S)
    if left := stage.settled():
        raise AssertionError(f"{HEALED_S:.0f} s after it was healed: {'; '.join(left)}")
    if cell.waits and not waited:
        raise AssertionError("it did not wait for the party that was missing")
    return stage.outcome()


@pytest.mark.timeout(180)
def test_cell(
    stages: Stages,
    cell: Cell,
    fault_record: FaultRecord,
    record_property: Callable[[str, object], None],
    pytestconfig: pytest.Config,
) -> None:
    began_s = time.monotonic()
    stage = stages.whole()
    seen, why, found = "?", "", dict[str, list[str]]()
    try:
        with stage.playing():
            seen = play(stage, cell)
            found = {checker: wrong for checker, wrong in stage.violations().items() if wrong}
    except Exception as error:  # noqa: BLE001 - whatever it was, the cell has failed, and the next one is played
        why = f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            found = {c: wrong for c, wrong in stage.violations().items() if wrong and c != "end state"}
    passed = not why and not found and seen in cell.expected
    seconds = time.monotonic() - began_s
    fault_record.cells[cell.name] = {
        "expected": cell.expected, "seen": seen, "passed": passed, "seconds": round(seconds, 1), "why": why,
        "violations": sum(map(len, found.values())), "found": found, "pending": cell.pending, "note": cell.note,
    }  # fmt: skip
    record_property(SHOWN, f"expected {cell.expected:2} seen {seen} {seconds:5.1f} s  {why[:300]} {found or ''}")
    if not passed:
        stage.keep_logs(pytestconfig.rootpath / "build" / "faults" / cell.name)
        stages.discard()
        pytest.fail(f"{cell.name}: expected {cell.expected}, seen {seen}. {why} {found or ''}", pytrace=False)


def test_the_matrix_is_whole() -> None:
    """Every cell of the matrix is played, or is listed with the reason why it is not."""
    names = [cell.name for cell in cells()]
    assert len(names) == len(set(names))
    assert not {f"F{cell.row}.{cell.column}" for cell in cells()} & set(not_applicable())
    assert missing() == []


def test_the_quick_selection_has_each_column_and_where_two_could_run() -> None:
    quick = {f"{cell.row}.{cell.column}" for cell in cells() if cell.quick}
    assert {"4.H", "5.M", "9.D", "9.M", "16.D", "3.M"} <= quick
    assert {name.split(".")[1] for name in quick} == set("BPDHMT")
