"""SIGKILL of any and of all of a lab's processes, in the middle of a migration: one command clears everything.

``test_lab`` kills the commands that make and clear labs; here the labs are alive, with a machine, a volume, and a
migration under way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emp.client import context as contexts
from emp.client.client import Client
from emp.lab import daemons, places, scan, verbs
from emp.lab.residue import Residue
from emp.lab.state import LabFiles
from emp.lab.topology import Topology
from tests.lab.conftest import run_lab
from tests.lab.pool import MEMORY_BYTES, SLOW_BYTES_PER_S, until

NAME = "killed"
NODES = 2


@pytest.fixture
def residue(lab_home: Path) -> Residue:
    """Stock taken before the lab is made."""
    return Residue.watch(Topology(NAME, NODES))


@pytest.fixture
def files(residue: Residue) -> Iterator[LabFiles]:
    """A lab of two nodes whose EVM is on its way from one to the other; gone afterwards even if the test fails."""
    try:
        run_lab("up", "--name", NAME, "--nodes", str(NODES))
        with contextlib.closing(Client(contexts.load_context(NAME))) as client:
            made = {"name": "web", "memory_bytes": MEMORY_BYTES, "node": "n1", "volumes": ["io2:16MiB"]}
            client.evms.create(made)
            policy = {"max_bandwidth_bytes_per_s": SLOW_BYTES_PER_S}
            moving = client.migrations.start("web", target="n2", policy=policy)
            until(lambda: client.migrations.get(moving.id).progress.sent_bytes, "memory is sent")
        yield LabFiles(NAME)
    finally:
        run_lab("down", "--name", NAME)


def processes(files: LabFiles) -> dict[str, list[scan.Running]]:
    """Return place -> its processes."""
    return {place.name: daemons.daemons(files, place) for place in files.load().topology.places}


def kill_daemons(files: LabFiles) -> None:
    """Every daemon of EMP; QEMUs and volume exports live on."""
    alive = processes(files)
    modules = tuple(daemons.MODULES.values())
    victims = [one for running in alive.values() for one in running if any(word in modules for word in one.argv)]
    assert len({word for one in victims for word in one.argv if word in modules}) == len(modules)
    scan.kill(one.process for one in victims)


def kill_everything(files: LabFiles) -> None:
    inits = {init.pid for init in places.inits(files).values()}
    scan.kill(one.process for running in processes(files).values() for one in running if one.pid not in inits)


def kill(where: str, role: str) -> Callable[[LabFiles], None]:
    return lambda files: scan.kill([daemons.find(files, where, role)])  # type: ignore[list-item]


KILLS: dict[str, Callable[[LabFiles], None]] = {
    "the controller": kill("ctl", "controller"),
    "the volume server": kill("vol", "volumes"),
    "the source's agent": kill("n1", "agent"),
    "the target's agent": kill("n2", "agent"),
    "every daemon": kill_daemons,
    "everything": kill_everything,
}


@pytest.mark.parametrize("victims", KILLS)
def test_down_clears_what_a_kill_has_left(files: LabFiles, residue: Residue, victims: str) -> None:
    KILLS[victims](files)
    assert residue.left()
    run_lab("down", "--name", NAME)
    assert residue.left() == []


@pytest.mark.parametrize("victims", ["the source's agent", "every daemon"])
def test_the_next_up_clears_what_a_kill_has_left(files: LabFiles, victims: str) -> None:
    qemus = [one.pid for running in processes(files).values() for one in running if daemons.evm_of(one.argv)]
    assert len(qemus) == NODES
    KILLS[victims](files)
    run_lab("up", "--name", NAME, "--nodes", str(NODES))
    assert {place.state for place in verbs.status(files)} == {"running"}
    assert not any(place.evms for place in verbs.status(files))
    assert not any(Path(f"/proc/{pid}").exists() for pid in qemus)
    with contextlib.closing(Client(contexts.load_context(NAME))) as client:
        assert client.evms.list().items == ()
        assert client.volumes.list().items == ()
        assert client.migrations.list().items == ()
