"""What is lost between two agents, or on the disk of one, and how the EVM still ends where it must, running."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emp import faults
from emp.lab import places
from emp.lab.down import down
from emp.lab.up import Options, up
from emp.model.errors import EmpError, Unavailable
from emp.model.evm import EvmState
from emp.model.migration import Outcome
from tests.lab.aborts import ends
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, agent_away, mend, subject, until
from tests.leaks import outliving

NAME = "protocol"
EVERY_TIME = 0


@pytest.fixture(scope="module")
def lossy(lab_home: Path) -> Iterator[Pool]:
    """A pool of two nodes whose daemons have their fault points."""
    with outliving(f"the lab {NAME}"):
        made = Pool(up(Options(NAME, 2, faults=True)))
    yield made
    down(made.files)


@pytest.fixture(scope="module")
def evm(lossy: Pool) -> Iterator[Subject]:
    """The EVM of all tests, on either node."""
    with subject(lossy, node="n1", volumes=["io2:16MiB"]) as made:
        yield made


@pytest.fixture(autouse=True)
def disarmed(lossy: Pool) -> Iterator[None]:
    """No test finds what another has armed or reached."""
    yield
    for place in lossy.topology.places:
        directory = lossy.files.faults(place.name)
        faults.disarm(directory)
        if (hits := directory / faults.HITS).exists():
            hits.write_text("")
    mend(lossy)


def arm(pool: Pool, where: str, point: str, action: str, *, times: int = 1) -> None:
    faults.arm(pool.files.faults(where), point, action, times=times)


def was_at(pool: Pool, where: str, point: str) -> bool:
    return any(hit.point == point for hit in faults.hits(pool.files.faults(where)))


def hang_before_the_commit(pool: Pool, evm: Subject, **policy: Any) -> str:
    """Begin a migration whose source never hears that the target has loaded everything; return its id."""
    _, target = ends(evm)
    arm(pool, target, "link.loaded.send", "drop", times=EVERY_TIME)
    moving = evm.begin(target, **policy)
    until(lambda: was_at(pool, target, "link.loaded.send"), "the target has loaded everything")
    return moving.id


def answers(evm: Subject) -> bool:
    with contextlib.suppress(EmpError):
        return bool(evm.guest().ask("status", timeout_s=1.0))
    return False


def root(pool: Pool, node: str) -> Path:
    return Path(f"/proc/{places.init_of(pool.files, node).pid}/root")


class Local(http.client.HTTPConnection):
    """The agent's socket on its node, as root there sees it."""

    def __init__(self, pool: Pool, node: str) -> None:
        super().__init__("localhost")
        self.path = root(pool, node) / "run/emp/agent.sock"

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self.path))

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        self.request(method, path, json.dumps(body) if body else None, headers)
        with contextlib.closing(self), self.getresponse() as response:
            answer = json.loads(response.read())
        assert response.status == 200, answer
        return answer


def test_a_go_that_is_lost_is_carried_by_the_controller(lossy: Pool, evm: Subject) -> None:
    source, target = ends(evm)
    arm(lossy, source, "link.go.send", "drop", times=EVERY_TIME)
    boot_id = evm.boot_id
    moved = evm.migrate(target)
    assert was_at(lossy, target, "agent.go.received")
    evm.check_only_on(target)
    assert evm.boot_id == boot_id
    (volume,) = evm.volumes
    claimed = [(a.node, a.claimed) for a in volume.attachments]
    assert claimed == [(target, moved.epoch_target)], "the target has told the volume service"


def test_an_answer_that_is_lost_is_carried_by_the_controller(lossy: Pool, evm: Subject) -> None:
    source, target = ends(evm)
    arm(lossy, target, "link.answer.send", "drop", times=EVERY_TIME)
    evm.migrate(target)
    assert was_at(lossy, source, "agent.answer.received")
    evm.check_only_on(target)


