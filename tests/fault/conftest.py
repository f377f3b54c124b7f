"""The pool that all cells share, and the record of what they saw: ``--faults all`` writes ``build/faults.json``."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from emp.lab.region import Profile
from tests.fault.record import RECORD, SHOWN, FaultRecord
from tests.fault.stage import Stages


@pytest.fixture(scope="session")
def fault_record(request: pytest.FixtureRequest) -> FaultRecord:
    return request.config.stash[RECORD]


@pytest.fixture(scope="module")
def stages(request: pytest.FixtureRequest) -> Iterator[Stages]:
    """Gives a stage that is whole; one that a cell has broken is replaced."""
    if os.geteuid() != 0:
        pytest.skip("a lab needs root")
    cloud = request.config.getoption("--fault-cloud")
    made = Stages(None if cloud == "none" else Profile(cloud))
    yield made
    made.close()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORD] = FaultRecord(began_s=time.monotonic())


def pytest_sessionfinish(session: pytest.Session) -> None:
    record = session.config.stash[RECORD]
    if (output := getattr(session.config, "workeroutput", None)) is not None:  # a worker of pytest-xdist
        output["faults"] = record.sent()
    elif session.config.getoption("faults", "quick") == "all":
        record.write(session.config.rootpath / "build" / "faults.json")


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """Show how a cell went beside its name (``-v``)."""
    said = dict(report.user_properties).get(SHOWN) if report.when == "call" else None
    return (report.outcome, report.outcome[0].upper(), f"{report.outcome.upper()} {said}") if said else None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker is through: what it has seen is part of the same record."""
    if sent := getattr(node, "workeroutput", {}).get("faults"):
        node.config.stash[RECORD].take(sent)
