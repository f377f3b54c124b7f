"""Labs for tests: one pool for the whole session, shared because it takes seconds, and each test's own EVMs in it.

``pool`` is the shared one; a test may kill its daemons if it starts them again (``pool.start``). ``lab_home`` is enough
for a test that makes labs of its own with ``run_lab``.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from emp.client import context as contexts
from emp.lab import verbs
from emp.lab.down import down
from emp.lab.guest_control import Guest
from emp.lab.ready import wait_ready
from emp.lab.state import LabFiles, LabState
from emp.lab.topology import Topology
from emp.lab.up import Options, up
from tests.leaks import outliving

POOL = "tests"
NODES = 3
COMMAND_S = 60.0
_numbers = itertools.count(1)

EMP = [sys.executable, "-m", "emp.cli.main"]
LAB = [*EMP, "lab"]


def run_emp(
    *arguments: str, check: bool = True, timeout_s: float = COMMAND_S, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``emp ARGUMENTS`` as a user would; ``check`` fails the test on another exit status than 0."""
    done = subprocess.run(
        [*EMP, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "80"} | env,
    )
    if check and done.returncode:
        pytest.fail(f"emp {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def run_lab(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``emp lab ARGUMENTS``."""
    return run_emp("lab", *arguments, **options)


@dataclass(frozen=True)
class Evm:
    """One test's EVM: ``name``, the record that the controller gave, and ways to its guest."""

    pool: Pool
    name: str
    record: dict[str, Any]

    @property
    def address(self) -> str:
        return str(self.record["spec"]["nics"][0]["address"])

    @property
    def owner(self) -> str:
        """The node that runs it now, as the controller knows."""
        return str(self.pool.json("evm", "show", self.name)["owner"])

    @property
    def guest(self) -> Guest:
        return Guest(self.pool.topology, self.address)

    def pod(self, number: int = 0) -> Guest:
        return Guest(self.pool.topology, str(self.record["spec"]["pods"][number]["address"]))

    def ready(self) -> Evm:
        """Return once the guest has answered its first packet."""
        self.guest.wait_first_packet()
        return self


class Pool:
    """A lab that is up, with the user's commands and the lab's faults."""

    def __init__(self, state: LabState) -> None:
        self.state = state
        self.name = state.name
        self.files = LabFiles(state.name)

    @property
    def topology(self) -> Topology:
        return self.state.topology

    @property
    def context(self) -> contexts.Context:
        return contexts.load_context(self.name)

    def emp(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run ``emp --context POOL ARGUMENTS``."""
        return run_emp("--context", self.name, *arguments, **options)

    def json(self, *arguments: str) -> Any:
        """Run a command with ``--json`` and return what it printed."""
        return json.loads(self.emp(*arguments, "--json").stdout)

    def run_in(self, where: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in a place."""
        return subprocess.run(
            verbs.command_in(self.files, where, command), capture_output=True, text=True, timeout=COMMAND_S, check=check
        )

    def kill(self, where: str, role: str) -> None:
        verbs.kill(self.files, where, role)

    def stop(self, where: str, role: str) -> None:
        verbs.stop(self.files, where, role)

    def cont(self, where: str, role: str) -> None:
        verbs.cont(self.files, where, role)

    def start(self, where: str, role: str) -> None:
        """Start a dead daemon again; it goes on after the test. Returns when the whole pool is ready."""
        with outliving(f"the lab {self.name}"):
            verbs.start(self.files, where, role)
        wait_ready(self.files, self.state, self.context)

    @contextmanager
    def evm(self, *options: str, name: str | None = None, memory: str = "128MiB") -> Iterator[Evm]:
        """Make an EVM (``options`` as of ``emp evm create``) and delete it afterwards."""
        name = name or f"evm-{next(_numbers)}"
        try:
            with outliving(f"the lab {self.name}"):
                record = self.json("evm", "create", name, "--memory", memory, *options)
            yield Evm(self, name, record)
        finally:
            self.emp("evm", "delete", name, check=False)


@pytest.fixture(scope="session")
def lab_home() -> Path:
    """Where labs and contexts of this session lie; see ``tests.isolation``."""
    if os.geteuid() != 0:
        pytest.skip("a lab needs root")
    return Path(os.environ["EMP_LAB_DIR"]).parent


@pytest.fixture(scope="session")
def pool(lab_home: Path) -> Iterator[Pool]:
    """The session's pool of three nodes, n1 to n3."""
    with outliving(f"the lab {POOL}"):
        made = Pool(up(Options(POOL, NODES)))
    yield made
    down(made.files)


@pytest.fixture
def new_evm(pool: Pool) -> Iterator[Callable[..., Evm]]:
    """``new_evm(*options, name=..., memory=...)``: an EVM of the shared pool that has answered its first packet."""
    with ExitStack() as made:
        yield lambda *options, **named: made.enter_context(pool.evm(*options, **named)).ready()
