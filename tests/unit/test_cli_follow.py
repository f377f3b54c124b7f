"""``emp migrate`` and ``emp migration watch``: what is seen meanwhile, and how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emp.cli.lines import step_text
from emp.model.errors import HostError, MigrationAborted
from emp.model.migration import Migration, MoveStep, Outcome, Stage, VolumeStep
from emp.model.volume import VolumeType
from tests.unit.test_cli_canned import (
    ABORTED,
    BLACKOUT,
    COMPLETED,
    COPYING,
    ID,
    MOVES,
    RUNS_THERE,
    STUCK,
    WHOLE_WAY,
)
from tests.unit.test_cli_pool import Controller, serving
from tests.unit.test_cli_run import Emp, at_terminal, ended, in_process, start_emp, wait_for


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    with serving(tmp_path, monkeypatch) as pool:
        yield pool


@pytest.fixture
def emp(capsys: pytest.CaptureFixture[str]) -> Emp:
    return in_process(capsys)


# ------------------------------------------------------------------ to the end


def test_a_log_has_one_line_for_each_stage_and_then_the_figures(pool: Controller, emp: Emp) -> None:
    pool.push(COPYING, COPYING, *WHOLE_WAY)
    code, out, err = emp("migrate web --to n2")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{ID}: web, n1 -> n2 (the only node that fits (3.5 GiB free))",
        "source brownout: 128 MiB of 512 MiB left, dirty 12 MiB/s, 310 MiB/s sent, pass 2, ETA 1.5 s",
        "blackout: the last pages and the CPU state",
        "target brownout: web runs on n2",
        f"{ID}: web runs on n2, completed in 4.2 s",
        "source brownout  blackout  target brownout  vCPU pause  QEMU downtime",
        "          3.1 s   18.2 ms           0.25 s     14.1 ms          12 ms",
        "         memory      sent           passes  dirty rate      bandwidth",
        "        512 MiB   540 MiB                3    12 MiB/s      310 MiB/s",
        "blackout and vCPU pause span two hosts' clocks: +-0.2 ms",
    ]
    assert pool.told[0] == ("POST /v1/evms/web/migrations", {"target": "n2"})


def moving(migration: Migration, *steps: MoveStep, held_s: float | None = 0.0) -> list[Migration]:
    """Return snapshots of one gp3 volume at each of those steps."""
    held_since = None if held_s is None else time.time() - held_s
    return [
        migration.model_copy(
            update={
                "moving": (
                    VolumeStep(
                        volume="vol-3", type=VolumeType.GP3, step=step, held_since=held_since, expected_ms=7000.0
                    ),
                )
            }
        )
        for step in steps
    ]


def test_a_log_has_a_line_for_each_long_step_of_a_volume_and_for_what_stands_in_its_way(
    pool: Controller, emp: Emp
) -> None:
    tried = moving(RUNS_THERE, MoveStep.HOLD, MoveStep.DETACH, MoveStep.DETACH, held_s=0.5)
    done = moving(RUNS_THERE, MoveStep.DETACH, MoveStep.ATTACH, MoveStep.LAND, held_s=3.04)
    moved = COMPLETED.model_copy(update={"report": COMPLETED.report.model_copy(update={"volumes": MOVES})})
    pool.push(COPYING, *tried, STUCK, *done, moved)
    lines = emp("migrate web")[1].splitlines()
    begin, end = (
        lines.index("target brownout: web runs on n2") + 1,
        lines.index(f"{ID}: web runs on n2, completed in 4.2 s"),
    )
    detach, alarm, detach_again, well, attach = lines[begin:end]
    assert re.fullmatch(r"  vol-3 gp3: held, detaching from n1, ETA 6\.\d s", detach)
    assert alarm == f"  {STUCK.hint}"
    assert re.fullmatch(r"  vol-3 gp3: held 3\.\d s, detaching from n1, ETA [34]\.\d s", detach_again)
    assert well == "  nothing stands in the way any more"
    assert re.fullmatch(r"  vol-3 gp3: held 3\.\d s, attaching to n2, ETA [34]\.\d s", attach)
    table = lines[-4:-1]
    assert table[0].split() == ["VOLUME", "I/O", "HELD", "HOLD", "DETACH", "ATTACH", "LAND", "RELAYED", "MEAN", "MAX"]
    assert " ".join(table[1].split()) == (
        "vol-0123456789abcdef0 7.12 s 12.4 ms 4.6 s 2.4 s 111 ms 12.5 MiB 1.2 ms 40.5 ms"
    )
    assert " ".join(table[2].split()) == "vol-4 2.5 s - - 2.4 s 100 ms 0 B - -"
    assert lines[-1] == "vol-0123456789abcdef0 was moved in 3 tries"
    assert max(map(len, table)) <= 100


def test_what_takes_longer_than_expected_says_what_was_expected() -> None:
    (late,) = moving(RUNS_THERE, MoveStep.ATTACH, held_s=11.02)
    assert step_text(late.moving[0], late) == "vol-3 gp3: held 11.0 s, attaching to n2, expected 7 s"
    unknown = late.moving[0].model_copy(update={"expected_ms": None, "step": MoveStep.LAND})
    assert step_text(unknown, late) == "vol-3 gp3: held 11.0 s, n2 opens it"
    assert step_text(STUCK.moving[0], late) == "vol-3 gp3: in use by way of n1"


def test_a_blackout_too_short_to_be_told_of_has_its_line_all_the_same(pool: Controller, emp: Emp) -> None:
    pool.push(COPYING, *(m for m in WHOLE_WAY if m.stage is not Stage.BLACKOUT))
    stages = [line.partition(":")[0] for line in emp("migrate web")[1].splitlines()[1:4]]
    assert stages == ["source brownout", "blackout", "target brownout"]


def test_json_is_the_closed_migration_alone(pool: Controller, emp: Emp) -> None:
    pool.push(*WHOLE_WAY)
    code, out, err = emp("migrate web --json")
    assert (code, json.loads(out), err) == (0, COMPLETED.model_dump(mode="json"), "")


def test_watch_with_json_prints_a_line_for_each_change(pool: Controller, emp: Emp) -> None:
    pool.migrations[ID] = COPYING
    pool.push(*WHOLE_WAY)
    lines = emp(f"migration watch {ID} --json")[1].splitlines()
    assert [json.loads(line)["stage"] for line in lines] == [m.stage for m in WHOLE_WAY]


def test_watching_what_is_over_shows_its_figures(pool: Controller, emp: Emp) -> None:
    code, out, _ = emp("migration watch web")
    assert code == 0 and "18.2 ms" in out and pool.resumed == []


def test_an_abort_is_an_error_with_cause_stage_and_hint(pool: Controller, emp: Emp) -> None:
    pool.push(COPYING, BLACKOUT, ABORTED)
    code, out, err = emp("migrate web")
    assert code == MigrationAborted.exit_code == 9
    assert f"error: migration {ID} was aborted in the blackout: the link to n2 broke" in err
    assert "hint:  web runs on n1, as before" in err
    assert "stood still for 8 ms" in out


def test_an_abort_is_json_on_both_streams(pool: Controller, emp: Emp) -> None:
    pool.push(COPYING, ABORTED.model_copy(update={"report": ABORTED.report.model_copy(update={"sent_bytes": None})}))
    code, out, err = emp("migrate web --json")
    assert (code, json.loads(out)["outcome"]) == (9, "aborted")
    error = json.loads(err)
    assert error["code"] == "migration_aborted"
    assert error["details"] == {"migration": ID, "stage": "source-brownout", "cause": "the link to n2 broke"}


def test_the_stage_of_an_abort_that_nobody_saw_is_read_off_the_figures(pool: Controller, emp: Emp) -> None:
    pool.migrations[ID] = ABORTED
    assert "aborted in the blackout" in emp(f"migration watch {ID}")[2]
    nothing = ABORTED.report.model_copy(update={"abort_pause_ms": None})
    pool.migrations[ID] = ABORTED.model_copy(update={"report": nothing})
    assert "aborted in the source brownout" in emp(f"migration watch {ID}")[2]
    nothing = nothing.model_copy(update={"sent_bytes": None})
    pool.migrations[ID] = ABORTED.model_copy(update={"report": nothing})
    assert "aborted in the preparation" in emp(f"migration watch {ID}")[2]


def test_a_lost_evm_is_an_error_of_the_host(pool: Controller, emp: Emp) -> None:
    pool.push(RUNS_THERE, COMPLETED.model_copy(update={"outcome": Outcome.LOST, "cause": "both nodes died"}))
    code, _, err = emp("migrate web")
    assert code == HostError.exit_code and "both nodes died" in err and "emp evm show web" in err


def test_it_ends_as_soon_as_the_migration_is_closed(pool: Controller) -> None:
    process = start_emp("migrate", "web")
    wait_for(lambda: pool.resumed, "the stream of events")
    pool.push(*WHOLE_WAY[:-1])
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("target brownout"):
            break
    began_s = time.monotonic()
    pool.push(COMPLETED)
    code, out, err = ended(process)
    assert (code, err) == (0, "") and "completed in 4.2 s" in out
    assert time.monotonic() - began_s < 1


def test_nothing_dear_is_imported_before_the_request_is_out(pool: Controller) -> None:
    """The start of ``emp migrate`` is measured: pydantic alone would double it."""
    code = (
        "import sys, http.client\n"
        "from emp.cli.root import run\n"
        "send = http.client.HTTPConnection.request\n"
        "def request(*given, **named):\n"
        "    send(*given, **named)\n"
        "    dear = {'pydantic', 'rich', 'httpx2', 'asyncio', 'cryptography', 'fastapi'} & set(sys.modules)\n"
        "    print(sorted(dear), file=sys.stderr)\n"
        "http.client.HTTPConnection.request = request\n"
        "run(['migrate', 'web', '--to', 'n2', '--detach'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == "[]"
    assert done.stdout == f"{ID}\n"


# ------------------------------------------------------------------ at a terminal


def test_a_terminal_sees_the_stages_pass_and_the_bar(pool: Controller) -> None:
    with at_terminal("migrate", "web") as terminal:
        terminal.wait_for("preparation")
        pool.push(COPYING)
        terminal.wait_for("128 MiB left of 512 MiB")
        terminal.wait_for("dirty 12 MiB/s, 310 MiB/s sent, pass 2, ETA 1.5 s")
        pool.push(*WHOLE_WAY[1:])
        assert terminal.end() == 0
    shown = terminal.text
    assert "web: n1 -> n2" in shown and "the only node that fits" in shown
    last = shown[shown.rindex("preparation") :]
    for stage, took in (("source brownout", "3.1 s"), ("blackout", "18.2 ms"), ("target brownout", "0.25 s")):
        assert re.search(rf"{stage} +{took}", last)
    assert "vCPU pause" in last
    assert terminal.raw.rindex(b"\033[?25h") > terminal.raw.rindex(b"\033[?25l"), "the cursor is shown again"
    assert max(map(len, shown.splitlines())) <= 80


def test_a_terminal_sees_volumes_on_their_way_and_what_stands_in_it(pool: Controller) -> None:
    with at_terminal("migrate", "web") as terminal:
        pool.push(COPYING, *moving(RUNS_THERE, MoveStep.DETACH, held_s=1.0))
        terminal.wait_for("ETA")
        terminal.wait_for("expected 7 s")  # redrawn for the clock: nothing was said meanwhile
        pool.push(STUCK)
        terminal.wait_for("vol-3 gp3: in use by way of n1")
        terminal.wait_for("it stays relayed by n1")
        pool.push(COMPLETED)
        assert terminal.end() == 0
    last = terminal.text[terminal.text.rindex("preparation") :]
    assert "relayed" not in last and "vol-3" not in last


def test_a_terminal_is_left_as_it_was_after_ctrl_c(pool: Controller) -> None:
    with at_terminal("migrate", "web") as terminal:
        pool.push(COPYING)
        terminal.wait_for("left of")
        terminal.type(b"\x03")
        assert terminal.end() == 130
    assert "detached" in terminal.text
    assert terminal.raw.rindex(b"\033[?25h") > terminal.raw.rindex(b"\033[?25l")


def test_a_terminal_sees_that_the_controller_is_away_and_what_was_aborted(pool: Controller) -> None:
    pool.migrations[ID] = COPYING
    pool.push(COPYING)
    with at_terminal("migration", "watch", "web") as terminal:
        terminal.wait_for("left of")
        pool.stop()
        terminal.wait_for("trying again")
        pool.start()
        pool.push(ABORTED)
        assert terminal.end() == 9
    assert "aborted in the source brownout" in terminal.text


def test_the_stage_names_are_those_of_the_model() -> None:
    from emp.cli.screen import STAGES

    assert (*STAGES, Stage.CLOSED) == tuple(Stage)
