"""A volume server without room: the guest waits and gets no I/O error, nothing acknowledged is lost, and it goes on."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emp.client.client import Client
from emp.lab import places
from emp.lab.demo import volume_file
from emp.lab.journal_check import check_journal
from emp.lab.topology import VOL
from emp.model.evm import EvmState
from emp.model.migration import Outcome
from emp.model.volume import VolumeType
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, subject
from tests.lab.test_bad_input import refusal
from tests.lab.test_single_attach import relayed, writes

JOURNAL_HZ = 100
VOLUME_BYTES = 32 << 20
DISK = "/dev/shm/small"
DISK_BYTES = 2 * VOLUME_BYTES
NO_SPACE = "No space left on device"


class Disk:
    """A file system of the volume server's own, for one volume; ``path`` is where it is seen from outside."""

    def __init__(self, path: Path) -> None:
        self.volume = path / "volume"
        self._rest = path / "rest"

    def fill(self) -> None:
        with self._rest.open("wb", buffering=0) as rest:
            try:
                while rest.write(bytes(1 << 20)):
                    continue
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def empty(self) -> None:
        self._rest.unlink()


@contextmanager
def disk_of(pool: Pool, volume: str) -> Iterator[Disk]:
    """Move a volume that is attached to nobody to a small disk."""
    pool.run_in(VOL.name, "mkdir", DISK)
    pool.run_in(VOL.name, "mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", DISK)
    try:
        made = Disk(Path(f"/proc/{places.init_of(pool.files, VOL.name).pid}/root{DISK}"))
        with contextlib.closing(Client(pool.context)) as client:
            file = volume_file(pool.files, client.volumes.get(volume))
        with made.volume.open("xb") as moved:
            os.truncate(moved.fileno(), VOLUME_BYTES)
        file.unlink()
        file.symlink_to(f"{DISK}/volume")
        yield made
    finally:
        pool.run_in(VOL.name, "umount", "--lazy", DISK)
        pool.run_in(VOL.name, "rmdir", DISK)


def waits(evm: Subject) -> None:
    paused = evm.wait(EvmState.PAUSED)
    assert paused.reason and "storage error" in paused.reason and NO_SPACE in paused.reason


def test_a_disk_that_is_full_in_a_migration_and_while_it_relays(pool: Pool) -> None:
    with contextlib.closing(Client(pool.context)) as client:
        volume = client.volumes.create(VOLUME_BYTES, type=VolumeType.GP3)
        with disk_of(pool, volume.id) as disk:
            with subject(pool, node="n1", volumes=[volume.id]) as evm:
                boot = evm.boot_id
                evm.start_journal(volume, JOURNAL_HZ)

                moving = evm.begin_slow("n2")
                disk.fill()
                ended = evm.end_of(moving)
                assert ended.outcome is Outcome.ABORTED
                assert "a volume failed on the source" in (ended.cause or "") and NO_SPACE in (ended.cause or "")
                waits(evm)
                said = refusal(pool, "migrate", evm.name, "--to", "n2")
                assert (said.exit_code, said.field) == (4, "evm") and NO_SPACE in said.error
                disk.empty()
                evm.wait(EvmState.RUNNING)
                writes(evm, 20)

                with relayed(pool, evm) as moving:
                    disk.fill()
                assert evm.end_of(moving).outcome is Outcome.COMPLETED, "the volume follows all the same"
                waits(evm)
                disk.empty()
                evm.wait(EvmState.RUNNING)
                writes(evm, 20)
                evm.check_only_on("n2")

                (journal,) = evm.guest().ask(f"journal stop {volume.serial}")
                found = check_journal(disk.volume)
                assert (found.errors, found.boot_ids) == ((), (boot,))
                assert (found.missing(journal["acked_seq"]), journal["errors"]) == (0, 0)
            client.volumes.delete(volume.id)
