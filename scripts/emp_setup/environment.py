"""The Python environment in ``.venv``: hash-pinned requirements, and the project itself.

Packages come from whatever index the user's pip is set up with; the hashes make it not matter which.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from emp_setup.console import Refusal, quietly, say
from emp_setup.packages import Need

VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
RUNTIME = Path("requirements.txt")
DEVELOPMENT = Path("requirements-dev.txt")
"""Holds all of ``RUNTIME`` as well."""
PROJECT = Path("pyproject.toml")


def needs() -> list[Need]:
    """Return the packages without which no environment can be made: Debian keeps venv's pip in one of its own."""
    if PYTHON.exists() or importlib.util.find_spec("ensurepip") is not None:
        return []
    if not Path(sys.executable).resolve().is_relative_to("/usr/bin"):
        raise Refusal(f"{sys.executable} has no ensurepip, so it cannot make an environment: name another with PYTHON=")
    package = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    return [Need((package,), "make the Python environment")]


def ensure(*, development: bool) -> None:
    """Create ``.venv`` and install into it what its stamps say is not there yet.

    :raises Refusal: pip failed; ends with what it printed
    """
    _create()
    if development or not _is_current(DEVELOPMENT):
        _require(DEVELOPMENT if development else RUNTIME)
    if not _is_current(PROJECT) or not (VENV / "bin" / "emp").exists():
        # The build back end is among the requirements, so that no index is asked for anything here.
        _pip("--no-deps", "--no-build-isolation", "--no-index", "--editable", ".", doing="installing EMP in .venv")
        _stamp(PROJECT)
    if os.geteuid() != 0:
        # The lab runs as root: were it the first to compile these, the user could not remove the result.
        quietly([str(PYTHON), "-m", "compileall", "-q", "src"], doing="compiling src")


def _create() -> None:
    if PYTHON.exists() and subprocess.run([PYTHON, "-c", ""], check=False).returncode == 0:
        return
    if VENV.exists():
        say("making .venv anew: its Python is gone")
        shutil.rmtree(VENV)
    say(f"making the Python environment .venv with Python {sys.version.split()[0]}")
    quietly([sys.executable, "-m", "venv", str(VENV)], doing="making .venv")


def _require(requirements: Path) -> None:
    if _is_current(requirements):
        return
    count = sum(line[:1].isalnum() for line in requirements.read_text().splitlines())
    say(f"installing {count} Python packages in .venv, pinned by hash in {requirements}: EMP runs on them")
    _pip("--require-hashes", "-r", str(requirements), doing=f"installing {requirements}")
    _stamp(requirements)


def _pip(*arguments: str, doing: str) -> None:
    if subprocess.run([PYTHON, "-c", "import pip"], stderr=subprocess.DEVNULL, check=False).returncode != 0:
        quietly([str(PYTHON), "-m", "ensurepip"], doing="adding pip to .venv")
    quietly([str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", *arguments], doing=doing)


def _stamp_of(file: Path) -> Path:
    return VENV / f".installed-{file.name}.sha256"


def _is_current(file: Path) -> bool:
    stamp = _stamp_of(file)
    return stamp.exists() and stamp.read_text() == _digest(file)


def _stamp(file: Path) -> None:
    _stamp_of(file).write_text(_digest(file))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
