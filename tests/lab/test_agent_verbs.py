"""``emp agent`` on a node of a real pool, as root there would use it when the controller is gone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from emp.lab.places import source_directory
from emp.model.migration import Outcome
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, subject, until


@pytest.fixture
def evm(pool: Pool) -> Iterator[Subject]:
    with subject(pool, node="n1") as made:
        yield made


def agent_verb(pool: Pool, node: str, *words: str) -> tuple[int, str]:
    """Run ``emp agent WORDS`` on a node; return its exit code and what it said."""
    emp = ["env", f"PYTHONPATH={source_directory()}", sys.executable, "-m", "emp.cli.main", "agent", *words]
    done = pool.run_in(node, *emp, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_migration_is_brought_back_on_the_node_without_a_controller(pool: Pool, evm: Subject) -> None:
    boot_id = evm.boot_id
    migration = evm.begin_slow("n2")
    pool.kill("ctl", "controller")

    code, said = agent_verb(pool, "n1", "status", "--json")
    assert code == 0, said
    (role,) = [role for role in json.loads(said)["roles"] if role["evm"] == evm.name]
    assert (role["migration"], role["role"], role["committed"]) == (migration.id, "source", False)
    assert evm.name in agent_verb(pool, "n2", "status")[1]

    code, said = agent_verb(pool, "n1", "abort", evm.name, "--reason", "the controller is gone", "--wait", "30s")
    assert (code, "is back here, running" in said) == (0, True), said
    assert agent_verb(pool, "n1", "abort", migration.id)[0] == 0  # a second one hears the same
    assert evm.boot_id == boot_id
    until(lambda: set(evm.qemus()) == {"n1"}, "no machine is left on the target")

    pool.start("ctl", "controller")
    ended = evm.end_of(migration)
    assert (ended.outcome, "the controller is gone" in str(ended.cause)) == (Outcome.ABORTED, True)
    evm.check_only_on("n1")


def test_what_has_no_part_here_is_named(pool: Pool) -> None:
    assert agent_verb(pool, "n3", "abort", "m-00000000")[0] == 3
    assert agent_verb(pool, "client", "status")[0] == 7
