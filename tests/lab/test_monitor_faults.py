"""The QMP proxy in a lab: a test reaches into the monitors of one node's QEMUs, also of one that is not there yet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from emp.lab.down import down
from emp.lab.up import Options, up
from tests.fault.qmp_faults import QmpFaults, install
from tests.lab.conftest import Pool
from tests.lab.pool import subject
from tests.leaks import outliving

NAME = "proxied"


@pytest.fixture
def proxied(lab_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setenv("EMP_QEMU", str(install(lab_home / "proxy")))
    with outliving(f"the lab {NAME}"):
        made = Pool(up(Options(NAME, 2)))
    yield made
    down(made.files)


def test_a_targets_first_cont_is_held_and_the_migration_ends_once_it_passes(proxied: Pool) -> None:
    with subject(proxied, node="n1") as evm:
        faults = QmpFaults.of_place(proxied.files, "n2")
        held = faults.hold("command", "cont", evm=evm.name, times=1)
        migration = evm.begin("n2")
        held.wait()
        assert evm.client.migrations.get(migration.id).outcome is None
        held.release()
        evm.end_of(migration)
        evm.check_only_on("n2")
        assert len(faults.messages("event", "RESUME")) >= 1
