"""Bad input, through the real ``emp`` and a real pool: each gets its exit code, and says which field, why, what to do.

What needs no pool is tested elsewhere: labs whose name, port or namespace is taken, invalid, or without QEMU in
``test_lab``; no root and no sudo in ``tests/unit/test_lab_preflight`` and ``tests/unit/test_setup``; command lines that
the client itself refuses in ``tests/unit/test_cli_errors``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from emp.lab.state import LabFiles, lab_names
from emp.model.evm import EvmState
from emp.model.migration import Outcome
from tests.lab.conftest import EMP, Pool, run_lab
from tests.lab.pool import WAIT_S, Subject, agent_away, subject, until

LONG = "x" * 300
NODE_BYTES = 4 << 30
"""what a node of the shared pool offers"""


@dataclass(frozen=True)
class Refusal:
    """What ``emp`` said on stderr, line by line."""

    exit_code: int
    error: str
    field: str | None
    hint: str | None


def refusal(pool: Pool, *arguments: str) -> Refusal:
    """Run a command that must fail, and read its error block."""
    done = pool.emp(*arguments, check=False)
    assert (done.returncode != 0, done.stdout) == (True, "")
    said = {label: text.strip() for label, _, text in (line.partition(":") for line in done.stderr.splitlines())}
    return Refusal(done.returncode, said["error"], said.get("field"), said.get("hint"))


@pytest.fixture(scope="module")
def evm(pool: Pool) -> Iterator[Subject]:
    """One EVM on n1 for all that is refused: nothing may happen to it."""
    with subject(pool, node="n1", name="steady", boots=False) as evm:
        before = evm.record, evm.qemus()
        yield evm
        assert (evm.record, evm.qemus()) == before


# ---- migrating -------------------------------------------------------------------------------------------------------


def test_an_unknown_evm(pool: Pool) -> None:
    said = refusal(pool, "migrate", "nobody", "--to", "n2")
    assert (said.exit_code, said.field) == (3, "evm")
    assert "'nobody'" in said.error


def test_an_unknown_node(pool: Pool, evm: Subject) -> None:
    said = refusal(pool, "migrate", evm.name, "--to", "n9")
    assert (said.exit_code, said.field) == (3, "target")
    assert "'n9'" in said.error
    assert refusal(pool, "node", "cordon", "n9").exit_code == 3
    assert refusal(pool, "evm", "create", "other", "--node", "n9").exit_code == 3


def test_a_target_that_is_the_source(pool: Pool, evm: Subject) -> None:
    said = refusal(pool, "migrate", evm.name, "--to", "n1")
    assert (said.exit_code, said.field) == (2, "target")
    assert "already runs on n1" in said.error
    assert "another node" in (said.hint or "")


def test_a_target_that_is_cordoned(pool: Pool, evm: Subject) -> None:
    pool.emp("node", "cordon", "n2")
    try:
        said = refusal(pool, "migrate", evm.name, "--to", "n2")
        assert refusal(pool, "evm", "create", "other", "--node", "n2").exit_code == 5
    finally:
        pool.emp("node", "uncordon", "n2")
    assert (said.exit_code, said.field) == (5, "target")
    assert "cordoned" in said.error
    assert "uncordon" in (said.hint or "")


def test_a_node_whose_agent_has_died(pool: Pool, evm: Subject) -> None:
    with agent_away(pool, evm.client, "n2"):
        until(lambda: not evm.client.nodes.get("n2").ready, "n2 is down")
        said = refusal(pool, "migrate", evm.name, "--to", "n2")
        starting = refusal(pool, "evm", "create", "other", "--node", "n2")
        listed, shown = pool.emp("node", "list").stdout, pool.emp("node", "show", "n2").stdout
    assert (said.exit_code, said.field) == (7, "target")
    assert "n2 is down" in said.error
    assert "has not answered since 20" in said.error
    assert "start its agent" in (said.hint or "")
    assert starting.exit_code in (5, 7)
    assert "down since " in listed
    assert "down" in shown


def test_an_evm_whose_node_has_died(pool: Pool) -> None:
    with subject(pool, node="n3", boots=False) as lonely:
        with agent_away(pool, lonely.client, "n3"):
            lonely.wait(EvmState.UNKNOWN)
            said = refusal(pool, "migrate", lonely.name, "--to", "n2")
            shown = pool.emp("evm", "show", lonely.name).stdout
        lonely.check_only_on("n3")
    assert (said.exit_code, said.field) == (7, "evm")
    assert "has not answered since 20" in said.error
    assert "has not answered since 20" in " ".join(shown.split())


def test_a_target_short_of_memory(pool: Pool, evm: Subject) -> None:
    with subject(pool, node="n2", memory_bytes=NODE_BYTES - (64 << 20), boots=False):
        said = refusal(pool, "migrate", evm.name, "--to", "n2")
        create = refusal(pool, "evm", "create", "other", "--memory", "128MiB", "--node", "n2")
        anywhere = refusal(pool, "evm", "create", "other", "--memory", "4GiB", "--node", "n1")
    assert (said.exit_code, said.field) == (5, "target")
    assert "64 MiB free" in said.error
    assert "128 MiB needed" in said.error
    assert said.hint
    assert (create.exit_code, anywhere.exit_code) == (5, 5)
    assert "64 MiB free" in create.error


def test_a_target_whose_frames_are_smaller(pool: Pool, evm: Subject) -> None:
    """Its bridge says how much fits; the lab's nodes all have the same, until somebody changes one."""
    link = ("exec", "--name", pool.name, "n2", "--", "ip", "link", "set", "dev", "br0", "mtu")
    run_lab(*link, "1400")
    try:
        until(lambda: evm.client.nodes.get("n2").report.mtu_bytes == 1400, "n2 reports it")
        said = refusal(pool, "migrate", evm.name, "--to", "n2")
    finally:
        run_lab(*link, "1500")
    until(lambda: evm.client.nodes.get("n2").report.mtu_bytes == 1500, "n2 is as before")
    assert said.exit_code == 5
    assert "1500 bytes on the source, 1400 bytes on the target" in said.error


