"""The pool that all cells share, and the record of what they saw: ``--faults all`` writes ``build/faults.json``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.fault.record import RECORD, FaultRecord
from tests.fault.stage import Stages


@pytest.fixture(scope="session")
def fault_record(request: pytest.FixtureRequest) -> FaultRecord:
    return request.config.stash[RECORD]


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    """Gives a stage that is whole; one that a cell has broken is replaced."""
    if os.geteuid() != 0:
        pytest.skip("a lab needs root")
    made = Stages()
    yield made
    made.close()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORD] = FaultRecord(began_s=time.monotonic())


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("faults", "quick") == "all":
        session.config.stash[RECORD].write(session.config.rootpath / "build" / "faults.json")
