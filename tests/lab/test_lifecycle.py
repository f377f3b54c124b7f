"""What becomes of an EVM whose guest reboots, shuts down or panics, or whose QEMU dies; and what if that happens amid a
migration."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from emp.lab.guest_control import Guest
from emp.lab.state import LabFiles
from emp.model.errors import Conflict
from emp.model.evm import EvmState, RestartPolicy
from emp.model.migration import Outcome
from tests.lab.conftest import Pool, run_emp, run_lab
from tests.lab.pool import WAIT_S, Subject, subject, until
from tests.lab.test_migration import check_back_on

PANIC = "echo c >/proc/sysrq-trigger"


def in_shell(evm: Subject, line: str) -> None:
    evm.shell()
    evm.type(line)


def kill_qemu(evm: Subject) -> None:
    evm.pool.kill(evm.record.owner or "", f"qemu:{evm.name}")


def started_anew(evm: Subject, boot_id: str, pid: int) -> tuple[str, int]:
    """Return boot id and pid once the EVM runs on its node again, in another QEMU."""
    anew = evm.reboots(boot_id)
    evm.check_only_on("n1")
    (after,) = evm.qemus().values()
    assert after != pid
    return anew, after


def test_a_guest_that_is_asked_to_shut_down_while_it_boots_does(pool: Pool) -> None:
    """It has not heard the first press of its power button."""
    with subject(pool, boots=False, node="n1") as evm:
        stopped = evm.client.evms.stop(evm.name, grace_s=WAIT_S)
        assert (stopped.state, stopped.reason) == (EvmState.STOPPED, "shut down on request")


def test_a_guest_that_nobody_paused_on_purpose_runs_again(pool: Pool) -> None:
    with subject(pool, node="n1") as evm:
        evm.tell_qemu("n1", "stop")
        evm.wait(EvmState.RUNNING)
        evm.guest().ask("status")


def test_how_long_a_lab_and_an_evm_take_to_be_there(lab_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figures for people, not limits: a busy machine may need longer. Aims: 5 s for the lab, 6 s for the EVM."""
    name = "timed"
    try:
        began = time.monotonic()
        run_lab("up", "--name", name, "--nodes", "3")
        lab_s = time.monotonic() - began
        topology = LabFiles(name).load().topology
        began = time.monotonic()
        made = json.loads(run_emp("--context", name, "evm", "create", "web", "--json").stdout)
        Guest(topology, made["spec"]["nics"][0]["address"]).wait_first_packet(timeout_s=WAIT_S)
        evm_s = time.monotonic() - began
    finally:
        run_lab("down", "--name", name)
    with capsys.disabled():
        print(f"\n  lab of 3 nodes up after {lab_s:.1f} s; first packet {evm_s:.1f} s after emp evm create", end="")
    assert lab_s < WAIT_S


def test_a_reboot_from_inside_stays_in_the_same_machine(pool: Pool) -> None:
    with subject(pool, node="n1") as evm:
        boot_id, qemus = evm.boot_id, evm.qemus()
        in_shell(evm, "reboot")
        assert evm.reboots(boot_id) != boot_id
        assert evm.qemus() == qemus
        evm.check_only_on("n1")


def test_never_leaves_an_evm_as_it_ended(pool: Pool) -> None:
    with subject(pool, node="n1", restart=RestartPolicy.NEVER) as evm:
        boot_id, pid = evm.boot_id, evm.qemus()["n1"]
        in_shell(evm, PANIC)
        assert "panic" in (evm.wait(EvmState.PANICKED).reason or "")
        pool.emp("evm", "start", evm.name)
        boot_id, pid = started_anew(evm, boot_id, pid)
        kill_qemu(evm)
        assert "QEMU" in (evm.wait(EvmState.CRASHED).reason or "")
        assert not evm.qemus()
        in_a_migration = pool.emp("migrate", evm.name, check=False)
        assert (in_a_migration.returncode, "crashed" in in_a_migration.stderr) == (4, True)


def test_on_failure_starts_again_what_failed_and_not_what_was_shut_down(pool: Pool) -> None:
    with subject(pool, node="n1", restart=RestartPolicy.ON_FAILURE) as evm:
        boot_id, pid = evm.boot_id, evm.qemus()["n1"]
        in_shell(evm, PANIC)
        boot_id, pid = started_anew(evm, boot_id, pid)
        kill_qemu(evm)
        boot_id, pid = started_anew(evm, boot_id, pid)
        in_shell(evm, "poweroff")
        assert "from inside" in (evm.wait(EvmState.STOPPED).reason or "")
        until(lambda: not any(trace for trace in evm.traces("n1") if trace.startswith(("QEMU", "tap"))), "it is gone")
        with pytest.raises(Conflict, match="stopped"):
            evm.begin("n2")


def test_always_starts_again_whatever_ended(pool: Pool) -> None:
    with subject(pool, node="n1", restart=RestartPolicy.ALWAYS) as evm:
        boot_id, pid = evm.boot_id, evm.qemus()["n1"]
        in_shell(evm, PANIC)
        boot_id, pid = started_anew(evm, boot_id, pid)
        in_shell(evm, "poweroff")
        boot_id, pid = started_anew(evm, boot_id, pid)
        stopped = evm.client.evms.stop(evm.name, grace_s=20)
        assert (stopped.state, stopped.want_running) == (EvmState.STOPPED, False)
        assert "on request" in (stopped.reason or "")


def test_a_guest_that_shuts_down_in_the_brownout_ends_the_migration(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        evm.shell()
        slow = evm.begin_slow("n2")
        evm.type("poweroff")
        ended = evm.end_of(slow)
        assert ended.outcome is Outcome.ABORTED
        assert "shut itself down" in (ended.cause or "")
        evm.wait(EvmState.STOPPED)
        until(lambda: not evm.qemus(), "no QEMU is left")
        assert not evm.traces("n2")


def test_a_target_qemu_that_dies_in_the_brownout_costs_the_migration_alone(pool: Pool) -> None:
    with subject(pool, node="n1") as evm:
        boot_id, pid = evm.boot_id, evm.qemus()["n1"]
        slow = evm.begin_slow("n2")
        pool.kill("n2", f"qemu:{evm.name}")
        ended = evm.end_of(slow)
        assert ended.outcome is Outcome.ABORTED
        assert ended.cause
        check_back_on(evm, "n1", boot_id, pid)


def test_a_source_qemu_that_dies_in_the_brownout_is_a_failure_like_any_other(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm:
        boot_id, pid = evm.boot_id, evm.qemus()["n1"]
        slow = evm.begin_slow("n2")
        pool.kill("n1", f"qemu:{evm.name}")
        ended = evm.end_of(slow)
        assert ended.outcome is Outcome.LOST
        started_anew(evm, boot_id, pid)
