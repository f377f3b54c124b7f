"""The larger share of the processors: what it leaves behind, with real control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from emp.host import schedule
from emp.host.schedule import larger_share


def mine() -> str:
    return Path("/proc/self/cgroup").read_text()


def test_a_process_is_in_its_group_again_afterwards() -> None:
    before = mine()
    with larger_share() as allowed:
        if not allowed:
            pytest.skip("this machine has no control group for processors")
        assert "/emp-bench" in mine()
    assert mine() == before
    assert not [base for base, _, _ in schedule._SHARES if (base / "emp-bench").exists()]


def test_nothing_is_made_where_there_are_no_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_SHARES", ((tmp_path, "cpu.weight", 10_000),))
    with larger_share() as allowed:
        assert not allowed
    (tmp_path / "cgroup.procs").touch()
    with larger_share() as allowed:
        assert not allowed
    assert [found.name for found in tmp_path.iterdir()] == ["cgroup.procs"]
