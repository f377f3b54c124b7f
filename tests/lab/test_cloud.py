"""A pool whose volumes are of a simulated cloud: an EVM moves with its volume, whatever the cloud does meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from emp.lab import region
from emp.lab.checkers import epochs, records
from emp.lab.cloud.knobs import AWS
from emp.lab.demo import volume_file
from emp.lab.journal_check import check_journal
from emp.lab.region import instance_of
from emp.lab.residue import Residue
from emp.lab.topology import VOL, Topology
from emp.model.errors import Conflict, Refused
from emp.model.evm import EvmState
from emp.model.migration import Migration, Outcome
from tests.lab.cloud import attached, call, call_all, cloud_of_three, turn
from tests.lab.conftest import Pool, run_emp, run_lab
from tests.lab.pool import Subject, subject, until
from tests.lab.test_bad_input import refusal
from tests.lab.test_volumes import disks
from tests.leaks import outliving

NAME = "clouded"
VOLUME = "io2:4GiB"
JOURNAL_HZ = 60
GIB = 1 << 30


@pytest.fixture(scope="module")
def cloud(lab_home: Path) -> Iterator[Pool]:
    with cloud_of_three(NAME) as made:
        yield made


@pytest.fixture(scope="module")
def resident(cloud: Pool) -> Iterator[Subject]:
    """The EVM of all tests, with a volume of the cloud. It is on n1 or n2."""
    with ExitStack() as kept:
        with outliving(f"the lab {NAME}"):
            made = kept.enter_context(subject(cloud, node="n1", volumes=[VOLUME]))
        made.start_journal(made.volumes[0], JOURNAL_HZ)
        yield made


@pytest.fixture
def evm(cloud: Pool, resident: Subject) -> Iterator[Subject]:
    """The EVM, which writes to its volume; what it was told is safe is there at the end."""
    turn(cloud)
    yield resident
    turn(cloud)
    check_disk(resident)
    resident.start_journal(resident.volumes[0], JOURNAL_HZ)


def away(evm: Subject) -> str:
    """Return the other node of its zone."""
    return {"n1": "n2", "n2": "n1"}[str(evm.record.owner)]


def check_disk(evm: Subject) -> None:
    (volume,) = evm.volumes
    (journal,) = evm.guest().ask(f"journal stop {volume.serial}")
    found = check_journal(volume_file(evm.pool.files, volume))
    assert found.ok, found.errors
    assert found.boot_ids == (evm.boot_id,), "one boot has written all of it"
    assert journal["acked_seq"] > 0
    assert (found.missing(journal["acked_seq"]), journal["errors"]) == (0, 0)
    log = evm.pool.files.data(VOL.name) / "epochs.log"
    assert epochs.violations(log, volume.id) == []


def check_only_on(evm: Subject, node: str) -> None:
    """As ``Subject.check_only_on``, and by the cloud's own word."""
    evm.check_only_on(node)
    (volume,) = evm.volumes
    place = evm.pool.topology.place(node)
    assert attached(evm.pool, volume.id) == {instance_of(place): "attached"}


def check_moves(evm: Subject) -> None:
    target = away(evm)
    evm.migrate(target)
    check_only_on(evm, target)


def fault(harm: str, action: str, **more: Any) -> dict[str, Any]:
    return {"harm": harm, "action": action, **more}


def test_there_and_back_under_io(cloud: Pool, evm: Subject) -> None:
    assert evm.volumes[0].size_bytes == 4 * GIB
    check_moves(evm)
    check_moves(evm)
    assert records.check_secrets(cloud.files) == []


def test_a_way_back_and_there_again(evm: Subject) -> None:
    """The source's attachment is taken over under its new epoch, not closed by the fence."""
    moving = evm.begin_slow(away(evm))
    evm.client.migrations.abort(moving.id)
    assert evm.end_of(moving).outcome is Outcome.ABORTED
    check_only_on(evm, moving.source)
    assert [held.epoch for held in evm.volumes[0].attachments] == [moving.epoch_source]
    evm.migrate(moving.target)
    check_only_on(evm, moving.target)


def test_the_cloud_is_killed_in_the_migration(cloud: Pool, evm: Subject) -> None:
    """Nothing that is attached is touched by that; what is still to be detached is, when it is back."""
    moving = evm.begin_slow(away(evm), bytes_per_s=20_000_000)
    cloud.kill("vol", "volumes")
    until(lambda: evm.client.migrations.get(moving.id).committed, "it commits without the cloud")
    assert evm.client.migrations.get(moving.id).outcome is None, "the source is attached yet"
    cloud.start("vol", "volumes")
    assert evm.end_of(moving).outcome is Outcome.COMPLETED
    check_only_on(evm, moving.target)


