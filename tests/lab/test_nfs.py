"""EFS's data plane and the guest's side: a real NFS server behind the simulated API, a real mount in a real guest.

No pool: what a migration does to a mount is in ``test_efs``.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from emp.host.processes import find
from emp.lab.cloud.efs_plane import PlanePoint, PlaneTarget
from emp.lab.cloud.ganesha import GaneshaPlane, make_directory
from emp.lab.images import ensure_image
from emp.lab.journal_check import check_journal
from emp.lab.nfs_program import ensure_nfs_program
from emp.model.efs import MOUNT_OPTIONS
from emp.model.errors import HostError
from emp.wire.identity import Role
from emp.wire.pki import CertificateAuthority
from tests.cloud.simulator import ACCESS_KEY, POOL, SUBNETS, ZONE, Simulator, simulated
from tests.lab.vm import BRIDGE, PATIENCE_S, Vm, control, segment, wait_for_echo
from tests.leaks import outliving

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="taps, and a server that acts for other users, need root")
NAME = "the NFS server and its guests"
FIRST, SECOND = "10.99.1.5", "10.99.1.6"
JOURNAL = "/efs/journal"
LOCK = "/efs/lock"


class Served:
    """A file system behind the API, with the directory that it really is."""

    def __init__(self, simulator: Simulator, plane: GaneshaPlane, state: Path) -> None:
        efs = simulator.efs_client()
        self.id = str(efs.create_file_system(CreationToken="one")["FileSystemId"])
        made = efs.create_mount_target(FileSystemId=self.id, SubnetId=SUBNETS[ZONE])
        self.target, self.address = str(made["MountTargetId"]), str(made["IpAddress"])
        self.efs = efs
        self.state = state
        self.data = plane.data(self.id)
        self.wait(self.serves)

    def serves(self) -> bool:
        (found,) = self.efs.describe_mount_targets(MountTargetId=self.target)["MountTargets"]
        return bool(found["LifeCycleState"] == "available")

    @property
    def pid(self) -> int | None:
        try:
            found = find(int((self.state / f"efs/run/{self.target}.pid").read_text()))
        except (OSError, ValueError):  # it is just starting
            return None
        return found.pid if found else None

    def kill(self) -> None:
        """Kill the server; it is started again by itself."""
        before = self.pid
        assert before is not None
        with outliving(NAME):
            os.kill(before, signal.SIGKILL)
            self.wait(lambda: self.pid not in (None, before))

    @staticmethod
    def wait(until: Callable[[], object]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := until()):
            assert time.monotonic() < deadline, "it does not come"
            time.sleep(0.05)
        return found

    def locked(self, name: str) -> bool:
        """Whether somebody holds a lock on the first bytes of a file, asked of the kernel that the server runs on."""
        with (self.data / name).open("rb+") as file:
            asked = struct.pack("hhlli", fcntl.F_WRLCK, os.SEEK_SET, 0, 8, 0)
            kind = struct.unpack("hhlli", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
        return bool(kind != fcntl.F_UNLCK)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pki, state = tmp_path_factory.mktemp("pki"), Path(os.environ["EMP_LAB_DIR"]).parent / "efs-state"
    state.mkdir()
    authority = CertificateAuthority.create(pki / "ca", POOL)
    authority.issue(Role.VOLUMES, "cloud", ["127.0.0.1"]).write(pki / "cloud")
    plane = GaneshaPlane(ensure_nfs_program(), state, interface=BRIDGE)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        with outliving(NAME):
            stack.enter_context(segment(2))
            simulator = stack.enter_context(simulated(pki / "cloud", efs_plane=plane, clock=time.monotonic))
            found = Served(simulator, plane, state)
        yield found
        found.efs.delete_mount_target(MountTargetId=found.target)
        found.wait(lambda: not found.efs.describe_mount_targets(FileSystemId=found.id)["MountTargets"])
        found.efs.delete_file_system(FileSystemId=found.id)
        found.wait(lambda: not found.data.exists())
        found.efs.close()


def guest_of(served: Served, directory: Path, number: int, address: str, path: str = "/") -> Vm:
    mac = f"52:54:00:99:00:0{number}"
    config = f"hostname guest{number}\nnic 0 mac {mac} addr {address}/16 gw 10.99.0.1\n"
    config += f"efs {served.address}:{path} /efs {MOUNT_OPTIONS}\n"
    vm = Vm(ensure_image(), directory, config, [(f"guest{number}", mac)])
    wait_for_echo(address)
    vm.read_console("mounted")
    return vm


@pytest.fixture(scope="module")
def first(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    with outliving(NAME):
        vm = guest_of(served, tmp_path_factory.mktemp("first"), 0, FIRST)
    yield vm
    vm.close()


@pytest.fixture(scope="module")
def second(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    with outliving(NAME):
        vm = guest_of(served, tmp_path_factory.mktemp("second"), 1, SECOND)
    yield vm
    vm.close()


def test_a_guest_writes_a_whole_file_on_the_mount(served: Served, first: Vm) -> None:
    control(FIRST, f"journal start {JOURNAL} 50")
    served.wait(lambda: control(FIRST, "journal status")[0]["acked_seq"] > 50)
    (journal,) = control(FIRST, "journal stop")
    report = check_journal(served.data / "journal")
    assert report.ok, report.errors
    assert report.missing(journal["acked_seq"]) == 0
    assert journal["errors"] == 0
    again = control(FIRST, f"journal start {JOURNAL} 50")
    assert again["seq"] == report.records, "it goes on where the chain ends"
    control(FIRST, "journal stop")


def test_a_lock_holds_against_another_guest_and_over_a_restart_of_the_server(
    served: Served, first: Vm, second: Vm
) -> None:
    assert control(FIRST, f"lock take {LOCK}")["held"]
    assert served.locked("lock"), "the server's kernel knows of it"
    assert "locked by another" in control(SECOND, f"lock take {LOCK}")["error"]
    served.kill()
    (held,) = control(FIRST, "lock status")  # waits for the server, and reclaims
    assert held["held"], held
    served.wait(lambda: served.locked("lock"))
    assert "locked by another" in control(SECOND, f"lock take {LOCK}")["error"]
    assert control(FIRST, f"lock drop {LOCK}")["held"] is False
    assert not served.locked("lock")
    assert control(SECOND, f"lock take {LOCK}")["held"]
    control(SECOND, f"lock drop {LOCK}")


def test_writing_goes_on_over_a_restart_of_the_server_without_an_error(served: Served, first: Vm) -> None:
    control(FIRST, f"journal start {JOURNAL} 50")
    served.kill()
    before = control(FIRST, "journal status")[0]["acked_seq"]
    served.wait(lambda: control(FIRST, "journal status")[0]["acked_seq"] > before + 20)
    (journal,) = control(FIRST, "journal stop")
    report = check_journal(served.data / "journal")
    assert (report.errors, report.missing(journal["acked_seq"]), journal["errors"]) == ((), 0, 0)


def test_a_server_that_the_daemon_left_behind_is_adopted(served: Served) -> None:
    """A plane that knows of nothing finds the server by its pid file and does not start a second one."""

    async def adopt() -> int | None:
        plane = GaneshaPlane(ensure_nfs_program(), served.state, interface=BRIDGE)
        await plane.on_opened(PlaneTarget(served.target, served.id, served.address))
        for server in plane._servers.values():
            assert server._keeper is not None
            server._keeper.cancel()
        return served.pid

    before = served.pid
    assert asyncio.run(adopt()) == before


def test_an_access_point_makes_its_directory_with_its_owner(served: Served, tmp_path: Path) -> None:
    creation = {"OwnerUid": 1234, "OwnerGid": 1235, "Permissions": "0750"}
    served.efs.create_access_point(
        ClientToken="p", FileSystemId=served.id, RootDirectory={"Path": "/teams/red", "CreationInfo": creation}
    )
    made = served.wait(lambda: (served.data / "teams/red").exists() and (served.data / "teams/red").stat())
    served.wait(lambda: (served.data / "teams/red").stat().st_mode & 0o777 == 0o750)
    assert ((served.data / "teams/red").stat().st_uid, made.st_mode & 0o170000) == (1234, 0o040000)


def test_a_server_listens_at_its_own_address_alone(served: Served) -> None:
    """A second mount target of the same machine would have no address else."""
    lines = subprocess.run(["ss", "-Hltn", "sport", "=", ":2049"], capture_output=True, text=True, check=True).stdout
    assert [line.split()[3].removeprefix("[::ffff:").replace("]", "") for line in lines.splitlines()] == [
        f"{served.address}:2049"
    ]


def test_a_link_that_a_guest_has_made_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "fs").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "fs/way").symlink_to(tmp_path / "outside")
    point = PlanePoint("fsap-1", "fs-1", "/way/out", {"OwnerUid": 0, "OwnerGid": 0, "Permissions": "0777"})
    assert point.creation is not None
    with pytest.raises(HostError, match="/way/out"):
        make_directory(tmp_path / "fs", point.path, point.creation)
    assert list((tmp_path / "outside").iterdir()) == []
