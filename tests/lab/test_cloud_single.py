"""EVMs whose volume one node alone can have, in a cloud in trouble: relayed until it moves, told of, and mended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from emp.lab import partition
from emp.lab.checkers import epochs
from emp.lab.demo import volume_file
from emp.lab.journal_check import check_journal
from emp.lab.region import instance_of
from emp.lab.topology import VOL
from emp.model.errors import Conflict, Refused
from emp.model.migration import Migration, Outcome
from emp.model.volume import Volume
from tests.lab.cloud import attached, call, cloud_of_three, turn
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, mend, subject, until
from tests.leaks import outliving

NAME = "behind"
JOURNAL_HZ = 60
STUCK_S = 90.0
"""an orderly detach is tried for 20 s before it is forced"""


@pytest.fixture(scope="module")
def cloud(lab_home: Path) -> Iterator[Pool]:
    with cloud_of_three(NAME) as made:
        yield made


@pytest.fixture(scope="module")
def resident(cloud: Pool) -> Iterator[Subject]:
    """The EVM of all tests, with a volume of each kind; it is on n1 or n2."""
    with ExitStack() as kept:
        with outliving(f"the lab {NAME}"):
            made = kept.enter_context(subject(cloud, node="n1", volumes=["gp3:1GiB", "io2:4GiB"]))
        start_journals(made)
        yield made


@pytest.fixture
def evm(cloud: Pool, resident: Subject) -> Iterator[Subject]:
    """The EVM, which writes to its volumes; what it was told is safe is there at the end, and no I/O has failed."""
    turn(cloud)
    yield resident
    turn(cloud)
    mend(cloud)
    check_disks(resident)
    start_journals(resident)


def start_journals(evm: Subject) -> None:
    for volume in evm.volumes:
        evm.start_journal(volume, JOURNAL_HZ)


def check_disks(evm: Subject) -> None:
    for volume in evm.volumes:
        journals = evm.guest().ask(f"journal stop {volume.serial}")
        (journal,) = (each for each in journals if each["serial"] == volume.serial)
        found = check_journal(volume_file(evm.pool.files, volume))
        assert found.ok, found.errors
        assert found.boot_ids == (evm.boot_id,), "one boot has written all of it"
        assert journal["acked_seq"] > 0
        assert (found.missing(journal["acked_seq"]), journal["errors"]) == (0, 0)
        log = evm.pool.files.data(VOL.name) / "epochs.log"
        assert epochs.violations(log, volume.id, single=not volume.type.multi_attach) == []


def away(evm: Subject) -> str:
    return {"n1": "n2", "n2": "n1"}[str(evm.record.owner)]


def gp3(evm: Subject) -> Volume:
    return next(volume for volume in evm.volumes if not volume.type.multi_attach)


def fault(harm: str, action: str, **more: Any) -> dict[str, Any]:
    return {"harm": harm, "action": action, **more}


def writes(evm: Subject) -> None:
    """Return once the guest has been told that each of its volumes has twenty more records."""

    def acked() -> list[int]:
        return [int(journal["acked_seq"]) for journal in evm.guest().ask("status")["journals"]]

    before = acked()
    until(lambda: all(now >= then + 20 for now, then in zip(acked(), before, strict=True)), "it writes", timeout_s=90)


def told(evm: Subject, moving: Migration, *words: str, timeout_s: float = 60.0) -> Migration:
    """Return the migration once its alarm has all of ``words``."""

    def alarmed() -> Migration | None:
        now = evm.client.migrations.get(moving.id)
        assert now.outcome is None, now
        return now if now.hint and all(word in now.hint for word in words) else None

    try:
        return until(alarmed, f"an alarm with {words}", timeout_s=timeout_s)
    except pytest.fail.Exception as failure:
        pytest.fail(f"{failure}: {evm.client.migrations.get(moving.id).hint}")


def check_ends_well(evm: Subject, moving: Migration) -> Migration:
    ended = evm.end_of(moving)
    assert ended.outcome is Outcome.COMPLETED, ended.cause
    check_is_at(evm, moving.target)
    return ended


def check_is_at(evm: Subject, node: str) -> None:
    evm.check_only_on(node)
    for volume in evm.volumes:
        assert attached(evm.pool, volume.id) == {instance_of(evm.pool.topology.place(node)): "attached"}
    assert not [trace for trace in evm.traces(node) if trace.startswith("relay")]
    writes(evm)


def check_stays(evm: Subject, ended: Migration, *causes: str) -> None:
    assert ended.outcome is Outcome.ABORTED
    assert all(cause in (ended.cause or "") for cause in causes), ended.cause
    check_is_at(evm, ended.source)


# -- the cloud refuses, or does not answer, behind the commit


@pytest.mark.parametrize("action", ["DetachVolume", "AttachVolume"])
def test_without_the_permission_it_stays_relayed_until_there_is_one(cloud: Pool, evm: Subject, action: str) -> None:
    """A denied attach at the target is brought back to the source, which may be denied as well at first."""
    moving = evm.begin_slow(away(evm), bytes_per_s=20_000_000)
    times = 1 if action == "AttachVolume" else None
    turn(cloud, faults=[fault("denied", action, times=times)])
    if times is None:
        told(evm, moving, "stays relayed", "UnauthorizedOperation")
        assert evm.qemus().keys() == {moving.target}
        assert attached(cloud, gp3(evm).id) == {instance_of(cloud.topology.place(moving.source)): "attached"}
        writes(evm)
        with pytest.raises(Conflict, match=f"{moving.id} is not over: .* stays relayed by {moving.source}"):
            evm.begin(moving.source)
        turn(cloud)
    ended = check_ends_well(evm, moving)
    assert [move.tries > 1 for move in ended.report.volumes] == [True]


def test_one_that_stays_relayed_can_be_stopped_and_starts_where_its_volume_is(cloud: Pool) -> None:
    turn(cloud, faults=[fault("denied", "DetachVolume", times=None)])
    try:
        with subject(cloud, node="n1", volumes=["gp3:1GiB"]) as evm:
            (volume,) = evm.volumes
            evm.start_journal(volume, JOURNAL_HZ)
            moving = evm.begin("n2")
            told(evm, moving, "stays relayed", "UnauthorizedOperation")
            refused = cloud.emp("migrate", evm.name, "--dry-run", check=False)
            assert (refused.returncode, refused.stdout) == (4, "")
            assert "stays relayed by n1" in " ".join(refused.stderr.split())
            assert f"emp evm stop {evm.name}" in " ".join(refused.stderr.split())
            writes(evm)
            acked = evm.guest().ask("status")["journals"][0]["acked_seq"]
            cloud.emp("evm", "stop", evm.name, "--grace", "0")
            assert evm.client.migrations.get(moving.id).outcome is Outcome.COMPLETED
            assert not [
                trace for node in ("n1", "n2") for trace in evm.traces(node) if trace.startswith(("relay", "QEMU"))
            ]
            assert attached(cloud, volume.id) == {instance_of(cloud.topology.place("n1")): "attached"}
            found = check_journal(volume_file(cloud.files, volume))
            assert (found.errors, found.missing(acked)) == ((), 0)
            refused = cloud.emp("evm", "start", evm.name, "--node", "n2", check=False)
            assert refused.returncode != 0 and "UnauthorizedOperation" in refused.stderr
            cloud.emp("evm", "start", evm.name, "--node", "n1")
            evm.guest().wait_first_packet()
            evm.start_journal(volume, JOURNAL_HZ)
            check_is_at(evm, "n1")
            turn(cloud)
    finally:
        turn(cloud)


@pytest.mark.parametrize(
    "faults",
    [
        [fault("throttled", "DetachVolume", times=2), fault("throttled", "AttachVolume", times=2)],
        [fault("lost_reply", "DetachVolume"), fault("lost_reply", "AttachVolume")],
        [fault("silent", "DetachVolume"), fault("silent", "AttachVolume")],
        [fault("lost_order", "DetachVolume"), fault("broken", "AttachVolume")],
    ],
    ids=["throttled", "reply lost", "timing out with the order applied", "order lost"],
)
def test_a_cloud_in_trouble_during_the_move(cloud: Pool, evm: Subject, faults: list[dict[str, Any]]) -> None:
    moving = evm.begin_slow(away(evm), bytes_per_s=20_000_000)  # io2 is attached by now
    turn(cloud, faults=faults)
    check_ends_well(evm, moving)


@pytest.mark.parametrize("knob", ["stuck", "busy"])
def test_a_detach_that_hangs_is_told_of_and_forced_as_nothing_holds_it(cloud: Pool, evm: Subject, knob: str) -> None:
    moving = evm.begin_slow(away(evm), bytes_per_s=20_000_000)
    turn(cloud, **{knob: [gp3(evm).id]})
    told(evm, moving, gp3(evm).id, "on its way")
    until(lambda: evm.client.migrations.get(moving.id).outcome, "the detach is forced", timeout_s=STUCK_S)
    check_ends_well(evm, moving)


@pytest.mark.parametrize("shown", [{"size_bytes": 8 << 30}, {"serial": "vol0fffffffffffffff0"}], ids=["size", "serial"])
def test_a_wrong_device_at_landing_is_not_opened_and_told(cloud: Pool, evm: Subject, shown: dict[str, Any]) -> None:
    """Reads and writes wait: what is there is not the volume."""
    moving = evm.begin_slow(away(evm), bytes_per_s=20_000_000)
    turn(cloud, shown={gp3(evm).id: shown})
    told(evm, moving, gp3(evm).id, "does not use it itself yet")
    assert evm.qemus().keys() == {moving.target}
    turn(cloud)
    check_ends_well(evm, moving)


def test_the_cloud_is_killed_while_it_relays(cloud: Pool, evm: Subject) -> None:
    """Its exports live on, and it comes back with what it had."""
    moving = evm.begin_slow(away(evm), bytes_per_s=20_000_000)
    cloud.kill("vol", "volumes")
    until(lambda: evm.qemus().keys() == {moving.target}, "it runs at the target alone")
    writes(evm)
    cloud.start("vol", "volumes")
    check_ends_well(evm, moving)


# -- before the commit


def test_another_zone_is_refused_before_anything_is_done(evm: Subject) -> None:
    with pytest.raises(Refused, match=gp3(evm).id):
        evm.begin("n3")
    check_is_at(evm, str(evm.record.owner))


def test_one_that_another_instance_has_is_not_given(cloud: Pool, evm: Subject) -> None:
    """Somebody outside the pool cannot take it while it is attached, nor can the pool give it twice."""
    volume, n3 = gp3(evm), instance_of(cloud.topology.place("n3"))
    answer = call(cloud, "attach_volume", VolumeId=volume.id, InstanceId=n3, Device="/dev/sdz")
    assert answer == {"Refused": "InvalidVolume.ZoneMismatch"}
    other = instance_of(cloud.topology.place(away(evm)))
    answer = call(cloud, "attach_volume", VolumeId=volume.id, InstanceId=other, Device="/dev/sdz")
    assert answer == {"Refused": "VolumeInUse"}
    with pytest.raises(Conflict, match=evm.name):
        evm.client.evms.create({"name": "thief", "memory_bytes": 96 << 20, "volumes": [volume.id]})


def test_a_target_that_cannot_reach_the_relay_is_no_target(cloud: Pool, evm: Subject) -> None:
    source, target = str(evm.record.owner), away(evm)
    partition.cut(cloud.files, source, target)
    moving = evm.begin(target)
    ended = evm.end_of(moving)
    partition.heal(cloud.files)
    check_stays(evm, ended)


def test_an_abort_with_volumes_of_both_kinds(evm: Subject) -> None:
    moving = evm.begin_slow(away(evm))
    evm.client.migrations.abort(moving.id)
    check_stays(evm, evm.end_of(moving))
    check_ends_well(evm, evm.begin(moving.target))
