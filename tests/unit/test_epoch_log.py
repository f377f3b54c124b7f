"""The volume server's history is bounded, and a disk that refuses it stops nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emp.volumes.server import epochs
from emp.volumes.server.epochs import EpochLog


def test_it_is_bounded_and_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs, "LONGEST_BYTES", 1000)
    log = EpochLog(tmp_path / "epochs.log")
    for epoch in range(1, 101):
        log.note("claim", "vol-1", node="n1", epoch=epoch, tag=epoch)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["epochs.log", "epochs.log.1"]
    kept = [
        json.loads(line)["epoch"] for name in reversed(files) for line in (tmp_path / name).read_text().splitlines()
    ]
    assert kept == list(range(kept[0], 101))
    assert sum((tmp_path / name).stat().st_size for name in files) < 2500


def test_what_cannot_be_written_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    EpochLog(tmp_path / "nowhere" / "epochs.log").note("fence", "vol-1", epoch=3)
    assert "epochs.log" in caplog.text