def test_a_target_that_has_everything_asks_a_source_that_went_back_unheard(lossy: Pool, evm: Subject) -> None:
    source, target = ends(evm)
    boot_id = evm.boot_id
    arm(lossy, source, "link.aborted.send", "drop", times=EVERY_TIME)
    hang_before_the_commit(lossy, evm, blackout_deadline_s=1.0)
    lossy.kill("ctl", "controller")  # which would tell it, too
    until(lambda: target not in evm.qemus(), "the target has heard that the source went back")
    assert was_at(lossy, target, "target.ask.before")
    lossy.start("ctl", "controller")
    evm.check_only_on(source)
    assert evm.boot_id == boot_id


def test_a_source_agent_that_comes_back_to_a_complete_stream_asks_first(lossy: Pool, evm: Subject) -> None:
    source, _ = ends(evm)
    boot_id = evm.boot_id
    moving = hang_before_the_commit(lossy, evm, blackout_deadline_s=60.0)
    with agent_away(lossy, evm.client, source):
        pass
    assert evm.end_of(evm.client.migrations.get(moving)).outcome is Outcome.ABORTED
    assert was_at(lossy, source, "source.ask.before")
    evm.check_only_on(source)
    assert evm.boot_id == boot_id


def test_a_guest_whose_way_back_cannot_be_written_runs_by_the_targets_word(lossy: Pool, evm: Subject) -> None:
    source, target = ends(evm)
    boot_id = evm.boot_id
    arm(lossy, source, "journal.own.before_fsync", "raise:EIO", times=EVERY_TIME)
    moving = hang_before_the_commit(lossy, evm, blackout_deadline_s=1.0)
    until(lambda: answers(evm), "the target has withdrawn, so the guest runs, without a record")
    assert evm.boot_id == boot_id
    (role,) = Local(lossy, source).ask("GET", "/v1/status")["roles"][-1:]
    assert (role["migration"], role["phase"]) == (moving, "aborting")
    assert "journal cannot be written" in role["cause"]
    for node in (source, target):
        faults.disarm(lossy.files.faults(node))
    assert evm.end_of(evm.client.migrations.get(moving)).outcome is Outcome.ABORTED
    evm.check_only_on(source)
    evm.migrate(target)


def test_root_on_the_node_aborts_without_a_controller(lossy: Pool, evm: Subject) -> None:
    source, target = ends(evm)
    boot_id = evm.boot_id
    slow = evm.begin_slow(target)
    lossy.kill("ctl", "controller")
    local = Local(lossy, source)
    assert local.path.stat().st_mode & 0o777 == 0o600
    seen = local.ask("GET", "/v1/status")
    assert seen["node"]["name"] == source
    assert [role["migration"] for role in seen["node"]["open_roles"]] == [slow.id]
    order = {"reason": f"root on {source}", "wait_s": 20}
    answer = local.ask("POST", f"/v1/migrations/{slow.id}/abort", order)
    assert answer["phase"] == "aborted"
    again = local.ask("POST", f"/v1/migrations/{slow.id}/abort", order)
    assert again["phase"] == "aborted"
    lossy.start("ctl", "controller")
    ended = evm.end_of(slow)
    assert (ended.outcome, f"root on {source}" in (ended.cause or "")) == (Outcome.ABORTED, True)
    evm.check_only_on(source)
    assert evm.boot_id == boot_id


def test_an_agent_that_finds_its_journal_put_back_touches_nothing(lossy: Pool, evm: Subject, tmp_path: Path) -> None:
    source, target = ends(evm)
    boot_id, qemus = evm.boot_id, evm.qemus()
    journal = lossy.files.data(source) / "journal"
    before = shutil.copy(journal, tmp_path / "before")
    evm.migrate(target)
    evm.migrate(source)
    qemus, newest = evm.qemus(), shutil.copy(journal, tmp_path / "newest")
    with agent_away(lossy, evm.client, source):
        shutil.copy(before, journal)
    doubted = evm.client.nodes.get(source).report
    assert "this host has seen" in (doubted.journal or "")
    with pytest.raises(Unavailable):
        evm.client.evms.stop(evm.name)
    assert evm.qemus() == qemus
    assert evm.boot_id == boot_id
    with agent_away(lossy, evm.client, source):
        shutil.copy(newest, journal)
    assert evm.wait(EvmState.RUNNING)
    assert evm.client.nodes.get(source).report.journal is None
