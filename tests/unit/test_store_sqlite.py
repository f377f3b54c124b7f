"""What is particular to the SQLite store: its file, its lock, its disk and its clock."""
# ruff: noqa: ASYNC240 - a test may block its own loop

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.model.errors import OutcomeUnknown, StoreUnavailable, error_from_dict
from emp.store.base import (
    Compacted,
    Event,
    EventKind,
    KeyValue,
    Lease,
    Put,
    StoreClosed,
    StoreCorrupt,
    StoreLocked,
    StoreMismatch,
)
from emp.store.sqlite import SqliteStore
from emp.store.sqlite_tables import Page
from emp.store.sqlite_watch import SqliteWatch


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "store.db"


@pytest.fixture
async def store(path: Path) -> AsyncIterator[SqliteStore]:
    async with await SqliteStore.open(path) as opened:
        yield opened


async def fill(path: Path, count: int = 200) -> None:
    async with await SqliteStore.open(path) as store:
        for n in range(count):
            await store.txn([], [Put(f"/a/{n:04}", b"x" * 500)])


# --- who may open it


async def test_one_process_at_a_time(store: SqliteStore) -> None:
    with pytest.raises(StoreLocked, match=f"pid {os.getpid()}") as caught:
        await SqliteStore.open(store.path)
    assert caught.value.hint
    program = (
        "import asyncio, sys; from emp.store.sqlite import SqliteStore; asyncio.run(SqliteStore.open(sys.argv[1]))"
    )
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, str(store.path)), stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await other.communicate()
    assert other.returncode != 0
    assert b"StoreLocked" in stderr
    await store.txn([], [Put("/still/works", b"")])
    await store.close()
    await (await SqliteStore.open(store.path)).close()


async def test_the_records_are_for_their_owner_alone(store: SqliteStore) -> None:
    await store.txn([], [Put("/a", b"")])
    files = list(store.path.parent.iterdir())
    assert {file.name for file in files} >= {"store.db", "store.db-wal", "store.db.lock"}
    assert all(file.stat().st_mode & 0o077 == 0 for file in [*files, store.path.parent])


async def test_a_cancelled_open_leaves_nothing_open(path: Path) -> None:
    threads = set(threading.enumerate())
    for steps in range(4):
        opening = asyncio.create_task(SqliteStore.open(path))
        for _ in range(steps):
            await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        for thread in set(threading.enumerate()) - threads:
            thread.join(10)  # it closes the file, then ends
        await (await SqliteStore.open(path)).close()


# --- files it must not touch


async def test_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    await fill(path, 1)
    with sqlite3.connect(path) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreMismatch, match="newer emp: schema 99"):
        await SqliteStore.open(path)
    assert path.read_bytes() == before


async def test_other_files_are_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE accounts (id)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StoreMismatch, match="not an EMP store"):
        await SqliteStore.open(path)
    assert path.read_bytes() == before
    path.write_bytes(b"root:x:0:0:root:/root:/bin/bash\n" * 100)
    with pytest.raises(StoreCorrupt, match="not a database"):
        await SqliteStore.open(path)


async def test_a_damaged_file_is_refused(path: Path) -> None:
    await fill(path)
    sound = path.read_bytes()
    pages = len(sound) // 4096
    assert pages > 20
    for page in range(1, pages, 3):  # each page has its head overwritten in turn
        damaged = bytearray(sound)
        damaged[page * 4096 : page * 4096 + 64] = b"\xa5" * 64
        path.write_bytes(damaged)
        with pytest.raises(StoreCorrupt, match="damaged") as caught:
            await SqliteStore.open(path)
        assert "backup" in str(caught.value)
    path.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(StoreCorrupt):
        await SqliteStore.open(path)
    path.write_bytes(sound)
    await (await SqliteStore.open(path)).close()


