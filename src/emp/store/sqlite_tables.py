"""The store's operations as SQL, synchronous, for the one thread that owns the connection."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import cast

from emp.store.base import (
    Compacted,
    Compare,
    Delete,
    Event,
    EventKind,
    FutureRevision,
    Get,
    KeyValue,
    Lease,
    LeaseGone,
    Op,
    Put,
    Range,
    TxnResult,
)
from emp.store.rules import holds
from emp.store.sqlite_file import DatabaseFile

_COLUMNS = "key, value, create_revision, mod_revision, version, lease"
_PAGE_EVENTS = 256
_PAGE_REVISIONS = 10_000  # bounds the time for which a reader of old history keeps the thread
_COMPACT_ROWS = 2_000

OnCommit = Callable[[int, Collection[str]], None]


@dataclass(frozen=True, slots=True)
class Page:
    """The events up to and with revision ``upto``; ``more`` says that the store is further."""

    events: tuple[Event, ...]
    upto: int
    more: bool


class Tables:
    """The open database. ``on_commit(revision, keys)`` is called after each commit, before the caller hears of it."""

    def __init__(self, path: Path, on_commit: OnCommit) -> None:
        self.file = DatabaseFile(path)
        self._on_commit = on_commit
        try:
            with self.file.translated():
                self._revision = self.file.number("SELECT number FROM meta WHERE name = 'revision'")
                self._compacted = self.file.number("SELECT number FROM meta WHERE name = 'compacted'")
        except BaseException:
            self.file.close()
            raise

    def get(self, key: str) -> KeyValue | None:
        with self.file.translated():
            return self._get(key)

    def _get(self, key: str) -> KeyValue | None:
        rows = self.file.rows(f"SELECT {_COLUMNS} FROM kv WHERE key = ?", key)
        return _kv(rows[0]) if rows else None

    def range(self, low: str, high: str, limit: int, after: str) -> Range:
        with self.file.translated():
            rows = self.file.rows(
                f"SELECT {_COLUMNS} FROM kv WHERE key >= ? AND key < ? AND key > ? ORDER BY key LIMIT ?",
                *(low, high, after, limit + 1),
            )
        return Range(tuple(map(_kv, rows[:limit])), self._revision, more=len(rows) > limit)

    def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op]) -> TxnResult:
        changed: list[str] = []
        found: list[KeyValue | None] = []
        revision = self._revision + 1
        with self.file.transaction():
            succeeded = all(holds(compare, self._get(compare.key)) for compare in compares)
            for op in then if succeeded else otherwise:
                match op:
                    case Get(key):
                        found.append(self._get(key))
                    case Put():
                        self._put(op, revision)
                        changed.append(op.key)
                    case Delete(key):
                        if self._delete(key, revision):
                            changed.append(key)
            self._advance(changed)
        self._committed(changed)
        return TxnResult(succeeded, self._revision, tuple(found))

    def _put(self, put: Put, revision: int) -> None:
        if put.lease and not self.file.rows("SELECT 1 FROM lease WHERE id = ?", put.lease):
            raise lease_gone(put.lease)
        old = self.file.rows("SELECT create_revision, version FROM kv WHERE key = ?", put.key)
        created, version = cast("tuple[int, int]", old[0]) if old else (revision, 0)
        row = (put.key, put.value, created, revision, version + 1, put.lease)
        self.file.change(f"INSERT OR REPLACE INTO kv ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", *row)
        self.file.change(f"INSERT INTO history ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", *row)

    def _delete(self, key: str, revision: int) -> bool:
        if not self.file.change("DELETE FROM kv WHERE key = ?", key).rowcount:
            return False
        self.file.change(f"INSERT INTO history ({_COLUMNS}) VALUES (?, NULL, 0, ?, 0, 0)", key, revision)
        return True

    def _advance(self, changed: Collection[str]) -> None:
        if changed:
            self.file.change("UPDATE meta SET number = ? WHERE name = 'revision'", self._revision + 1)

    def _committed(self, changed: Collection[str]) -> None:
        if changed:
            self._revision += 1
            self._on_commit(self._revision, changed)

    def events(self, low: str, high: str, after: int) -> Page:
        """Return the next events beyond revision ``after``, never a part of a revision."""
        if after < self._compacted:
            raise Compacted(
                f"the history after revision {after} is gone; the oldest kept begins after {self._compacted}",
                hint="list again and watch from the list's revision",
                oldest=self._compacted,
            )
        self._check_known(after)
        upto = min(self._revision, after + _PAGE_REVISIONS)
        with self.file.translated():
            rows = self._history(low, high, after, upto, _PAGE_EVENTS)
            if len(rows) == _PAGE_EVENTS:  # the last revision may be cut: leave it to the next page
                cut = rows[-1].mod_revision
                rows = [kv for kv in rows if kv.mod_revision < cut]
                upto = cut - 1
                if not rows:  # one transaction larger than a page
                    upto = cut
                    rows = self._history(low, high, cut - 1, cut, -1)
        return Page(tuple(_events(rows)), upto, more=upto < self._revision)

    def _history(self, low: str, high: str, after: int, upto: int, limit: int) -> list[KeyValue]:
        rows = self.file.rows(
            f"SELECT {_COLUMNS} FROM history WHERE mod_revision > ? AND mod_revision <= ? AND key >= ? AND key < ? "
            "ORDER BY mod_revision, seq LIMIT ?",
            *(after, upto, low, high, limit),
        )
        return [_kv(row) for row in rows]

    def begin_compaction(self, revision: int) -> None:
        """Make the history up to ``revision`` unreadable; ``compact_some`` then frees it."""
        self._check_known(revision)
        if revision > self._compacted:
            with self.file.transaction():
                self.file.change("UPDATE meta SET number = ? WHERE name = 'compacted'", revision)
            self._compacted = revision

    def compact_some(self) -> bool:
        """Free a part of the compacted history, so that others get their turn; return whether there may be more."""
        with self.file.transaction():
            removed = self.file.change(
                "DELETE FROM history WHERE seq IN (SELECT seq FROM history WHERE mod_revision <= ? LIMIT ?)",
                *(self._compacted, _COMPACT_ROWS),
            ).rowcount
        return removed == _COMPACT_ROWS

    def leases(self) -> list[Lease]:
        with self.file.translated():
            return [Lease(*cast("tuple[int, float]", row)) for row in self.file.rows("SELECT id, ttl_s FROM lease")]

    def grant(self, ttl_s: float) -> Lease:
        with self.file.transaction():
            lease_id = self.file.change("INSERT INTO lease (ttl_s) VALUES (?)", ttl_s).lastrowid
        assert lease_id is not None
        return Lease(lease_id, ttl_s)

    def revoke(self, lease_id: int) -> None:
        with self.file.transaction():
            if not self.file.change("DELETE FROM lease WHERE id = ?", lease_id).rowcount:
                raise lease_gone(lease_id)
            rows = self.file.rows("SELECT key FROM kv WHERE lease = ? ORDER BY key", lease_id)
            keys = [str(row[0]) for row in rows]
            for key in keys:
                self._delete(key, self._revision + 1)
            self._advance(keys)
        self._committed(keys)

    def _check_known(self, revision: int) -> None:
        if revision > self._revision:
            raise FutureRevision(
                f"revision {revision} is not reached; the store is at {self._revision}",
                hint="was the store restored from a backup? list again and watch from the list's revision",
            )

    def close(self) -> None:
        self.file.close()


def lease_gone(lease_id: int) -> LeaseGone:
    """Return the error for a lease that is not there."""
    return LeaseGone(f"lease {lease_id} has expired or was revoked", field="lease", hint="grant a new one")


def _kv(row: tuple[object, ...]) -> KeyValue:
    key, value, created, modified, version, lease = cast("tuple[str, bytes | None, int, int, int, int]", row)
    return KeyValue(key, value or b"", created, modified, version, lease)


def _events(rows: Sequence[KeyValue]) -> Iterator[Event]:
    for kv, following in zip_longest(rows, rows[1:]):
        kind = EventKind.PUT if kv.version else EventKind.DELETE
        last = following is None or following.mod_revision != kv.mod_revision
        yield Event(kind, kv, kv.mod_revision, last)
