"""What the journal confirms survives; what it cannot trust it does not guess at."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from emp.agent.journal import Journal, JournalUntrusted, JournalWriteFailed
from emp.migration.records import Ledger, Record, RecordKind

OWN = Record(RecordKind.OWN, "web", 1)
HANDOVER = Record(RecordKind.HANDOVER, "web", 1, migration="m1", peer="n2", nonce="p", epoch_target=2, epoch_back=3)
BACK = Record(RecordKind.OWN, "web", 3, migration="m1", peer="n2", nonce="p", epoch_target=2, epoch_back=3)


async def write(path: Path, *records: Record) -> None:
    journal = Journal.open(path)
    for record in records:
        await journal.append(record)
    journal.close()


async def test_what_was_confirmed_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    await write(path, OWN, HANDOVER)
    journal = Journal.open(path)
    assert journal.last("web") == HANDOVER
    assert journal.last("other") is None
    journal.close()


async def test_reopening_keeps_the_id_the_last_record_and_the_answers(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    await write(path, OWN, HANDOVER, BACK)
    first = Journal.open(path)
    first.close()
    again = Journal.open(path)
    assert again.id == first.id
    assert again.last("web") == BACK
    assert again.ledger("web").end_of("m1") == BACK
    assert again.ledger("web").highest_epoch == 3
    await again.append(Record(RecordKind.STOPPED, "web", 3))
    again.close()
    assert Journal.open(path).last("web") == Record(RecordKind.STOPPED, "web", 3)


async def test_records_of_many_evms_interleave(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    await asyncio.gather(*(journal.append(Record(RecordKind.OWN, f"evm-{n}", n + 1)) for n in range(50)))
    journal.close()
    again = Journal.open(tmp_path / "journal")
    assert sorted(again.evms) == sorted(f"evm-{n}" for n in range(50))
    again.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: data[:-20] + b"X" + data[-19:],
        lambda data: b"\n".join([data.splitlines()[0], *reversed(data.splitlines()[1:]), b""]),
        lambda data: data.replace(b'"version":1', b'"version":9'),
        lambda data: b"",
    ],
    ids=["torn", "flipped", "reordered", "foreign", "emptied"],
)
async def test_a_damaged_journal_is_refused_not_guessed_at(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "journal"
    await write(path, OWN, HANDOVER)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(JournalUntrusted):
        Journal.open(path)


async def test_a_write_that_fails_says_that_nothing_is_known(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._fd)
    os.close(full)
    with pytest.raises(JournalWriteFailed, match="No space"):
        await journal.append(OWN)
    assert journal.last("web") is None
    await journal.append(OWN)  # the disk is well again: everything known goes to a new file
    journal.close()
    again = Journal.open(tmp_path / "journal")
    assert again.last("web") == OWN
    again.close()


async def test_a_journal_that_was_put_back_is_refused_as_long_as_the_host_remembers(tmp_path: Path) -> None:
    path, seen = tmp_path / "journal", tmp_path / "run" / "seen"
    journal = Journal.open(path, seen=seen)
    for record in (OWN, HANDOVER, BACK, OWN):  # compaction drops some of these
        await journal.append(record)
    old = path.read_bytes()
    await journal.append(Record(RecordKind.STOPPED, "web", 3))
    journal.close()
    Journal.open(path, seen=seen).close()  # the same one again
    path.write_bytes(old)
    for _ in range(2):
        with pytest.raises(JournalUntrusted, match=r"up to record 4, and this host has seen .* up to record 5"):
            Journal.open(path, seen=seen)
    path.unlink()
    with pytest.raises(JournalUntrusted, match="gone"):
        Journal.open(path, seen=seen)
    seen.unlink()  # as a person does who has looked, or a reboot
    Journal.open(path, seen=seen).close()


async def test_opening_a_journal_does_not_make_it_newer(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    await write(path, OWN, HANDOVER, BACK)
    for _ in range(3):
        journal = Journal.open(path)
        assert journal.standing.seq == 3
        journal.close()


def test_a_compacted_ledger_answers_the_same_questions() -> None:
    ledger = Ledger((OWN, HANDOVER, BACK, Record(RecordKind.STOPPED, "web", 3)))
    assert ledger.compacted().last == ledger.last
    assert ledger.compacted().end_of("m1") == BACK
    assert ledger.compacted().highest_epoch == ledger.highest_epoch
    assert len(ledger.compacted().records) < len(ledger.records)