async def test_damage_in_the_schema_is_named(path: Path) -> None:
    await fill(path, 1)
    sound = path.read_bytes()
    for old, new in ((b"CREATE TABLE kv", b"CREATE TABLE k\xff"), (b"version INTEGER", b"vErsiom INTEGER")):
        path.write_bytes(sound.replace(old, new))
        with pytest.raises(StoreCorrupt):  # at the opening or at the first use
            async with await SqliteStore.open(path) as store:
                await store.range("/")


async def test_a_store_whose_revision_went_back_is_refused(path: Path) -> None:
    await fill(path, 10)
    with sqlite3.connect(path) as other:
        other.execute("UPDATE meta SET number = 3 WHERE name = 'revision'")
    other.close()
    with pytest.raises(StoreCorrupt, match="revision 10"):
        await SqliteStore.open(path)


async def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        await SqliteStore.open(tmp_path / "file" / "store.db")
    (tmp_path / "directory").mkdir()
    with pytest.raises(StoreUnavailable):
        await SqliteStore.open(tmp_path / "directory")


# --- disks that fail

ON_A_SMALL_DISK = """
import asyncio, json, os, subprocess, sys
from pathlib import Path
from emp.model.errors import StoreUnavailable
from emp.store.base import Put
from emp.store.sqlite import SqliteStore

async def main():
    disk = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    (disk / "ballast").write_bytes(bytes(4_000_000))
    store = await SqliteStore.open(disk / "store.db")
    acknowledged = 0
    try:
        while True:
            await store.txn([], [Put(f"/a/{acknowledged:04}", bytes(3000)), Put("/b", b"%d" % acknowledged)])
            acknowledged += 1
    except StoreUnavailable as error:
        message = str(error)
    found = await store.range("/a/")
    readable = [len(found.kvs), found.revision, (await store.get("/b")).value.decode()]
    (disk / "ballast").unlink()
    after = (await store.txn([], [Put("/c", b"")])).revision
    await store.close()
    async with await SqliteStore.open(disk / "store.db") as store:
        again = (await store.range("/a/")).revision
    print(json.dumps([acknowledged, message, readable, after, again]))

asyncio.run(main())
"""


