"""EFS in a pool: a mount goes on over migrations with its locks and its files, because nothing of it is moved."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from emp.lab.checkers import leftovers
from emp.lab.down import down
from emp.lab.isolation import violations
from emp.lab.journal_check import check_journal
from emp.lab.region import Profile
from emp.lab.topology import VOL
from emp.lab.up import Options, up
from emp.model.errors import HostError
from tests.lab import cloud
from tests.lab.conftest import Evm, Pool
from tests.lab.served import Served
from tests.leaks import outliving

NAME = "efs"
PATIENCE_S = 60.0


def until(what: Callable[[], object], why: str) -> Any:
    """Return what ``what`` returns, once that is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < deadline, why
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def pool(lab_home: Path) -> Iterator[Pool]:
    with cloud.cloud_of_three(NAME) as made:
        yield made


@pytest.fixture(scope="module")
def served(pool: Pool) -> Served:
    with outliving(f"the lab {NAME}"):
        return Served(pool)


@pytest.fixture
def new_evm(pool: Pool) -> Iterator[Callable[..., Evm]]:
    """Make an EVM with the file system mounted."""
    with ExitStack() as stack:

        def make(served: Served, *options: str) -> Evm:
            evm = stack.enter_context(pool.evm("--efs", served.id, *options)).ready()
            until(lambda: mounted(evm, served), f"{evm.name} does not mount {served.id}")
            return evm

        yield make


def mounted(evm: Evm, served: Served) -> bool:
    """Whether the guest has it mounted, by a lock in it that is taken and dropped."""
    probe = f"{served.home}/{evm.name}"
    answer = tell(evm, f"lock take {probe}")
    if "error" in answer:
        return False
    tell(evm, f"lock drop {probe}")
    return served.holds(probe)


def tell(evm: Evm, command: str) -> Any:
    """Return the guest's answer, a refusal too."""
    try:
        return evm.guest.ask(command, timeout_s=PATIENCE_S)
    except HostError as error:
        return {"error": str(error)}


def grows(evm: Evm) -> None:
    """Return once the file that the guest writes has become longer."""
    before = tell(evm, "journal status")[0]["acked_seq"]
    until(lambda: tell(evm, "journal status")[0]["acked_seq"] > before + 5, "the file does not grow")


def migrate(evm: Evm, to: str) -> dict[str, Any]:
    with outliving(f"the lab {NAME}"):
        return dict(evm.pool.json("migrate", evm.name, "--to", to))


def test_a_mount_its_lock_and_its_file_go_there_and_back(
    pool: Pool, served: Served, new_evm: Callable[..., Evm]
) -> None:
    mover, other = new_evm(served, "--node", "n1"), new_evm(served, "--node", "n2")
    lock, journal = f"{served.home}/there.lock", f"{served.home}/there.j"
    assert tell(mover, f"lock take {lock}")["held"]
    tell(mover, f"journal start {journal} 50")
    for node in ("n2", "n1"):
        assert migrate(mover, node)["outcome"] == "completed"
        assert mover.owner == node
        assert "locked by another" in tell(other, f"lock take {lock}")["error"]
        assert served.locked("there.lock")
        assert [held["held"] for held in tell(mover, "lock status")] == [True]
        grows(mover)
    (written,) = tell(mover, "journal stop")
    report = check_journal(served.data / "there.j")
    assert (report.errors, report.missing(written["acked_seq"]), written["errors"]) == ((), 0, 0)
    assert len(report.boot_ids) == 1, "no remount, no reboot"
    tell(mover, f"lock drop {lock}")
    assert tell(other, f"lock take {lock}")["held"], "a lock that was dropped is free"


def test_an_abort_keeps_the_mount_and_the_lock(pool: Pool, served: Served, new_evm: Callable[..., Evm]) -> None:
    evm = new_evm(served, "--node", "n1", "--pod", "p")
    lock = f"{served.home}/abort.lock"
    assert tell(evm, f"lock take {lock}")["held"]
    with outliving(f"the lab {NAME}"):
        begun = pool.json("migrate", evm.name, "--to", "n2", "--detach", "--max-bandwidth", "4MiB")
        pool.emp("migration", "abort", begun["id"], check=False)
    done = until(
        lambda: (m := pool.json("migration", "show", begun["id"]))["stage"] == "closed" and m, "it does not end"
    )
    assert done["outcome"] == "aborted"
    assert evm.owner == "n1"
    assert [held["held"] for held in tell(evm, "lock status")] == [True]
    assert served.locked("abort.lock")


def test_a_target_in_another_zone_is_told_of_and_taken(pool: Pool, served: Served, new_evm: Callable[..., Evm]) -> None:
    evm = new_evm(served, "--node", "n1")
    plan = pool.json("migrate", evm.name, "--to", "n3", "--dry-run")
    (check,) = [each for each in plan["checks"] if each["name"] == "efs"]
    assert check["ok"]
    assert "from lab-1b: slower" in check["message"]
    assert migrate(evm, "n3")["outcome"] == "completed"
    assert mounted(evm, served)