@pytest.mark.parametrize(
    "faults",
    [
        [fault("throttled", "AttachVolume", times=2), fault("throttled", "DetachVolume", times=2)],
        [fault("slow", "AttachVolume", delay_s=2.0), fault("slow", "DetachVolume", delay_s=2.0)],
        [fault("lost_reply", action) for action in ("CreateTags", "AttachVolume", "DetachVolume")],
        [fault("lost_order", "AttachVolume"), fault("broken", "DetachVolume")],
    ],
    ids=["throttled", "slow", "lost reply", "lost order"],
)
def test_a_cloud_in_trouble_delays_a_migration_and_no_more(
    cloud: Pool, evm: Subject, faults: list[dict[str, Any]]
) -> None:
    turn(cloud, faults=faults)
    check_moves(evm)


def check_stays(evm: Subject, ended: Migration, *causes: str) -> None:
    assert ended.outcome is Outcome.ABORTED
    assert all(cause in (ended.cause or "") for cause in causes), ended.cause
    check_only_on(evm, ended.source)


def test_a_controller_without_the_permission_leaves_the_evm_where_it_is(cloud: Pool, evm: Subject) -> None:
    turn(cloud, faults=[fault("denied", "AttachVolume", times=None)])
    check_stays(evm, evm.end_of(evm.begin(away(evm))), "UnauthorizedOperation", "permission")


def check_is_refused(evm: Subject, target: str, why: str) -> None:
    """By ``emp``, which names the field, the volume and the reason; and a dry run shows it among its checks."""
    (volume,) = evm.volumes
    said = refusal(evm.pool, "migrate", evm.name, "--to", target)
    assert (said.exit_code, said.field) == (5, "target")
    assert f"volume {volume.id}: " in said.error and why in said.error
    planned = evm.pool.emp("migrate", evm.name, "--to", target, "--dry-run", "--json", check=False)
    checks = json.loads(planned.stdout)["checks"]
    assert planned.returncode == 5
    assert [check["name"] for check in checks if not check["ok"]] == [f"volume {volume.id}"]


def test_a_volume_that_sixteen_instances_have_is_not_attached_to_a_17th(cloud: Pool) -> None:
    turn(cloud)
    with subject(cloud, boots=False, node="n1", volumes=[VOLUME]) as evm:
        (volume,) = evm.volumes
        one = {"VolumeId": volume.id}
        shared = [("attach_volume", one | {"InstanceId": i, "Device": "/dev/sdf"}) for i in region.STRANGERS.values()]
        assert not [answer for answer in call_all(cloud, shared) if "Refused" in answer]
        try:
            check_is_refused(evm, "n2", "it is attached to 16 nodes, and takes 16 at once")
        finally:
            ended = call_all(cloud, [("detach_volume", one | {"InstanceId": i}) for i in region.STRANGERS.values()])
        assert not [answer for answer in ended if "Refused" in answer]
        evm.migrate("n2")
        check_only_on(evm, "n2")


def test_a_node_in_another_zone_is_no_target(evm: Subject) -> None:
    with pytest.raises(Refused, match=r"it is in lab-1a, n3 in lab-1b"):
        evm.begin("n3")
    check_is_refused(evm, "n3", "it is in lab-1a, n3 in lab-1b")
    check_only_on(evm, evm.record.owner or "")


@pytest.mark.parametrize(
    ("shown", "causes"),
    [
        ({"size_bytes": 8 * GIB}, ("8 GiB", "not 4 GiB")),
        ({"serial": "vol0fffffffffffffff0"}, ("does not show on this node", "no device here has the serial")),
    ],
    ids=["size", "serial"],
)
def test_a_wrong_device_is_not_opened(
    cloud: Pool, evm: Subject, shown: dict[str, Any], causes: tuple[str, ...]
) -> None:
    turn(cloud, shown={evm.volumes[0].id: shown})
    check_stays(evm, evm.end_of(evm.begin(away(evm))), *causes)
    turn(cloud)
    check_moves(evm)


def test_two_devices_of_one_serial_are_not_opened(cloud: Pool, evm: Subject) -> None:
    """Another EVM's volume on the target shows there under this one's serial."""
    with subject(cloud, boots=False, node=away(evm), volumes=[VOLUME]) as other:
        turn(cloud, shown={other.volumes[0].id: {"serial": evm.volumes[0].serial}})
        check_stays(evm, evm.end_of(evm.begin(away(evm))), "have the serial")


def test_a_device_that_shows_late_is_waited_for(cloud: Pool, evm: Subject) -> None:
    turn(cloud, device_lag_s=2.0)
    check_moves(evm)