def test_a_full_disk_changes_nothing_and_passes(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    assert unshare, "util-linux is missing"
    own_mounts = ["--mount"] if os.geteuid() == 0 else ["--mount", "--user", "--map-root-user"]
    done = subprocess.run(
        [unshare, *own_mounts, sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    acknowledged, message, readable, after, again = json.loads(done.stdout)
    assert acknowledged > 20
    assert "no space left" in message
    assert readable == [acknowledged, acknowledged, str(acknowledged - 1)]
    assert after == again == acknowledged + 1


async def test_a_failed_fsync_is_an_unknown_outcome_and_stops_all_writing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = {"failed": False}

    class FailingDisk(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if sql == "COMMIT" and disk["failed"]:
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
                raise error
            return super().execute(sql, *parameters)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, factory=FailingDisk, **kwargs))
    async with await SqliteStore.open(path) as store:
        await store.txn([], [Put("/a", b"1")])
        disk["failed"] = True
        with pytest.raises(OutcomeUnknown, match="fsync"):
            await store.txn([], [Put("/a", b"2")])
        disk["failed"] = False
        with pytest.raises(StoreUnavailable, match="nothing is written any more"):
            await store.txn([], [Put("/a", b"3")])
        found = await store.get("/a")
        assert found is not None
        assert found.value == b"1"
    async with await SqliteStore.open(path) as store:
        assert (await store.txn([], [Put("/a", b"4")])).revision in (2, 3)


async def test_commits_reach_the_disk_before_they_are_acknowledged(store: SqliteStore) -> None:
    """The kill test cannot see this: what a killed process wrote survives in the page cache."""
    assert await store._run(store._tables.file.number, "PRAGMA synchronous") == 2
    assert await store._run(store._tables.file.rows, "PRAGMA journal_mode") == [("wal",)]


# --- leases and the clock


async def test_leases_begin_anew_after_a_restart(path: Path) -> None:
    ttl_s = 0.6
    async with await SqliteStore.open(path) as store:
        lease = await store.grant(ttl_s)
        await store.txn([], [Put("/l", b"", lease.id)])
    await asyncio.sleep(ttl_s)  # the holder cannot have reached a store that is down
    async with await SqliteStore.open(path) as store, asyncio.timeout(10):
        opened = time.monotonic()
        found = await store.range("/l")
        assert len(found.kvs) == 1
        await anext(store.watch("/l", found.revision))
        assert time.monotonic() - opened >= ttl_s * 0.9


async def test_leases_begin_anew_after_the_process_stood_still(store: SqliteStore) -> None:
    lease = await store.grant(0.5)
    await store.txn([], [Put("/l", b"", lease.id)])
    time.sleep(1.7)  # noqa: ASYNC251 - blocks the loop as SIGSTOP would
    for _ in range(20):
        await asyncio.sleep(0)
    await store.keep_alive(lease.id)
    found = await store.range("/l")
    assert len(found.kvs) == 1
    async with asyncio.timeout(10):
        await anext(store.watch("/l", found.revision))


async def test_a_lease_runs_out_though_its_grant_was_cancelled(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant, begun, go_on = store._tables.grant, threading.Event(), threading.Event()

    def slow(ttl_s: float) -> Lease:
        begun.set()
        assert go_on.wait(10)
        return grant(ttl_s)

    monkeypatch.setattr(store._tables, "grant", slow)
    granting = asyncio.create_task(store.grant(0.2))
    assert await asyncio.to_thread(begun.wait, 10)
    granting.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await granting
    (lease,) = await store._run(store._tables.leases)
    revision = (await store.txn([], [Put("/l", b"", lease.id)])).revision
    async with asyncio.timeout(10):
        await anext(store.watch("/l", revision))


async def test_expiry_waits_for_a_disk_that_came_back(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    revoke, failures = store._tables.revoke, [StoreUnavailable("no space left")]

    def failing(lease_id: int) -> None:
        if failures:
            raise failures.pop()
        revoke(lease_id)

    monkeypatch.setattr(store._tables, "revoke", failing)
    lease = await store.grant(0.2)
    revision = (await store.txn([], [Put("/l", b"", lease.id)])).revision
    async with asyncio.timeout(10):
        event = await anext(store.watch("/l", revision))
    assert event.revision == revision + 1
    assert not failures


# --- a watch and its wake-ups


async def test_a_commit_during_a_read_wakes_the_watch_again() -> None:
    """The read below does not see revision 2, which is committed before its answer arrives."""
    reads: list[int] = []
    kvs = {revision: KeyValue("/a", b"", 1, revision, revision) for revision in (1, 2)}

    async def read(low: str, high: str, after: int) -> Page:
        reads.append(after)
        revision = len(reads)
        if revision == 1:
            watch.on_commit(2, ["/a"])
            watch.on_commit(3, ["/elsewhere"])
        return Page((Event(EventKind.PUT, kvs[revision], revision, last=True),), revision, more=False)

    watch = SqliteWatch("/a", 0, read)
    async with asyncio.timeout(10):
        assert [(await anext(watch)).revision for _ in range(2)] == [1, 2]
    assert reads == [0, 1]


# --- errors travel


def test_errors_keep_their_type_over_http() -> None:
    compacted = error_from_dict(Compacted("gone", oldest=7).as_dict())
    assert isinstance(compacted, Compacted)
    assert compacted.oldest == 7
    for kind in (StoreClosed, StoreCorrupt, StoreLocked, StoreMismatch):
        assert type(error_from_dict(kind("message").as_dict())) is kind


async def test_compaction_gives_back_the_space(path: Path) -> None:
    async with await SqliteStore.open(path) as store:
        sizes = []
        for _ in range(4):
            for n in range(40):
                revision = (await store.txn([], [Put("/a", b"%d" % n * 10_000)])).revision
            await store.compact(revision)
            await store._run(store._tables.file.rows, "PRAGMA wal_checkpoint(TRUNCATE)")
            sizes.append(path.stat().st_size)
    assert sizes[-1] < sizes[0] * 1.2, "the file reaches a size and stays there"
