"""The database file: one process at a time, known to be ours and sound, every SQLite failure made a typed one.

WAL with synchronous=FULL: a commit returns after its frames and their checksum were fsynced, so it survives the loss
of power; a torn commit fails its checksum and is dropped whole at the next open (https://www.sqlite.org/wal.html).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emp.model.errors import OutcomeUnknown, StoreUnavailable
from emp.store.base import StoreCorrupt, StoreLocked, StoreMismatch

SCHEMA_VERSION = 1
APPLICATION_ID = 0x454D5053  # "EMPS"
_BUSY_TIMEOUT_S = 5.0  # an administrator's sqlite3 shell may hold the file for a moment
_WAL_KEPT_BYTES = 64 << 20

_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE meta (name TEXT PRIMARY KEY, number INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO meta VALUES ('revision', 0), ('compacted', 0);
CREATE TABLE kv (
    key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL,
    create_revision INTEGER NOT NULL, mod_revision INTEGER NOT NULL, version INTEGER NOT NULL, lease INTEGER NOT NULL
) STRICT;
CREATE INDEX kv_lease ON kv (lease) WHERE lease != 0;
CREATE TABLE history ( -- what watches read; a deletion has no value
    seq INTEGER PRIMARY KEY, key TEXT NOT NULL, value BLOB,
    create_revision INTEGER NOT NULL, mod_revision INTEGER NOT NULL, version INTEGER NOT NULL, lease INTEGER NOT NULL
) STRICT;
CREATE INDEX history_revision ON history (mod_revision);
CREATE TABLE lease (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_s REAL NOT NULL) STRICT;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""


class DatabaseFile:
    """An open database. Belongs to the thread that made it.

    Raises ``StoreLocked``, ``StoreMismatch``, ``StoreCorrupt`` or ``StoreUnavailable``, and then holds nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._broken: str | None = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_fd = _lock(path)
            try:
                _create(path)
                with self.translated():
                    self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
                try:
                    with self.translated():
                        self._prepare()
                except BaseException:
                    self._connection.close()
                    raise
            except BaseException:
                os.close(self._lock_fd)
                raise
        except OSError as error:
            raise StoreUnavailable(f"the store {path} cannot be opened: {error.strerror}") from error

    def _prepare(self) -> None:
        number = self.number
        application_id, version = number("PRAGMA application_id"), number("PRAGMA user_version")
        is_new = number("SELECT count(*) FROM sqlite_schema") == 0 and application_id == version == 0
        if not is_new:
            if application_id != APPLICATION_ID:
                raise StoreMismatch(f"{self.path} is a SQLite database, but not an EMP store")
            if version > SCHEMA_VERSION:
                raise StoreMismatch(
                    f"{self.path} was written by a newer emp: schema {version}, this program knows {SCHEMA_VERSION}",
                    hint="run that version or a newer one, or restore the backup made before the upgrade",
                )
            report = self.rows("PRAGMA quick_check(1)")[0][0]
            if report != "ok":
                raise self._corrupt(str(report))
        mode = self.rows("PRAGMA journal_mode = WAL")[0][0]
        if mode != "wal":
            raise StoreUnavailable(f"{self.path}: the file system allows no write-ahead log", hint="use a local disk")
        for setting in ("synchronous = FULL", f"journal_size_limit = {_WAL_KEPT_BYTES}", "trusted_schema = OFF"):
            self.rows(f"PRAGMA {setting}")
        if is_new:
            self._connection.executescript(_SCHEMA)
        newest = number(
            "SELECT max(coalesce((SELECT max(mod_revision) FROM kv), 0), "
            "coalesce((SELECT max(mod_revision) FROM history), 0))"
        )
        if newest > number("SELECT number FROM meta WHERE name = 'revision'"):
            raise self._corrupt(f"a record has revision {newest}, the store is older")

    def rows(self, sql: str, *parameters: str | bytes | float | None) -> list[tuple[object, ...]]:
        """Run one statement and return all its rows."""
        return self._connection.execute(sql, parameters).fetchall()

    def number(self, sql: str, *parameters: str | int) -> int:
        """Return the integer that a query yields. A sound store has one wherever it is asked."""
        match self.rows(sql, *parameters):
            case [[int(value)]]:
                return value
        raise self._corrupt(f"no answer to {sql}")

    def change(self, sql: str, *parameters: str | bytes | float | None) -> sqlite3.Cursor:
        """Run one changing statement; ``rowcount`` and ``lastrowid`` of the result say what it did."""
        return self._connection.execute(sql, parameters)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what the block does, or undo it all when the block or the commit fails."""
        if self._broken:
            raise StoreUnavailable(self._broken, hint="look at the disk, then restart the controller")
        with self.translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                if getattr(error, "sqlite_errorcode", None) in (
                    sqlite3.SQLITE_IOERR_FSYNC,
                    sqlite3.SQLITE_IOERR_DIR_FSYNC,
                ):
                    # The commit may be whole in the log and be found at the next open; and after a failed fsync the
                    # kernel may call lost pages clean, so no later fsync proves anything.
                    self._broken = f"the disk under {self.path} failed an fsync ({error}); nothing is written any more"
                    raise OutcomeUnknown(self._broken, hint="look at the disk, then restart the controller") from error
                raise

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn a failure of SQLite into the store's error.

        A plain SQLITE_ERROR, or text that cannot be decoded (Python gives that no code), is damage too: the SQL is
        fixed, so it can only be the schema or the keys that are not what was written.
        """
        try:
            yield
        except UnicodeDecodeError as error:
            raise self._corrupt(str(error)) from error
        except sqlite3.Error as error:
            if isinstance(error, sqlite3.ProgrammingError):
                raise
            match getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF:
                case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_ERROR:
                    raise self._corrupt(str(error)) from error
                case sqlite3.SQLITE_FULL:
                    raise StoreUnavailable(f"no space left for the store {self.path}", hint="free some") from error
                case (
                    sqlite3.SQLITE_IOERR
                    | sqlite3.SQLITE_READONLY
                    | sqlite3.SQLITE_CANTOPEN
                    | sqlite3.SQLITE_BUSY
                    | sqlite3.SQLITE_PERM
                    | sqlite3.SQLITE_NOMEM
                    | sqlite3.SQLITE_PROTOCOL
                ):
                    raise StoreUnavailable(f"the store {self.path} failed: {error}") from error
            raise

    def _corrupt(self, why: str) -> StoreCorrupt:
        return StoreCorrupt(
            f"the store {self.path} is damaged: {why}", hint="keep the file, and restore the last backup in its place"
        )

    def close(self) -> None:
        """Close the file and let another process have it."""
        try:
            with self.translated():
                self._connection.close()
        finally:
            os.close(self._lock_fd)


def _lock(path: Path) -> int:
    """Return the descriptor that holds the lock. The kernel lets go of it when the process dies, however it dies."""
    lock_path = path.with_name(path.name + ".lock")
    fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StoreLocked(
            f"the store {path} is open in another process (pid {holder})",
            hint="one controller per SQLite store: stop the other one, or give this one its own path",
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _create(path: Path) -> None:
    """Make the file, readable by its owner alone, with its name on disk before anything depends on it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
