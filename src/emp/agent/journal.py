"""The node's journal: what it has promised about each EVM, on disk before it is acted on.

One append-only file. The first line names the journal (a random id); every other line is one ``Record`` with a sequence
number and a CRC-32 over the line before it, so that a torn, lost or foreign line cannot pass for an honest one::

    {"journal": "5f0c...", "version": 1} <crc>
    {"seq": 1, "kind": "own", "evm": "web", "epoch": 1} <crc>

What ``fdatasync`` confirmed survives. A journal that cannot be trusted is never guessed at: ``JournalUntrusted`` is
raised, and the agent touches nothing (rule R5). Id and number of the last record also stand in a file that survives the
agent and not the host (``seen``): a disk that was put back to an earlier day under running machines is found out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from emp import faults
from emp.migration.records import Ledger, Record, RecordKind, ledgers
from emp.model.errors import HostError

VERSION = 1
_FIELDS = {f.name for f in fields(Record)}
_ASK = "see docs/journal.md before you touch it"


class JournalUntrusted(HostError):
    """The journal is torn, foreign or of another version: a person has to look."""

    code = "journal_untrusted"


class JournalWriteFailed(HostError):
    """The record is not known to be on disk. It may be (rule R10)."""

    code = "journal_write_failed"


@dataclass(frozen=True)
class Standing:
    """How far a journal is: what its node, its peers and the controller remember of it."""

    id: str
    seq: int

    def later_than(self, other: Standing) -> bool:
        """True where ``other`` is another journal, or this one as it was before."""
        return self.id != other.id or self.seq > other.seq

    def __str__(self) -> str:
        return f"{self.id} up to record {self.seq}"


class Seen:
    """The last ``Standing`` in a file below the run directory: no sync, for it need not survive the host."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def read(self) -> Standing | None:
        words = os.pread(self._fd, 128, 0).decode().split()
        return Standing(words[0], int(words[1])) if len(words) == 2 else None

    def write(self, standing: Standing) -> None:
        with contextlib.suppress(OSError):  # a full tmpfs costs this memory and nothing else
            os.pwrite(self._fd, f"{standing.id} {standing.seq:020d}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._fd)


class Journal:
    """Replays at ``open``, then appends. All writes go through one thread, in order."""

    def __init__(self, path: Path, journal_id: str, seq: int, book: dict[str, Ledger], seen: Seen | None) -> None:
        self._path = path
        self._id = journal_id
        self._seq = seq
        self._confirmed = seq
        self._book = book
        self._broken = False
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._thread = ThreadPoolExecutor(1, "journal")
        self._seen = seen
        self._remember()

    @classmethod
    def open(cls, path: Path, *, seen: Path | None = None) -> Journal:
        """Replay the journal at ``path``, compact it, and stand ready; make a new one where there is none.

        Raises ``JournalUntrusted``, also for a journal that is behind what the file ``seen`` remembers.
        """
        memory = Seen(seen) if seen else None
        remembered = memory.read() if memory else None
        if path.exists():
            journal_id, seq, book = replay(path.read_bytes())
        elif remembered is None:
            journal_id, seq, book = secrets.token_hex(8), 0, dict[str, Ledger]()
        else:
            raise JournalUntrusted("the journal is gone, and this host has had one since it booted", hint=_ASK)
        if remembered and remembered.later_than(Standing(journal_id, seq)):
            raise JournalUntrusted(
                f"the journal is {journal_id} up to record {seq}, and this host has seen {remembered}", hint=_ASK
            )
        book = {evm: ledger.compacted() for evm, ledger in book.items()}
        return cls(path, journal_id, _write_anew(path, journal_id, seq, book), book, memory)

    @property
    def id(self) -> str:
        return self._id

    @property
    def standing(self) -> Standing:
        """Id and the highest number that is known to be on disk."""
        return Standing(self._id, self._confirmed)

    @property
    def evms(self) -> tuple[str, ...]:
        return tuple(self._book)

    def ledger(self, evm: str) -> Ledger:
        """Return what the journal says of ``evm``, as far as it is on disk."""
        return self._book.get(evm, Ledger())

    def last(self, evm: str) -> Record | None:
        return self.ledger(evm).last

    async def append(self, record: Record) -> None:
        """Return when ``record`` is on disk; raise ``JournalWriteFailed`` when that is not known."""
        writing = asyncio.get_running_loop().run_in_executor(self._thread, self._append, record)
        # The book follows the disk even if the caller is cancelled meanwhile.
        writing.add_done_callback(lambda done: self._note(record) if not done.exception() else None)
        try:
            await asyncio.shield(writing)
        except OSError as error:
            hint = "free or repair the disk: it is tried again"
            raise JournalWriteFailed(f"{self._path}: {error.strerror}", hint=hint) from error

    def _note(self, record: Record) -> None:
        self._book[record.evm] = self.ledger(record.evm).add(record)

    def _append(self, record: Record) -> None:
        if self._broken:
            # What the failed descriptor has on disk is unknown for ever: a new file, with all that is known (rule R10).
            self._seq = _write_anew(self._path, self._id, self._seq, self._book)
            fresh = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            os.dup2(fresh, self._fd)
            os.close(fresh)
        self._broken = True
        self._seq += 1
        view = memoryview(_record_line(self._seq, record))
        while view:
            view = view[os.write(self._fd, view) :]
        if faults.board:
            faults.board.hit(f"journal.{record.kind}.before_fsync")
        os.fdatasync(self._fd)
        if faults.board:
            faults.board.hit(f"journal.{record.kind}.after_fsync")
        self._broken = False
        self._confirmed = self._seq
        self._remember()

    def _remember(self) -> None:
        if self._seen is not None:
            self._seen.write(self.standing)

    def close(self) -> None:
        self._thread.shutdown()
        os.close(self._fd)
        if self._seen is not None:
            self._seen.close()


def _line(body: dict[str, object]) -> bytes:
    text = json.dumps(body, separators=(",", ":")).encode()
    return text + f" {zlib.crc32(text):08x}\n".encode()


def replay(data: bytes) -> tuple[str, int, dict[str, Ledger]]:
    if not data.endswith(b"\n"):
        raise JournalUntrusted("the journal ends in a torn line", hint=_ASK)
    bodies = [_checked(number, line) for number, line in enumerate(data.splitlines(), 1)]
    if not bodies or bodies[0].get("version") != VERSION:
        raise JournalUntrusted("the journal is of another version", hint=f"this agent reads version {VERSION}")
    records: list[Record] = []
    seq = int(str(bodies[0].get("seq", 0)))
    for body in bodies[1:]:
        number = int(str(body.pop("seq")))
        if number <= seq:
            raise JournalUntrusted(f"the journal goes back from record {seq} to {number}")
        seq = number
        if not set(body) <= _FIELDS:
            raise JournalUntrusted(f"record {seq} has fields this agent does not know")
        records.append(Record(**{**body, "kind": RecordKind(str(body["kind"]))}))  # type: ignore[arg-type]
    return str(bodies[0]["journal"]), seq, ledgers(records)


def _checked(number: int, line: bytes) -> dict[str, object]:
    text, _, crc = line.rpartition(b" ")
    if f"{zlib.crc32(text):08x}".encode() != crc:
        raise JournalUntrusted(f"line {number} of the journal is damaged", hint=_ASK)
    body = json.loads(text)
    if not isinstance(body, dict):
        raise JournalUntrusted(f"line {number} of the journal is not a record")
    return body


def _record_line(seq: int, record: Record) -> bytes:
    return _line({"seq": seq, **{k: v for k, v in asdict(record).items() if v is not None}})


def _write_anew(path: Path, journal_id: str, seq: int, book: dict[str, Ledger]) -> int:
    """Write the whole journal to a new file, put it in place (rename(2) is atomic); return the last number.

    That stays ``seq``, or an old journal would seem new by being opened: the records kept get the numbers up to it.
    """
    kept = [record for ledger in book.values() for record in ledger.records]
    before = seq - len(kept)
    head = _line({"journal": journal_id, "version": VERSION, "seq": before})
    lines = [head, *(_record_line(before + n, record) for n, record in enumerate(kept, 1))]
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_suffix(".new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, b"".join(lines))
        os.fsync(fd)
    finally:
        os.close(fd)
    fresh.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return seq