def test_a_volume_is_not_deleted_under_a_migration(cloud: Pool, evm: Subject) -> None:
    (volume,) = evm.volumes
    moving = evm.begin_slow(away(evm), bytes_per_s=20_000_000)
    assert call(cloud, "delete_volume", VolumeId=volume.id) == {"Refused": "VolumeInUse"}
    with pytest.raises(Conflict, match=evm.name):
        evm.client.volumes.delete(volume.id)
    assert evm.end_of(moving).outcome is Outcome.COMPLETED
    check_only_on(evm, moving.target)


def test_a_volume_of_one_node_moves_behind_its_evm(cloud: Pool) -> None:
    """gp3: the cloud refuses a second attachment, so it is detached and attached once the EVM runs at the target."""
    turn(cloud)
    with subject(cloud, node="n1", volumes=["gp3:1GiB"]) as evm:
        (volume,) = evm.volumes
        evm.start_journal(volume, JOURNAL_HZ)
        for _ in range(2):
            check_moves(evm)
        check_disk(evm)
        assert epochs.violations(cloud.files.data(VOL.name) / "epochs.log", volume.id, single=True) == []


def test_a_volume_of_the_cloud_grows_under_its_evm_and_moves_with_it(cloud: Pool) -> None:
    """The node sees the new size a moment after the cloud says so, and AWS works on it for hours after."""
    turn(cloud, latency=AWS, device_lag_s=1.0)
    with subject(cloud, node="n1", volumes=["gp3:1GiB"]) as evm:
        (volume,) = evm.volumes
        evm.start_journal(volume, JOURNAL_HZ)
        cloud.emp("volume", "resize", volume.id, "2GiB")
        until(lambda: disks(evm)[volume.serial] == (0, 2048), "the guest sees the new size")
        assert evm.client.volumes.get(volume.id).size_bytes == 2 * GIB
        with pytest.raises(Refused) as refused:
            evm.client.volumes.resize(volume.id, "3GiB")
        assert "still works" in str(refused.value.hint)
        turn(cloud)
        check_moves(evm)
        assert disks(evm)[volume.serial] == (0, 2048)
        check_disk(evm)
        assert epochs.violations(cloud.files.data(VOL.name) / "epochs.log", volume.id, single=True) == []


def test_an_evm_that_is_stopped_starts_elsewhere_and_one_that_is_deleted_leaves_nothing(cloud: Pool) -> None:
    turn(cloud)
    with subject(cloud, node="n1", volumes=[VOLUME]) as evm:
        (volume,) = evm.volumes
        evm.client.evms.stop(evm.name, grace_s=0)
        evm.wait(EvmState.STOPPED)
        until(lambda: not attached(cloud, volume.id), "a stopped EVM has nothing attached")
        evm.client.evms.start(evm.name)
        evm.guest().wait_first_packet()
        check_only_on(evm, str(evm.record.owner))
    assert call(cloud, "describe_volumes", VolumeIds=[volume.id]) == {"Refused": "InvalidVolume.NotFound"}
    assert not list((cloud.files.data(VOL.name) / "images").glob(f"{volume.id}*"))


def volumes_of(pool: Pool) -> list[str]:
    return [volume["VolumeId"] for volume in call(pool, "describe_volumes")["Volumes"]]


def test_the_cloud_is_shown_beside_another_lab_and_leaves_no_trace(cloud: Pool) -> None:
    """A second lab has a cloud of its own: other credentials, other volumes."""
    second, before = "second", volumes_of(cloud)
    residue = Residue.watch(Topology(second, 1))
    try:
        run_lab("up", "--name", second, "--nodes", "1", "--cloud", "aws")
        shown = run_lab("status", "--name", second).stdout
        assert "volumes are of a simulated cloud; latencies: aws" in shown
        assert "n1 is i-0000000000000000b in lab-1a" in shown
        run_emp("--context", second, "evm", "create", "web", "--memory", "96MiB", "--volume", "io2:4GiB")
        assert volumes_of(cloud) == before, "that one is not of this cloud"
    finally:
        run_lab("down", "--name", second)
    assert residue.left() == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cloud", "slow"), "'slow' is not one of"),
        (("--cloud", "instant", "--zone-of", "n9=b"), "the lab has no node 'n9'"),
        (("--cloud", "instant", "--zone-of", "n1=z"), "'z' is no zone"),
        (("--cloud", "instant", "--zone-of", "n1"), "'' is no zone"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_made(lab_home: Path, options: tuple[str, ...], said: str) -> None:
    residue = Residue.watch(Topology("refused", 2))
    done = run_lab("up", "--name", "refused", *options, check=False)
    assert done.returncode == 2
    assert said in " ".join((done.stdout + done.stderr).split())
    assert residue.left() == []
