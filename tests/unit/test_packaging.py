"""The systemd units that are shipped: what must hold of them, and what systemd itself says of them."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from emp.lab import keeper

UNITS = sorted((Path(__file__).parents[2] / "packaging" / "systemd").glob("*.service"))
SURVIVED = {"emp-agent": "QEMUs", "emp-volumes": "exports"}
"""services whose children run on when they are stopped"""


def service(path: Path) -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]  # names are told apart by case
    unit.read(path)
    return unit["Service"]


def test_every_daemon_has_a_unit() -> None:
    assert [path.stem for path in UNITS] == ["emp-agent", "emp-controller", "emp-volumes"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_restarts_for_ever_and_kills_no_guest(path: Path) -> None:
    found = service(path)
    assert (found["Restart"], float(found["RestartSec"])) == ("always", keeper.PAUSE_S)  # a lab shows what they do
    assert "StartLimitIntervalSec=0" in path.read_text()
    assert int(found["LimitNOFILE"]) >= 65536
    assert found["LimitCORE"] == "0"  # a core of QEMU is the guest's memory
    assert found["NoNewPrivileges"] == "yes"
    if path.stem in SURVIVED:
        assert (found["KillMode"], found["Delegate"]) == ("process", "yes")
        # in a mount namespace of its own, a restarted daemon would not see what the survivors see
        assert not {"PrivateTmp", "PrivateDevices", "ProtectHome", "ProtectSystem"} & found.keys()


def test_the_agents_sockets_outlive_it() -> None:
    agent = service(UNITS[0])
    assert (agent["RuntimeDirectory"], agent["RuntimeDirectoryPreserve"]) == ("emp", "yes")
    assert "MemoryDenyWriteExecute" not in agent  # TCG would be killed
    assert "SystemCallFilter" not in agent


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for path in UNITS:
        lines = path.read_text().splitlines()
        made = ["ExecStart=/bin/true" if line.startswith("ExecStart=") else line for line in lines]
        made = [line for line in made if not line.startswith("Documentation=")]
        (tmp_path / path.name).write_text("\n".join(made) + "\n")
    names = [str(tmp_path / path.name) for path in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
