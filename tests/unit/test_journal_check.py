"""The journal checker accepts a whole chain and fails on everything that a lost or foreign write would leave."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from emp.lab.journal_check import RECORD_BYTES, check_journal

BOOT = "5ca1ab1e-0000-4000-8000-000000000000"


def record(seq: int, prev_crc: int, boot: str = BOOT) -> bytes:
    """A record as ``guest/journal.h`` lays it out, by another way than the checker's."""

    def packed(crc: int) -> bytes:
        head = b"EMPJRNL\0" + struct.pack("<IIII", 1, prev_crc, crc, 0) + struct.pack("<QQ", seq, 1_700_000_000_000_000)
        return (head + boot.encode().ljust(40, b"\0")).ljust(RECORD_BYTES, bytes([seq % 251 + 1]))

    return packed(zlib.crc32(packed(0)))


def crc_of(data: bytes) -> int:
    return int.from_bytes(data[16:20], "little")


def chain(count: int, boot: str = BOOT, after: list[bytes] | None = None) -> list[bytes]:
    records = list(after or [])
    for seq in range(len(records), len(records) + count):
        records.append(record(seq, crc_of(records[-1]) if records else 0, boot))
    return records


def volume(tmp_path: Path, records: list[bytes], size_records: int = 600) -> Path:
    path = tmp_path / "volume"
    path.write_bytes(b"".join(records).ljust(size_records * RECORD_BYTES, b"\0"))
    return path


def test_a_whole_chain_is_accepted(tmp_path: Path) -> None:
    report = check_journal(volume(tmp_path, chain(300)))
    assert (report.last_seq, report.records, report.errors, report.boot_ids) == (299, 300, (), (BOOT,))
    assert report.ok
    assert report.missing(299) == 0
    assert report.missing(301) == 2


def test_an_empty_volume_holds_no_record(tmp_path: Path) -> None:
    report = check_journal(volume(tmp_path, []))
    assert (report.last_seq, report.records, report.ok) == (-1, 0, True)
    assert report.missing(-1) == 0
    assert report.missing(0) == 1


def test_a_full_volume_is_accepted(tmp_path: Path) -> None:
    report = check_journal(volume(tmp_path, chain(16), 16))
    assert (report.last_seq, report.ok) == (15, True)


def test_a_chain_goes_on_over_a_reboot(tmp_path: Path) -> None:
    report = check_journal(volume(tmp_path, chain(5, "another", after=chain(5))))
    assert (report.last_seq, report.ok, report.boot_ids) == (9, True, (BOOT, "another"))


def flipped(at: int) -> Callable[[list[bytes]], None]:
    def plant(records: list[bytes]) -> None:
        data = bytearray(records[4])
        data[at] ^= 1
        records[4] = bytes(data)

    return plant


def lost(records: list[bytes]) -> None:
    records[4] = bytes(RECORD_BYTES)


def undone(records: list[bytes]) -> None:
    records[4] = records[3]


def torn(records: list[bytes]) -> None:
    records[4] = records[4][:512] + bytes(RECORD_BYTES - 512)


def forked(records: list[bytes]) -> None:
    """A second guest wrote record 4 over the first one's: valid in itself, but record 5 follows another one."""
    records[4] = record(4, crc_of(records[3]), "another")


def replaced(records: list[bytes]) -> None:
    records[4] = record(4, 12345)


@pytest.mark.parametrize(
    ("plant", "seq"),
    [
        (flipped(0), 4),
        (flipped(12), 4),
        (flipped(17), 4),
        (flipped(24), 4),
        (flipped(45), 4),
        (flipped(RECORD_BYTES - 1), 4),
        (lost, 4),
        (undone, 4),
        (torn, 4),
        (forked, 5),
        (replaced, 4),
    ],
)
def test_damage_inside_the_chain_is_found(tmp_path: Path, plant: Callable[[list[bytes]], None], seq: int) -> None:
    records = chain(10)
    plant(records)
    report = check_journal(volume(tmp_path, records))
    assert not report.ok
    assert report.last_seq == seq - 1
    assert f"record {seq}" in report.errors[0]
    assert report.missing(9) == 9 - report.last_seq


def test_damage_to_the_last_record_is_found(tmp_path: Path) -> None:
    records = chain(5)
    flipped(100)(records)
    report = check_journal(volume(tmp_path, records))
    assert (report.ok, report.last_seq) == (False, 3)


def test_a_record_far_behind_the_chain_is_found(tmp_path: Path) -> None:
    records = chain(300)
    records[1:299] = [bytes(RECORD_BYTES)] * 298
    report = check_journal(volume(tmp_path, records))
    assert (report.last_seq, len(report.errors)) == (0, 2)
    assert "1 more records" in report.errors[1]


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    report = check_journal(volume(tmp_path, [b"\x53\xef" * (RECORD_BYTES // 2)]))
    assert (report.last_seq, report.ok) == (-1, False)


def test_a_volume_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_journal(tmp_path / "missing")


def test_a_record_behind_gibibytes_of_nothing_is_found(tmp_path: Path) -> None:
    """A volume of a cloud is sparse: its holes are passed over, and what lies between them is not."""
    path, records = tmp_path / "volume", chain(3)
    path.write_bytes(b"".join(records))
    with path.open("r+b") as sparse:
        sparse.truncate(4 << 30)
        assert check_journal(path).ok
        sparse.seek((2 << 30) + RECORD_BYTES)
        sparse.write(record(9, 0))
        sparse.flush()
    found = check_journal(path)
    assert (found.records, found.errors) == (3, ("record 3: empty", "1 more records lie behind record 3"))
