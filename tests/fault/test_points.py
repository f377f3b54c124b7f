"""Every step of the product is a fault point and assigned to columns of the matrix; a point does what is armed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from emp import faults
from emp.faults import Board, arm, disarm, hits, name_of
from emp.migration.events import SendAnswer, SetTimer, Timer, Word, WriteRecord
from emp.migration.records import Record, RecordKind
from tests.fault import points


def test_every_point_is_assigned_to_columns_of_the_matrix() -> None:
    there, assigned = set(points.points()), points.columns()
    assert there - set(assigned) == set(), "new steps of the product: assign them in tests/fault/points.py"
    assert set(assigned) - there == set(), "assigned, but no point of the product any more"
    assert {column for columns in assigned.values() for column in columns} == set("BPDHMT")


def test_a_step_has_a_name_by_its_type_and_its_choices() -> None:
    given = WriteRecord(Record(RecordKind.GIVEN, "web", 2))
    assert name_of(given) == "write-record-given"
    assert name_of(SetTimer(Timer.REPEAT)) == "set-timer-repeat"
    assert name_of(SendAnswer(Word.WITHDRAWN)) == "send-answer-withdrawn"


def test_without_the_variable_there_is_no_board() -> None:
    assert faults.board is None


def test_a_point_logs_that_it_was_reached_and_does_nothing(tmp_path: Path) -> None:
    board, began_s = Board(tmp_path), time.monotonic()
    assert board.hit("a.before") == faults.ONCE
    (hit,) = hits(tmp_path)
    assert (hit.point, hit.action) == ("a.before", "-")
    assert began_s - 0.001 <= hit.at_s <= time.monotonic()


async def test_an_arm_acts_at_its_turn_as_often_as_was_asked(tmp_path: Path) -> None:
    board, done = Board(tmp_path), []

    async def act() -> None:
        done.append(len(hits(tmp_path)))

    arm(tmp_path, "step.before", "drop", nth=2, times=2)
    arm(tmp_path, "step.after", "raise:ENOSPC", nth=4)
    for _ in range(3):
        await board.around("step", act)
    assert len(done) == 1
    with pytest.raises(OSError) as raised:
        await board.around("step", act)
    assert (raised.value.errno, len(done)) == (errno.ENOSPC, 2)
    arm(tmp_path, "step.before", "dup", times=0)
    await board.around("step", act)
    await board.around("step", act)
    disarm(tmp_path)
    await board.around("step", act)
    assert len(done) == 7


async def test_a_delay_holds_up_its_own_step_alone(tmp_path: Path) -> None:
    board = Board(tmp_path)
    arm(tmp_path, "slow", "delay:30")
    began_s = time.monotonic()
    assert await board.reach("slow") == faults.ONCE
    assert time.monotonic() - began_s >= 0.03
    assert [hit.action for hit in hits(tmp_path)] == ["delay:30"]


def test_what_cannot_be_done_is_refused_when_it_is_armed(tmp_path: Path) -> None:
    for action in ("kill", "raise:EWHAT", "delay", "delay:soon", "drop:3"):
        with pytest.raises(ValueError, match="cannot be done"):
            arm(tmp_path, "a", action)


PROGRAM = "from emp import faults; faults.board.hit('here'); print('alive', flush=True)"


def daemon(directory: Path) -> subprocess.Popen[str]:
    environment = os.environ | {faults.VARIABLE: str(directory)}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)


def test_a_daemon_kills_itself_once(tmp_path: Path) -> None:
    arm(tmp_path, "here", "kill9")
    first = daemon(tmp_path)
    assert (first.communicate()[0], first.returncode) == ("", -signal.SIGKILL)
    again = daemon(tmp_path)
    assert (again.communicate()[0], again.returncode) == ("alive\n", 0)
    assert [hit.action for hit in hits(tmp_path)] == ["kill9", "-"]


def test_a_daemon_stops_itself_until_it_is_woken(tmp_path: Path) -> None:
    arm(tmp_path, "here", "stop")
    with daemon(tmp_path) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.communicate()[0] == "alive\n"
