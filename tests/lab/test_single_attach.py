"""An EVM with a volume that one node alone can have: resumed first, the volume moved after; or in the classic order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from emp.lab import daemons, power, verbs
from emp.lab.demo import volume_file
from emp.lab.journal_check import RECORD_BYTES, check_journal
from emp.lab.power import Power
from emp.lab.ready import wait_ready
from emp.model.migration import Migration, Outcome, VolumeOrder
from tests.lab.conftest import Pool
from tests.lab.pool import RELAY, Subject, subject, until
from tests.leaks import outliving

BROWNOUT_BYTES_PER_S = 20_000_000
JOURNAL_HZ = 100


def check_disk(evm: Subject) -> None:
    """Every record that the guest was told is on disk is there, chained, and no I/O of it has failed."""
    for volume in evm.volumes:
        (journal,) = evm.guest().ask(f"journal stop {volume.serial}")
        found = check_journal(volume_file(evm.pool.files, volume))
        assert found.ok, found.errors
        assert (found.missing(journal["acked_seq"]), journal["errors"]) == (0, 0)


def moved(evm: Subject, migration: Migration) -> None:
    assert migration.outcome is Outcome.COMPLETED
    for volume in evm.client.volumes.list().items:
        assert [attachment.node for attachment in volume.attachments] == [migration.target]


def test_there_and_back_with_its_volume_behind(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    with subject(pool, node="n1", volumes=["gp3:32MiB"]) as evm:
        evm.start_journal(evm.volumes[0], JOURNAL_HZ)
        boot = evm.boot_id
        for node in ("n2", "n1"):
            migration = evm.migrate(node)
            moved(evm, migration)
            (move,) = migration.report.volumes
            with capsys.disabled():
                print(f"\n  pause {migration.report.vcpu_pause_ms:.0f} ms; {move.model_dump_json()}", end="")
        assert evm.boot_id == boot
        check_disk(evm)


def writes(evm: Subject, count: int) -> None:
    """Return once the guest has been told that so many more records are on its disk."""

    def acked() -> int:
        (journal,) = evm.guest().ask("status")["journals"]
        return int(journal["acked_seq"])

    before = acked()
    until(lambda: acked() >= before + count, f"{count} more records on disk")


@contextmanager
def relayed(pool: Pool, evm: Subject) -> Iterator[Migration]:
    """The EVM has gone from n1 to n2, its volume not: the controller is dead since the brownout, until the end."""
    moving = evm.begin_slow("n2", bytes_per_s=BROWNOUT_BYTES_PER_S)
    pool.kill("ctl", "controller")
    try:
        until(lambda: evm.qemus().keys() == {"n2"}, "it runs at the target alone")
        writes(evm, 20)
        yield moving
    finally:
        pool.start("ctl", "controller")


def kill_relay(pool: Pool, node: str) -> None:
    (relay,) = [found for found in daemons.daemons(pool.files, pool.topology.place(node)) if RELAY in found.argv]
    relay.process.send(signal.SIGKILL)


def landed(evm: Subject, moving: Migration) -> Migration:
    """Wait for the end, and see that the EVM and its volume are at the target alone, and nothing is lost."""
    ended = evm.end_of(moving)
    moved(evm, ended)
    evm.check_only_on(moving.target)
    writes(evm, 20)
    check_disk(evm)
    return ended


def test_the_guest_goes_on_through_its_source_while_the_controller_is_away(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["gp3:32MiB"]) as evm:
        evm.start_journal(evm.volumes[0], JOURNAL_HZ)
        boot = evm.boot_id
        with relayed(pool, evm) as moving:
            writes(evm, 20)
        ended = landed(evm, moving)
        assert ended.report.volumes[0].written_bytes >= 20 * RECORD_BYTES
        assert evm.boot_id == boot
        evm.migrate("n1")
        evm.check_only_on("n1")


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_agents_that_die_while_it_relays_find_their_relays_again(pool: Pool, node: str) -> None:
    with subject(pool, node="n1", volumes=["gp3:32MiB"]) as evm:
        evm.start_journal(evm.volumes[0], JOURNAL_HZ)
        with relayed(pool, evm) as moving:
            pool.kill(node, "agent")
            writes(evm, 20)
            with outliving(f"the lab {pool.name}"):
                verbs.start(pool.files, node, "agent")
            writes(evm, 20)
        landed(evm, moving)


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_relay_that_is_killed_comes_back_and_the_guest_sees_no_error(pool: Pool, node: str) -> None:
    with subject(pool, node="n1", volumes=["gp3:32MiB"]) as evm:
        evm.start_journal(evm.volumes[0], JOURNAL_HZ)
        with relayed(pool, evm) as moving:
            kill_relay(pool, node)
            writes(evm, 20)
        landed(evm, moving)


def test_a_source_that_goes_off_while_it_relays_loses_the_volume_to_the_target(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["gp3:32MiB"]) as evm:
        evm.start_journal(evm.volumes[0], JOURNAL_HZ)
        with relayed(pool, evm) as moving:
            power.switch(pool.files, "n1", Power.OFF)
        try:
            moved(evm, evm.end_of(moving))
            writes(evm, 20)
        finally:
            with outliving(f"the lab {pool.name}"):
                power.switch(pool.files, "n1", Power.ON)
            wait_ready(pool.files, pool.state, pool.context)
        evm.check_only_on("n2")
        check_disk(evm)


def test_an_abort_ends_the_relays_and_the_guest_goes_on_at_home(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["gp3:32MiB"]) as evm:
        evm.start_journal(evm.volumes[0], JOURNAL_HZ)
        moving = evm.begin_slow("n2", bytes_per_s=BROWNOUT_BYTES_PER_S)
        evm.client.migrations.abort(moving.id)
        assert evm.end_of(moving).outcome is Outcome.ABORTED
        evm.check_only_on("n1")
        assert not [found for found in evm.traces("n1") if found.startswith("relay")]
        writes(evm, 20)
        check_disk(evm)


def test_the_classic_order_moves_it_while_the_guest_stands(pool: Pool) -> None:
    with subject(pool, node="n1", volumes=["gp3:32MiB"]) as evm:
        evm.start_journal(evm.volumes[0], JOURNAL_HZ)
        boot = evm.boot_id
        migration = evm.migrate("n2", volume_order=VolumeOrder.CLASSIC)
        moved(evm, migration)
        (move,) = migration.report.volumes
        assert move.written_bytes == 0, "nothing ran that could have written through the relay"
        assert evm.boot_id == boot
        check_disk(evm)
