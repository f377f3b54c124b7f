"""Volumes of an EVM that runs: given to it, taken along, seen to grow, and taken away, through the CLI and the API."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from emp.lab.demo import volume_file
from emp.lab.journal_check import check_journal
from emp.model.errors import Conflict, Unavailable
from emp.model.volume import Volume
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, agent_away, subject, until

JOURNAL_HZ = 50
MEBIBYTE = 1 << 20


@contextlib.contextmanager
def loose(evm: Subject, size_bytes: int = 16 * MEBIBYTE) -> Iterator[Volume]:
    """A volume that no EVM has; gone at the end, by then it must be nobody's again."""
    made = evm.client.volumes.create(size_bytes)
    yield made
    evm.client.volumes.delete(made.id)


def writes_on(evm: Subject, volume: Volume) -> None:
    def journal() -> dict[str, int]:
        return next(dict(one) for one in evm.guest().ask("journal status") if one["serial"] == volume.serial)

    goal = journal()["acked_seq"] + 5
    until(lambda: journal()["acked_seq"] >= goal, "the guest writes on")
    assert journal()["errors"] == 0


def stop_journal(pool: Pool, evm: Subject, volume: Volume) -> None:
    """Stop it, and check that all that was acknowledged is on the volume."""
    journals = evm.guest().ask(f"journal stop {volume.serial}")
    (stopped,) = [one for one in journals if one["serial"] == volume.serial]
    found = check_journal(volume_file(pool.files, evm.client.volumes.get(volume.id)))
    assert found.ok, found.errors
    assert stopped["errors"] == 0
    assert found.missing(stopped["acked_seq"]) == 0


def test_a_volume_is_plugged_taken_along_grown_and_unplugged(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB"]) as evm, loose(evm) as late:
        (first,) = evm.volumes
        boot_id = evm.boot_id
        said = pool.emp("volume", "attach", late.id, evm.name).stdout
        assert "0:0:0:1" in said
        evm.start_journal(late, JOURNAL_HZ)
        pool.emp("migrate", evm.name, "--to", "n2")
        evm.check_only_on("n2")
        writes_on(evm, late)
        assert disks(evm) == {first.serial: (0, 16), late.serial: (1, 16)}

        pool.emp("volume", "resize", late.id, "32MiB")
        until(lambda: disks(evm)[late.serial] == (1, 32), "the guest sees the new size")
        writes_on(evm, late)
        (attachment,) = evm.client.volumes.get(late.id).attachments
        assert attachment.node == "n2"

        with pytest.raises(Conflict) as refused:
            evm.client.evms.detach_volume(evm.name, late.id)
        assert "using" in refused.value.message
        writes_on(evm, late)
        stop_journal(pool, evm, late)
        pool.emp("volume", "detach", late.id)
        until(lambda: disks(evm) == {first.serial: (0, 16)}, "the guest is rid of the disk")
        assert evm.client.volumes.get(late.id).attachments == ()
        pool.emp("migrate", evm.name, "--to", "n1")
        assert evm.boot_id == boot_id


def test_a_slot_in_between_survives_a_migration_and_a_restart_of_the_agent(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["io2:16MiB", "io2:16MiB", "io2:16MiB"]) as evm:
        one, two, three = evm.volumes
        evm.start_journal(three, JOURNAL_HZ)
        evm.client.evms.detach_volume(evm.name, two.id)
        with agent_away(pool, evm.client, "n1"):
            writes_on(evm, three)
        evm.check_only_on("n1")
        pool.emp("migrate", evm.name, "--to", "n2")
        writes_on(evm, three)
        assert disks(evm) == {one.serial: (0, 16), three.serial: (2, 16)}
        evm.client.evms.attach_volume(evm.name, two.id)
        until(lambda: disks(evm).get(two.serial) == (1, 16), "it is back at its old place")
        stop_journal(pool, evm, three)
        evm.client.evms.detach_volume(evm.name, two.id)
        evm.client.volumes.delete(two.id)


@pytest.mark.parametrize("order", ["attach", "detach"])
def test_a_controller_that_is_killed_on_the_way_finishes_it(pool: Pool, order: str) -> None:
    """Its order waits at the node's agent, which stands still; both copies of it are carried out in the end."""
    with subject(pool, node="n1") as evm, loose(evm) as volume:
        if order == "detach":
            evm.client.evms.attach_volume(evm.name, volume.id)
        verb = {
            "attach": ["volume", "attach", volume.id, evm.name],
            "detach": ["volume", "detach", volume.id],
        }[order]
        pool.stop("n1", "agent")
        with ThreadPoolExecutor(1) as aside:
            ordered = aside.submit(pool.emp, *verb, check=False)
            until(lambda: under_way(evm, order), f"the {order} is under way")
            pool.kill("ctl", "controller")
            assert ordered.result().returncode != 0
        pool.cont("n1", "agent")
        pool.start("ctl", "controller")
        wanted = (volume.id,) if order == "attach" else ()
        until(lambda: evm.record.spec.volumes == wanted, f"the {order} is finished")
        until(lambda: set(disks(evm)) == ({volume.serial} if wanted else set()), "the guest has what the record says")
        if order == "attach":
            evm.client.evms.detach_volume(evm.name, volume.id)
        until(lambda: evm.client.volumes.get(volume.id).evm is None, "the volume is nobody's")


def under_way(evm: Subject, order: str) -> bool:
    """Whether the controller refuses a migration for it."""
    try:
        evm.client.migrations.start(evm.name, dry_run=True)
    except Conflict as error:
        return f"{order} of EVM {evm.name} is under way" in error.message
    except Unavailable:
        pass  # the agent has been silent for a while
    return False


def test_the_same_volume_at_two_evms(pool: Pool) -> None:
    with subject(pool, node="n1") as one, subject(pool, node="n2") as other, loose(one) as volume:
        one.client.evms.attach_volume(one.name, volume.id)
        with pytest.raises(Conflict) as refused:
            other.client.evms.attach_volume(other.name, volume.id)
        assert one.name in refused.value.message
        one.client.evms.detach_volume(one.name, volume.id)
        other.client.evms.attach_volume(other.name, volume.id)
        other.client.evms.detach_volume(other.name, volume.id)


def disks(evm: Subject) -> dict[str, tuple[int, int]]:
    """Return serial -> (LUN, MiB) of every disk that the guest has."""
    found = evm.guest().ask("disks")
    assert all(one["address"].startswith("0:0:0:") for one in found), found
    return {one["serial"]: (int(one["address"].split(":")[3]), one["bytes"] // MEBIBYTE) for one in found}
