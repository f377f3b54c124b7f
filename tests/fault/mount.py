"""The EFS mount of a stage's EVM: a file that its guest writes all the time, and a lock that it holds there.

A migration moves nothing of a mount, so all of it has to go on: the same lock, the same open file, not one error. A
guest that has booted anew mounts again, and goes on with the chain of records that the boot before has left.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from emp.lab.journal_check import check_journal
from emp.model.errors import EmpError, HostError
from tests.lab.conftest import Pool
from tests.lab.pool import Subject
from tests.lab.served import Served

RATE_HZ = 20
PATIENCE_S = 60.0
"""longer than the grace period in which a server that has started anew opens and locks nothing but what is reclaimed"""


class Mount:
    """One file system, which every EVM of a stage mounts; each has a file of its own in it, each boot a lock."""

    def __init__(self, pool: Pool) -> None:
        self._served = Served(pool)
        self.id, self.data = self._served.id, self._served.data
        self._acked: dict[str, int] = {}
        """file -> the last record that the guest has been told is safe"""
        self._before: dict[str, Any] = {}
        self._files: list[str] = []
        """of the cell's EVM, and of the one that has come in its place"""

    def begin(self, subject: Subject) -> None:
        """Return once the guest holds its lock and writes its file; it may do so already. Raises ``AssertionError``."""
        guest, lock = subject.guest(), self.lock_of(subject)
        if not any(held["path"] == lock for held in guest.ask("lock status", timeout_s=PATIENCE_S)):
            assert _within(lambda: self._take(subject, lock)), f"{subject.name} does not mount {self.id}"
        if not any(journal["running"] for journal in self._journals(subject)):
            guest.ask(f"journal start {self.path(self.file_of(subject))} {RATE_HZ}", timeout_s=PATIENCE_S)

    def _take(self, subject: Subject, lock: str) -> bool:
        try:
            subject.guest().ask(f"lock take {lock}", timeout_s=PATIENCE_S)
        except HostError:  # it has no such directory yet
            return False
        if self._served.holds(lock):
            return True
        subject.guest().ask(f"lock drop {lock}")  # that was in the guest's own memory: nothing is mounted there yet
        return False

    def watch(self, subject: Subject) -> None:
        """Remember how the mount is, before a cell breaks anything."""
        self._before = self._lock(subject)
        self._files = [self.file_of(subject)]
        self._journals(subject)

    def note(self, journals: Sequence[dict[str, Any]]) -> None:
        """Remember what the guest has been told is safe."""
        for journal in journals:
            path, file = str(journal["serial"]), str(journal["serial"]).rpartition("/")[2]
            if path == self.path(file):
                self._acked[file] = max(self._acked.get(file, -1), int(journal["acked_seq"]))

    def violations(self, subject: Subject, *, same_boot: bool) -> list[str]:
        """Return what is wrong with the mount after a cell. Its file is looked at and goes on."""
        wrong: list[str] = []
        try:
            file = self.file_of(subject)
            if same_boot:
                wrong += self._goes_on(subject)
            else:
                for old in self._files:
                    wrong += self._damage(old)
                self.begin(subject)
                wrong += self._grows(subject)
            self.note(subject.guest().ask(f"journal stop {self.path(file)}", timeout_s=PATIENCE_S))
            wrong += self._damage(file)
            self.begin(subject)
        except (EmpError, AssertionError) as error:
            wrong.append(str(error))
        return wrong

    def _goes_on(self, subject: Subject) -> Iterator[str]:
        lock = self._lock(subject)
        if not lock.get("held"):
            yield f"the guest has lost its lock: {lock.get('last_error', 'there is none')}"
        elif lock["held_s"] < self._before["held_s"]:
            yield "the guest's lock is not the one that it had"
        elif not _within(lambda: self._served.locked(lock["path"].rpartition("/")[2])):
            yield "the server does not know of the guest's lock"
        yield from self._grows(subject)

    def _grows(self, subject: Subject) -> Iterator[str]:
        (began,) = self._journals(subject) or [{"running": False}]
        if not began["running"]:
            yield "the guest has stopped writing its file"
            return
        if not _within(lambda: self._journals(subject)[0]["acked_seq"] > began["acked_seq"] + 1):
            yield "the guest's file does not grow"
        (now,) = self._journals(subject)
        if now["errors"]:
            yield f"{now['errors']} writes of the guest failed: {now['last_error']}"

    def _damage(self, file: str) -> list[str]:
        found = check_journal(self.data / file)
        missing = found.missing(self._acked.get(file, -1))
        return [*found.errors, *([f"{missing} acknowledged records are missing in {file}"] if missing else [])]

    def _journals(self, subject: Subject) -> list[dict[str, Any]]:
        """Return that of the guest's file, if it has one."""
        path = self.path(self.file_of(subject))
        found = [dict(one) for one in subject.guest().ask("journal status") if one["serial"] == path]
        self.note(found)
        return found

    def _lock(self, subject: Subject) -> dict[str, Any]:
        """Return the guest's lock, under which it has just written; empty if it has none."""
        held = subject.guest().ask("lock status", timeout_s=PATIENCE_S)
        return next((dict(one) for one in held if one["path"] == self.lock_of(subject)), {})

    def lock_of(self, subject: Subject) -> str:
        """Path of the lock of this boot: another boot's file of that name would not tell that this one has mounted."""
        return self.path(f"{subject.name}.{subject.boot_id[:8]}")

    def file_of(self, subject: Subject) -> str:
        return f"{subject.name}.j"

    def path(self, name: str) -> str:
        """Where the guest has a file of it."""
        return f"{self._served.home}/{name}"


def _within(look: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found
