"""The source's agent dies in the blackout and stays away: its guard brings the guest back (rule R12)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from emp import faults
from emp.lab import daemons
from emp.lab.down import down
from emp.lab.up import Options, up
from emp.model.errors import EmpError
from emp.model.migration import Outcome
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, subject, until
from tests.leaks import outliving

NAME = "guard"
DEADLINES = {"blackout_deadline_s": 3.0, "guard_margin_s": 1.0}


@pytest.fixture(scope="module")
def armed(lab_home: Path) -> Iterator[Pool]:
    """A lab of two nodes with its fault points on."""
    with outliving(f"the lab {NAME}"):
        made = Pool(up(Options(NAME, 2, faults=True)))
    yield made
    down(made.files)


def answers(evm: Subject) -> bool:
    try:
        return bool(evm.guest().ask("status", timeout_s=1.0)["boot_id"])
    except EmpError:
        return False


def is_dead(pool: Pool, node: str) -> bool:
    return daemons.find(pool.files, node, "agent") is None


@pytest.mark.parametrize("hangs_in", ["pre-switchover", "device"])
def test_the_guest_runs_again_without_its_agent_and_the_agent_settles_it_later(armed: Pool, hangs_in: str) -> None:
    source = armed.files.faults("n1")
    with subject(armed, node="n1") as evm:
        boot_id, pid = evm.boot_id, evm.qemus()["n1"]
        if hangs_in == "pre-switchover":
            faults.arm(source, "source.continue-stream.before", "kill9")
            moving = evm.begin("n2", **DEADLINES)
        else:
            faults.arm(source, "source.continue-stream.before", "stop")
            moving = evm.begin("n2", **DEADLINES)
            until(lambda: any(hit.action == "stop" for hit in faults.hits(source)), "the agent stands before continue")
            armed.stop("n2", f"qemu:{evm.name}")  # so that the source's QEMU waits for it in device
            faults.arm(source, "source.continue-stream.after", "kill9")
            armed.cont("n1", "agent")
        until(lambda: is_dead(armed, "n1"), "the agent of n1 dies")
        until(lambda: answers(evm), "the guest answers again")
        assert is_dead(armed, "n1")
        assert evm.boot_id == boot_id
        armed.start("n1", "agent")
        ended = evm.end_of(moving)
        assert (ended.outcome, ended.committed) == (Outcome.ABORTED, False)
        evm.check_only_on("n1")
        assert evm.record.epoch == ended.epoch_source
        assert (evm.boot_id, evm.qemus()) == (boot_id, {"n1": pid})
        evm.migrate("n2")
        evm.check_only_on("n2")
        assert evm.boot_id == boot_id
