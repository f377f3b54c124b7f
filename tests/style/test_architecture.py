"""The contracts in pyproject.toml bite: each is broken on purpose in a copy of the package, and the linter names it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.style.test_files import REPOSITORY

BREACHES = {
    "Imports point down": ("emp/wire/planted.py", "import emp.client"),
    "Nothing imports the lab": ("emp/controller/planted_lab.py", "import emp.lab"),
    "The core and the nouns are pure: no I/O, no clock, no chance": ("emp/migration/planted.py", "import time"),
    "The agent never imports the store": ("emp/agent/planted_store.py", "import emp.store.base"),
    "The controller touches a node through the agent's API alone": (
        "emp/controller/planted_host.py",
        "import emp.host.run",
    ),
    "wiring.py alone picks drivers": ("emp/agent/planted_driver.py", "import emp.network.l2"),
    "What a driver must do is said without knowing any": ("emp/volumes/base.py", "import emp.network.l2"),
    "The command line is a client and nothing else": ("emp/cli/planted.py", "import emp.agent"),
}
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, verbose=False))"


def lint(directory: Path) -> tuple[int, dict[str, str]]:
    """Run the linter on the package in ``directory``; return its exit status and contract -> KEPT or BROKEN."""
    done = subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    verdicts = re.findall(r"^(.+) (KEPT|BROKEN)\b", done.stdout, re.MULTILINE)
    return done.returncode, dict(verdicts)


def copy_of_the_package(directory: Path) -> Path:
    shutil.copy(REPOSITORY / "pyproject.toml", directory)
    shutil.copytree(REPOSITORY / "src" / "emp", directory / "emp", ignore=shutil.ignore_patterns("__pycache__"))
    return directory


def test_every_contract_bites(tmp_path: Path) -> None:
    copy = copy_of_the_package(tmp_path)
    for name, line in BREACHES.values():
        file = copy / name
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(f"{file.read_text() if file.exists() else ''}\n{line}\n")
    status, verdicts = lint(copy)
    assert status == 1
    assert verdicts == dict.fromkeys(BREACHES, "BROKEN")


def test_wiring_may_pick_drivers(tmp_path: Path) -> None:
    copy = copy_of_the_package(tmp_path)
    for daemon, driver in (("agent", "network.l2"), ("controller", "store.sqlite")):
        with (copy / "emp" / daemon / "wiring.py").open("a") as wiring:
            wiring.write(f"\nimport emp.{driver}\n")
    _, verdicts = lint(copy)
    assert verdicts["wiring.py alone picks drivers"] == "KEPT"


def test_every_contract_has_its_breach() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert {contract["name"] for contract in project["tool"]["importlinter"]["contracts"]} == set(BREACHES)