def test_no_node_that_fits(pool: Pool, evm: Subject) -> None:
    said = refusal(pool, "evm", "create", "other", "--memory", "5GiB")
    assert said.exit_code == 5
    for node in ("n1", "n2", "n3"):
        assert f"{node}: " in said.error
    assert said.hint


def test_an_evm_that_is_stopped(pool: Pool) -> None:
    with subject(pool, boots=False) as stopped:
        pool.emp("evm", "stop", stopped.name, "--grace", "0")
        said = refusal(pool, "migrate", stopped.name)
        console = refusal(pool, "evm", "console", stopped.name)
    assert (said.exit_code, said.field) == (4, "evm")
    assert "is stopped, not running" in said.error
    assert f"emp evm start {stopped.name}" in (said.hint or "")
    assert console.exit_code == 4


def test_an_evm_that_is_already_migrating(pool: Pool) -> None:
    with subject(pool, node="n1", boots=False) as moving:
        under_way = moving.begin_slow("n2")
        said = refusal(pool, "migrate", moving.name, "--to", "n3")
        others = [
            refusal(pool, "evm", verb, moving.name, *options)
            for verb, *options in (["stop", "--grace", "0"], ["recover"], ["start"])
        ]
        back = [pool.emp("migration", "abort", under_way.id).stdout for _ in range(2)]
        moving.end_of(under_way)
        moving.check_only_on("n1")
    assert (said.exit_code, said.field) == (4, "evm")
    assert f"already migrating ({under_way.id})" in said.error
    assert f"emp migration watch {under_way.id}" in (said.hint or "")
    for other in others:
        assert other.exit_code == 4
        assert under_way.id in other.error
    for answer in back:
        assert answer.startswith(f"{under_way.id}: {moving.name} is back on n1, running")


