"""Leaving a migration early, losing the controller meanwhile, and asking for the way back."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from emp.model.errors import Conflict, OutcomeUnknown, Unavailable
from tests.unit.test_cli_canned import BLACKOUT, COMPLETED, COPYING, ID, RUNS_THERE, WHOLE_WAY
from tests.unit.test_cli_pool import Controller, serving
from tests.unit.test_cli_run import POOL, Emp, ended, in_process, start_emp, wait_for


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    with serving(tmp_path, monkeypatch) as pool:
        yield pool


@pytest.fixture
def emp(capsys: pytest.CaptureFixture[str]) -> Emp:
    return in_process(capsys)


# ------------------------------------------------------------------ leaving early


def test_ctrl_c_detaches_and_says_how_to_come_back(pool: Controller) -> None:
    process = start_emp("migrate", "web")
    pool.push(COPYING)
    assert process.stdout is not None
    wait_for(lambda: pool.resumed, "the stream of events")
    while not process.stdout.readline().startswith("source brownout"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 130
    assert f"detached: migration {ID} of web goes on" in err
    assert f"emp --context {POOL} migration watch {ID}" in err
    assert f"emp --context {POOL} migration abort {ID}" in err
    assert "Traceback" not in err
    assert [request for request, _ in pool.told if request.endswith("/abort")] == []


def test_ctrl_c_with_json_is_json(pool: Controller) -> None:
    process = start_emp("migrate", "web", "--json")
    wait_for(lambda: pool.resumed, "the stream of events")
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, out) == (130, "")
    assert json.loads(err)["details"] == {"evm": "web", "migration": ID}


def test_ctrl_c_says_that_an_order_which_was_sent_goes_on(pool: Controller) -> None:
    with pool.slow_orders():
        process = start_emp("evm", "start", "web")
        wait_for(lambda: pool.told, "the order")
        process.send_signal(signal.SIGINT)
        code, out, err = ended(process)
    assert (code, out) == (130, "")
    assert err.startswith("interrupted\nPOST /v1/evms/web/start was sent, and goes on")


def test_ctrl_c_before_the_plan_is_there_says_where_to_look(pool: Controller) -> None:
    with pool.slow_orders():
        process = start_emp("migrate", "web")
        wait_for(lambda: pool.told, "the order")
        process.send_signal(signal.SIGINT)
        code, _, err = ended(process)
    assert code == 130
    assert err.splitlines() == [
        "the order was sent: EVM web may be migrating",
        f"  look: emp --context {POOL} migration list --evm web",
    ]


def test_nobody_reading_any_more_is_no_error(pool: Controller) -> None:
    process = start_emp("migrate", "web")
    pool.push(COPYING)
    assert process.stdout is not None and process.stdout.readline()
    process.stdout.close()
    pool.push(*WHOLE_WAY[1:])
    assert process.wait(60) == 141
    assert process.stderr is not None and process.stderr.read() == ""
    process.stderr.close()
    assert process.stdin is not None
    process.stdin.close()


# ------------------------------------------------------------------ the controller goes away


def test_a_controller_that_restarts_is_found_again_and_nothing_is_missed(pool: Controller) -> None:
    process = start_emp("migrate", "web")
    pool.push(COPYING)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("source brownout"):
        assert process.poll() is None
    pool.stop()
    assert "the migration goes on, trying again" in process.stdout.readline()
    pool.past += [BLACKOUT, RUNS_THERE]
    pool.start()
    assert "the controller is back" in process.stdout.readline()
    pool.push(COMPLETED)
    code, out, err = ended(process)
    assert (code, err) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines()[:3]] == ["blackout", "target brownout", ID]
    assert pool.resumed == [None, "1"]


def test_a_connection_that_breaks_is_made_again(pool: Controller) -> None:
    process = start_emp("migrate", "web", "--json")
    pool.push(COPYING)
    wait_for(lambda: pool.resumed, "the stream of events")
    pool.cut()
    wait_for(lambda: len(pool.resumed) == 2, "the stream of events again")
    pool.push(COMPLETED)
    code, out, err = ended(process)
    assert (code, json.loads(out)["outcome"], err) == (0, "completed", "")


def test_a_controller_that_stays_away_is_given_up_with_a_way_back(
    pool: Controller, emp: Emp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emp.cli.follow.PATIENCE_S", 0.3)
    pool.push(COPYING)

    def go_away() -> None:
        wait_for(lambda: pool.resumed, "the stream of events")
        pool.stop()

    stopper = threading.Thread(target=go_away)
    stopper.start()
    code, _, err = emp("migrate web")
    stopper.join()
    assert code == Unavailable.exit_code
    assert f"the migration goes on; watch it: emp migration watch {ID}" in err


# ------------------------------------------------------------------ abort


@pytest.fixture
def going(pool: Controller) -> Controller:
    """A pool whose EVM is migrating."""
    pool.migrations[ID] = COPYING
    pool.evms["web"] = pool.evms["web"].model_copy(update={"migration": ID})
    return pool


@pytest.mark.parametrize("which", ["web", ID])
def test_abort_says_that_the_evm_is_back(going: Controller, emp: Emp, which: str) -> None:
    code, out, err = emp(f"migration abort {which} --reason testing")
    assert (code, err) == (0, "")
    assert out == f"{ID}: web is back on n1, running; it stood still for 8 ms\n"
    assert (f"POST /v1/migrations/{ID}/abort", {"reason": "testing"}) in going.told


def test_abort_that_nobody_answers_says_where_to_look(going: Controller, emp: Emp) -> None:
    going.refusal = OutcomeUnknown("it may or may not go back: n1 cannot be reached", hint=f"emp agent abort {ID}")
    code, out, err = emp("migration abort web")
    assert (code, out) == (8, "")
    assert "n1 cannot be reached" in err
    assert f"emp agent abort {ID}; emp migration watch {ID}" in err


def test_abort_as_json(going: Controller, emp: Emp) -> None:
    code, out, err = emp("migration abort web --json")
    assert (code, json.loads(out)["outcome"], err) == (0, "aborted", "")


def test_a_refused_abort_passes_through(going: Controller, emp: Emp) -> None:
    going.refusal = Conflict(f"migration {ID} is committed: it only goes forward", field="migration", hint="wait")
    code, out, err = emp("migration abort web")
    assert (code, out) == (4, "") and "only goes forward" in err


def test_abort_of_an_evm_that_does_not_migrate(pool: Controller, emp: Emp) -> None:
    code, _, err = emp("migration abort web")
    assert code == 4 and "EVM web is not migrating" in err
    assert all(not request.startswith("POST") for request, _ in pool.told)