def test_a_target_that_does_not_reach_the_mount_target_is_refused(pool: Pool, new_evm: Callable[..., Evm]) -> None:
    with outliving(f"the lab {NAME}"):
        lost = Served(pool)
    evm = new_evm(lost, "--node", "n1")
    address = evm.record["spec"]["efs"][0]["address"]
    (gone,) = [target for target in lost.record["targets"] if target["address"] == address]
    cloud.call(pool, "delete_mount_target", service="efs", MountTargetId=gone["id"])
    until(lambda: lost.pid() is None, "its server goes on")
    refused = pool.emp("migrate", evm.name, "--to", "n2", check=False)
    assert refused.returncode == 5
    said = " ".join(refused.stderr.split())
    assert f"{lost.id} has no mount target at {address} any more" in said, said
    assert evm.owner == "n1"


@pytest.mark.parametrize(
    ("efs", "status", "words"),
    [
        ("fs-0123456789abcdef0", 3, "there is no file system fs-0123456789abcdef0"),
        ("vol-1", 2, "is not the id of a file system"),
        ("fs-0123456789abcdef0:data", 2, "is not a path"),
    ],
)
def test_what_cannot_be_mounted_is_refused_at_once(pool: Pool, efs: str, status: int, words: str) -> None:
    done = pool.emp("evm", "create", "never", "--efs", efs, check=False)
    assert (done.returncode, words in " ".join(done.stderr.split())) == (status, True), done.stderr


def test_a_file_system_that_is_mounted_is_not_deleted(pool: Pool, served: Served, new_evm: Callable[..., Evm]) -> None:
    evm = new_evm(served)
    done = pool.emp("volume", "delete", served.id, check=False)
    assert done.returncode == 4
    assert f"is mounted by EVM {evm.name}" in " ".join(done.stderr.split())
    assert served.id in pool.emp("volume", "list", "--efs").stdout


def test_the_cloud_killed_and_started_again_finds_its_server(pool: Pool, served: Served) -> None:
    before = served.pid()
    assert before is not None
    pool.kill(VOL.name, "volumes")
    assert served.pid() == before, "a server outlives its daemon"
    pool.start(VOL.name, "volumes")
    shown = until(lambda: _shown(pool, served.id), "the cloud does not answer")
    assert shown["targets"] == served.record["targets"]
    assert served.pid() == before


def _shown(pool: Pool, file_system: str) -> Any:
    done = pool.emp("volume", "show", file_system, "--json", check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def test_a_second_lab_shares_nothing_with_the_first(pool: Pool, served: Served) -> None:
    with outliving("the lab efs-two"):
        second = Pool(up(Options("efs-two", 1, cloud=Profile.INSTANT)))
    try:
        with outliving("the lab efs-two"):
            theirs = Served(second)
        assert theirs.address == served.address, "the same address, in another network"
        assert not (theirs.data / "there.lock").exists()
        assert violations(second.files) == []
        assert violations(pool.files) == []
    finally:
        down(second.files)
    assert served.pid() is not None


def test_a_file_system_that_is_deleted_leaves_nothing(pool: Pool) -> None:
    before = leftovers.take(pool.files)
    with outliving(f"the lab {NAME}"):
        made = Served(pool)
        planted = leftovers.take(pool.files).left(before)
        assert any("ganesha.nfsd" in thing for thing in planted), planted
        assert any(f"address {made.address}" in thing for thing in planted), planted
        pool.emp("volume", "delete", made.id)
    assert leftovers.take(pool.files).left(before) == []
    assert not made.data.exists()


def test_a_server_that_dies_during_a_migration_stalls_and_loses_nothing(
    pool: Pool, served: Served, new_evm: Callable[..., Evm]
) -> None:
    """The last test: new locks wait in the grace period for clients of earlier tests, which never come back."""
    evm = new_evm(served, "--node", "n1")
    lock, journal = f"{served.home}/dies.lock", f"{served.home}/dies.j"
    assert tell(evm, f"lock take {lock}")["held"]
    tell(evm, f"journal start {journal} 50")
    with outliving(f"the lab {NAME}"):
        begun = pool.json("migrate", evm.name, "--to", "n2", "--detach")
    served.kill()
    done = until(
        lambda: (m := pool.json("migration", "show", begun["id"]))["stage"] == "closed" and m, "it does not end"
    )
    assert done["outcome"] == "completed"
    (held,) = tell(evm, "lock status")  # waits until the server is back and the lock is reclaimed
    assert held["held"], held
    until(lambda: served.locked("dies.lock"), "the lock is not reclaimed")
    grows(evm)
    (written,) = tell(evm, "journal stop")
    report = check_journal(served.data / "dies.j")
    assert (report.errors, report.missing(written["acked_seq"]), written["errors"]) == ((), 0, 0)