def test_an_evm_that_is_deleted_while_it_migrates(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"], boots=False) as moving:
        under_way = moving.begin_slow("n2")
        (volume,) = moving.record.spec.volumes
        pool.emp("evm", "delete", moving.name)
        assert moving.client.migrations.get(under_way.id).outcome is Outcome.ABORTED
        assert moving.qemus() == {}
        assert volume not in [each.id for each in moving.client.volumes.list().items]


# ---- names and sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "field", "says"),
    [
        (["evm", "create", "../x"], "name", "not a valid name"),
        (["evm", "create", "a,b=c"], "name", "not a valid name"),
        (["evm", "create", LONG], "name", "not a valid name"),
        (["evm", "create", "web", "--memory", "12Q"], "memory", "'12Q' is not a size"),
        (["evm", "create", "web", "--memory", "0"], "memory", "out of range"),
        (["evm", "create", "web", "--memory", "100B"], "memory_bytes", ""),
        (["evm", "create", "web", "--vcpus", "0"], "vcpus", ""),
        (["evm", "create", "web", "--vcpus", "999"], "vcpus", ""),
        (["evm", "create", "web", "--image", "a,b=c"], "image", "not a valid name"),
        (["evm", "create", "web", "--node", "../x"], "node", "not a valid name"),
        (["evm", "create", "web", "--pod", "../x"], "pods[0]", "not a valid name"),
        (["evm", "create", "web", "--pod", "shop=10.77.1"], "pods[0]", "not an IP address"),
        (["evm", "create", "web", "--pod", "shop=10.99.0.1"], "pods[0]", "10.99.0.1 is not an address"),
        (["evm", "create", "web", "--volume", "io2:12Q"], "volumes[0]", "'12Q' is not a size"),
        (["evm", "create", "web", "--volume", "ssd:1GiB"], "volumes[0]", "'ssd' is not a volume type"),
        (["evm", "create", "web", "--restart", "sometimes"], "restart", ""),
        (["evm", "create", "web", "--cpu", "host"], "cpu_model", "host"),
        (["volume", "create", "io2:12Q"], "size", "'12Q' is not a size"),
        (["migrate", "../x"], "evm", "not a valid name"),
        (["migrate", LONG], "evm", "not a valid name"),
        (["migrate", "steady", "--to", "../x"], "target", "not a valid name"),
        (["migrate", "steady", "--to", "a,b=c"], "target", "not a valid name"),
        (["migrate", "steady", "--max-bandwidth", "12Q"], "max-bandwidth", "'12Q' is not a size"),
        (["node", "show", "a,b=c"], "node", "not a valid name"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_invalid_names_and_sizes(pool: Pool, evm: Subject, arguments: list[str], field: str, says: str) -> None:
    said = refusal(pool, *arguments)
    assert (said.exit_code, said.field) == (2, field), said
    assert says in said.error
    assert len(said.error) < 200


@pytest.mark.parametrize("name", ["../x", "a,b=c", LONG])
def test_an_invalid_context_reaches_no_path(name: str, pool: Pool) -> None:
    done = pool.emp("--context", name, "evm", "list", check=False)
    assert (done.returncode, "not a valid name" in done.stderr) == (2, True)


def test_what_is_taken_already(pool: Pool, evm: Subject) -> None:
    again = refusal(pool, "evm", "create", evm.name)
    assert (again.exit_code, again.field) == (4, "name")
    assert "choose another" in (again.hint or "")
    address = refusal(pool, "evm", "create", "other", "--pod", f"shop={evm.guest().address}")
    assert (address.exit_code, address.field) == (4, "pods[0]")
    assert f"{evm.guest().address} is taken" in address.error


def test_nothing_came_of_what_was_refused(pool: Pool, evm: Subject) -> None:
    assert [one.spec.name for one in evm.client.evms.list().items] == [evm.name]
    assert evm.client.volumes.list().items == ()


# ---- the pool and the machine ----------------------------------------------------------------------------------------


def test_a_controller_that_cannot_be_reached(pool: Pool, evm: Subject) -> None:
    pool.kill("ctl", "controller")
    try:
        said = refusal(pool, "migrate", evm.name, "--to", "n2")
        listed = refusal(pool, "evm", "list")
    finally:
        pool.start("ctl", "controller")
    assert (said.exit_code, listed.exit_code) == (7, 7)
    assert f"https://127.0.0.1:{pool.state.port} cannot be reached" in said.error
    assert "emp lab status" in (said.hint or "")
    until(lambda: all(node.ready for node in evm.client.nodes.list().items), "every node is ready", timeout_s=WAIT_S)
    evm.check_only_on("n1")


def test_a_qemu_that_is_too_old(lab_home: Path, tmp_path: Path) -> None:
    old = tmp_path / "qemu-system-x86_64"
    old.write_text("#!/bin/sh\necho 'QEMU emulator version 9.2.4 (Debian 1:9.2.4)'\n")
    old.chmod(0o755)
    done = run_lab("up", "--name", "old", check=False, EMP_QEMU=str(old))
    assert done.returncode == 10
    assert f"{old} is QEMU 9.2.4, and 10.0 is needed" in done.stderr
    assert "EMP_QEMU=PATH" in done.stderr
    assert "old" not in lab_names()
    assert not LabFiles("old").directory.exists()


def test_an_agent_without_a_qemu(tmp_path: Path) -> None:
    config = {
        "pool": "pool", "node": "n1", "address": "127.0.0.1", "controller_url": "https://127.0.0.1:1",
        "credentials": str(tmp_path), "qemu_credentials": str(tmp_path), "state_dir": str(tmp_path / "state"),
        "run_dir": str(tmp_path / "run"), "memory_bytes": 1 << 30, "vcpus": 1, "qemu": str(tmp_path / "nowhere"),
    }  # fmt: skip
    (tmp_path / "agent.json").write_text(json.dumps(config))
    command = [*EMP, "agent", "--config", str(tmp_path / "agent.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert done.returncode == 10, done.stderr
    assert "nowhere" in done.stderr
    assert "apt install" in done.stderr
    assert "Traceback" not in done.stderr


AS_NOBODY = """
import os, sys
import emp.cli.root, emp.lab.cli  # before root's own files are out of sight
from emp.cli.main import main
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
sys.argv = ["emp", "lab", "up", "--name", "mine"]
main()
"""


def test_no_root_and_no_sudo(lab_home: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 10, done.stderr
    assert "needs root" in done.stderr
    assert "no sudo" in done.stderr
    assert "install sudo" in done.stderr
