"""What a lab wants of the machine, and what it says when that is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from emp.lab import preflight
from emp.model.errors import MissingDependency


def program(path: Path, output: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


def test_a_named_qemu_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = program(tmp_path / "qemu", "QEMU emulator version 10.1.2 (v10.1.2)")
    monkeypatch.setenv("EMP_QEMU", str(qemu))
    assert preflight.check_qemu() == (str(qemu), "10.1.2")


def test_the_qemu_on_the_path_is_not_named_to_the_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / preflight.QEMU, "QEMU emulator version 10.0.2 (Debian 1:10.0.2)")
    monkeypatch.delenv("EMP_QEMU", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight.check_qemu() == (None, "10.0.2")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("QEMU emulator version 7.2.22 (Debian)", r"QEMU 7\.2\.22, and 10\.0 is needed"),
        ("QEMU emulator version 9.2.4", r"QEMU 9\.2\.4, and 10\.0"),
        ("something else", "does not say which QEMU"),
    ],
)
def test_an_old_or_strange_qemu_is_refused(
    said: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMP_QEMU", str(program(tmp_path / "qemu", said)))
    with pytest.raises(MissingDependency, match=expected):
        preflight.check_qemu()


def test_a_missing_qemu_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMP_QEMU", str(tmp_path / "gone"))
    with pytest.raises(MissingDependency, match="gone is no program"):
        preflight.check_qemu()
    monkeypatch.delenv("EMP_QEMU")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"not installed.*make setup"):
        preflight.check_qemu()


def test_a_missing_program_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="iproute2"):
        preflight.check_programs()


def test_without_root_and_without_sudo_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"needs root.*network namespaces.*no sudo") as caught:
        preflight.become_root()
    assert caught.value.hint is not None
    assert "install sudo" in caught.value.hint


def test_without_root_the_same_command_goes_through_sudo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sudo = program(tmp_path / "sudo", "")
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "execv", lambda path, argv: calls.append((path, argv)))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EMP_LAB_DIR", "/x y")
    for name in preflight.KEPT_VARIABLES[1:]:
        monkeypatch.delenv(name, raising=False)
    preflight.become_root(["emp", "lab", "up"])
    assert calls == [(str(sudo), [str(sudo), "--", "env", "EMP_LAB_DIR=/x y", "emp", "lab", "up"])]
    assert "needs root" in capfd.readouterr().err


def test_root_just_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    preflight.become_root(["never", "run"])
