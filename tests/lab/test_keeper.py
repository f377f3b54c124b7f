"""A lab that keeps its daemons: one that dies is started again as by systemd, one that is killed for good is not."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emp.lab import daemons, keeper, scan, verbs
from emp.lab.down import down
from emp.lab.residue import Residue
from emp.lab.state import LabFiles
from emp.lab.topology import Topology
from emp.lab.up import Options, up
from tests.lab.conftest import Pool, run_lab
from tests.lab.pool import subject, until
from tests.leaks import outliving

NAME = "kept"


@pytest.fixture(scope="module")
def kept(lab_home: Path) -> Iterator[Pool]:
    """A lab of one node that keeps its daemons; clearing it leaves nothing."""
    residue = Residue.watch(Topology(NAME, 1))
    with outliving(f"the lab {NAME}"):
        run_lab("up", "--name", NAME, "--nodes", "1", "--keep")
    yield Pool(LabFiles(NAME).load())
    run_lab("down", "--name", NAME)
    assert residue.left() == []


def status(pool: Pool, where: str) -> verbs.PlaceStatus:
    return next(place for place in verbs.status(pool.files) if place.name == where)


def restarted(pool: Pool, where: str, kill: Callable[[], object]) -> None:
    """Return once a new daemon has taken the place of the one that ``kill`` ends."""
    role = status(pool, where).role
    before = daemons.find(pool.files, where, role)
    with outliving(f"the lab {pool.name}"):
        kill()
        until(lambda: daemons.find(pool.files, where, role) not in (None, before), f"{role} is started again")


def between_two_runs(pool: Pool, where: str) -> verbs.PlaceStatus:
    """Wait for a look at a place in which its daemon is not running just then."""

    def look() -> verbs.PlaceStatus | None:
        seen = status(pool, where)
        return seen if seen.state == "restarting" else None

    return until(look, f"the daemon of {where} is restarting")


def sigkill(pool: Pool, where: str) -> None:
    process = daemons.find(pool.files, where, status(pool, where).role)
    assert process is not None
    scan.kill([process])


def test_an_agent_that_is_killed_comes_back_and_adopts_its_evm(kept: Pool) -> None:
    with outliving(f"the lab {NAME}"), subject(kept, node="n1", memory_bytes=128 << 20) as evm:
        boot_id, qemus, agent = evm.boot_id, evm.qemus(), evm.client.nodes.get("n1").report.boot_id
        began = time.monotonic()
        restarted(kept, "n1", lambda: sigkill(kept, "n1"))
        assert time.monotonic() - began >= keeper.PAUSE_S
        until(lambda: evm.client.nodes.get("n1").report.boot_id != agent, "the new agent reports")
        evm.check_only_on("n1")
        assert (evm.boot_id, evm.qemus()) == (boot_id, qemus)
    assert "killed by SIGKILL; it is started again in 1 s" in kept.files.log("n1", "agent").read_text()


def test_a_controller_that_is_killed_keeps_its_url_and_lets_people_wait(kept: Pool) -> None:
    def kill() -> None:
        sigkill(kept, "ctl")
        socket.create_connection((daemons.HOST, kept.state.port), 5).close()  # not refused meanwhile

    restarted(kept, "ctl", kill)
    assert kept.context.url == f"https://{daemons.HOST}:{kept.state.port}"
    until(lambda: kept.json("node", "show", "n1")["ready"], "the new controller hears the agent")


@pytest.mark.parametrize(("where", "number"), [("vol", signal.SIGTERM), ("bmc", signal.SIGKILL)])
def test_the_others_come_back_however_they_end(kept: Pool, where: str, number: signal.Signals) -> None:
    def kill() -> None:
        process = daemons.find(kept.files, where, before.role)
        assert process is not None
        process.send(number)
        scan.wait_ended(process, 30)

    before = status(kept, where)
    assert before.restarts is not None
    restarted(kept, where, kill)
    assert status(kept, where).restarts == before.restarts + 1


def test_a_kill_is_for_good_unless_it_says_otherwise(kept: Pool) -> None:
    restarted(kept, "n1", lambda: run_lab("kill", "--name", NAME, "--restart", "n1", "agent"))
    run_lab("kill", "--name", NAME, "n1", "agent")
    # Nobody is to start it again; the QEMU that it had asked for its version may take a moment to end by itself.
    place = kept.topology.place("n1")
    until(lambda: len(daemons.daemons(kept.files, place)) == 1, "nothing but its init is there")
    assert (status(kept, "n1").state, status(kept, "n1").restarts) == ("dead", None)
    again = run_lab("kill", "--name", NAME, "--restart", "n1", "agent", check=False)
    assert (again.returncode, "not running" in again.stderr) == (3, True)
    kept.start("n1", "agent")
    assert (status(kept, "n1").state, status(kept, "n1").restarts) == ("running", 0)
    running = run_lab("start", "--name", NAME, "n1", "agent", check=False)
    assert (running.returncode, "agent runs on n1" in running.stderr) == (4, True)


def test_one_that_cannot_start_is_tried_again_and_shown(kept: Pool) -> None:
    config = kept.files.data("n1") / "agent.json"
    good = config.read_text()
    config.write_text("{}")
    try:
        with outliving(f"the lab {NAME}"):
            sigkill(kept, "n1")
            first = status(kept, "n1").restarts or 0
            until(lambda: (status(kept, "n1").restarts or 0) >= first + 3, "it was tried thrice")
            assert between_two_runs(kept, "n1").pid is None
        again, log = "the daemon ended with 2; it is started again", kept.files.log("n1", "agent")
        until(lambda: log.read_text().count(again) >= 3, "the log says so")
        printed = json.loads(run_lab("status", "--name", NAME, "--json").stdout)
        assert next(place for place in printed["places"] if place["name"] == "n1")["restarts"] >= 3
        assert max(map(len, run_lab("status", "--name", NAME).stdout.splitlines())) <= 80
        between_two_runs(kept, "n1")
        run_lab("kill", "--name", NAME, "n1", "agent")  # also then
        assert status(kept, "n1").state == "dead"
    finally:
        config.write_text(good)
        if status(kept, "n1").state == "dead":
            kept.start("n1", "agent")


def test_a_node_that_is_switched_on_has_its_keeper(kept: Pool) -> None:
    with outliving(f"the lab {NAME}"):
        run_lab("power", "--name", NAME, "n1", "off")
        assert (status(kept, "n1").state, status(kept, "n1").restarts) == ("off", None)
        run_lab("power", "--name", NAME, "n1", "on")
    until(lambda: status(kept, "n1").restarts == 0, "its agent is kept")
    restarted(kept, "n1", lambda: sigkill(kept, "n1"))


def test_a_lab_without_keepers_says_so(pool: Pool) -> None:
    refused = run_lab("kill", "--name", pool.name, "--restart", "n1", "agent", check=False)
    assert (refused.returncode, "emp lab up --keep" in refused.stderr) == (4, True)
    qemu = run_lab("kill", "--name", pool.name, "--restart", "n1", "qemu:none", check=False)
    assert qemu.returncode == 3
    assert {place.restarts for place in verbs.status(pool.files)} == {None}
    assert status(pool, "n1").state == "running"


KILLS: dict[str, Callable[[list[scan.Running]], list[scan.Running]]] = {
    "daemons": lambda found: [one for one in found if keeper.MODULE not in one.argv],
    "keepers": lambda found: [one for one in found if keeper.MODULE in one.argv],
    "everything": lambda found: found,
}


@pytest.mark.parametrize("victims", KILLS)
def test_down_clears_a_lab_whose_processes_were_killed(lab_home: Path, victims: str) -> None:
    files = LabFiles("doomed")
    residue = Residue.watch(Topology(files.name, 1))
    try:
        state = up(Options(files.name, 1, keep=True))
        found = [one for place in state.topology.places for one in daemons.daemons(files, place)]
        chosen = KILLS[victims]([one for one in found if "-m" in one.argv])
        assert len(chosen) >= 4
        scan.kill(one.process for one in chosen)
    finally:
        down(files)
    assert residue.left() == []
