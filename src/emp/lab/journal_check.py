"""Checks, from the host, the journal that the guest service appended to a volume (``guest/journal.h``).

Each record is 4 KiB at offset ``seq * 4096`` and carries its own CRC-32 and that of the record before. So a write that
was lost, torn, doubled, made by a guest that should not have run, or undone after it was acknowledged breaks the chain.
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

RECORD_BYTES = 4096
_HEAD = struct.Struct("<8sIIIIQQ40s")  # magic, version, prev_crc, crc, reserved, seq, time_us, boot_id
_CRC = slice(16, 20)
_MAGIC = b"EMPJRNL\0"
_BLOCK_BYTES = 1 << 20
_ZERO_RECORD = bytes(RECORD_BYTES)
_ZERO_BLOCK = bytes(_BLOCK_BYTES)


@dataclass(frozen=True)
class JournalReport:
    """``last_seq`` is the last record of the unbroken chain (-1: none), ``records`` its length.

    ``errors`` say what is wrong, at most one for each record; ``boot_ids`` are the guests that wrote, in that order.
    """

    last_seq: int
    records: int
    errors: tuple[str, ...]
    boot_ids: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.errors

    def missing(self, acked_seq: int) -> int:
        """Return how many records the guest was told were safe (up to ``acked_seq``) and are not in the chain."""
        return max(0, acked_seq - self.last_seq)


def check_journal(path: Path) -> JournalReport:
    """Read a raw volume image (or block device) and follow its chain to the end. Raises OSError if it cannot be read.

    Behind the chain all must be zero, as on a new volume: a record there means that one before it was lost. A chain
    that is merely shorter than it should be looks whole; ``missing`` tells.
    """
    errors: list[str] = []
    boot_ids: list[str] = []
    prev_crc = length = 0
    with path.open("rb") as volume:
        while (record := volume.read(RECORD_BYTES)) and len(record) == RECORD_BYTES and record != _ZERO_RECORD:
            problem, crc, boot_id = _check_record(record, length, prev_crc)
            if problem:
                errors.extend(_check_rest(volume, length, problem))
                break
            if boot_ids[-1:] != [boot_id]:
                boot_ids.append(boot_id)
            prev_crc = crc
            length += 1
        else:
            errors.extend(_check_rest(volume, length, ""))
    return JournalReport(length - 1, length, tuple(errors), tuple(boot_ids))


def _check_record(record: bytes, seq: int, prev_crc: int) -> tuple[str, int, str]:
    """Return (what is wrong or "", the record's CRC, its boot id)."""
    magic, version, found_prev, crc, _, found_seq, _, boot_id = _HEAD.unpack_from(record)
    name = boot_id.rstrip(b"\0").decode("ascii", "replace")
    if magic != _MAGIC or version != 1:
        return f"record {seq}: no journal record", crc, name
    blank = record[: _CRC.start] + bytes(4) + record[_CRC.stop :]
    if zlib.crc32(blank) != crc:
        return f"record {seq}: checksum is {zlib.crc32(blank):08x}, the record says {crc:08x}", crc, name
    if found_seq != seq:
        return f"record {seq}: carries the number {found_seq}", crc, name
    if found_prev != prev_crc:
        return f"record {seq}: follows {found_prev:08x}, the record before is {prev_crc:08x}", crc, name
    return "", crc, name


def _check_rest(volume: BinaryIO, seq: int, problem: str) -> list[str]:
    """Judge what lies behind the chain, whose first broken or empty record is ``seq``."""
    later = 0
    for block in _rest(volume):
        if block != _ZERO_BLOCK[: len(block)]:
            later += sum(block[at : at + RECORD_BYTES].strip(b"\0") != b"" for at in range(0, len(block), RECORD_BYTES))
    if later:
        return [problem or f"record {seq}: empty", f"{later} more records lie behind record {seq}"]
    return [problem] if problem else []


def _rest(volume: BinaryIO) -> Iterator[bytes]:
    """Yield what there is from here on, without the holes of a sparse file: a volume of a cloud is some GiB of them."""
    at = volume.tell()
    while True:
        try:
            at = max(at, os.lseek(volume.fileno(), at, os.SEEK_DATA) // RECORD_BYTES * RECORD_BYTES)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end (lseek(2))
                return
            if error.errno != errno.EINVAL:  # a block device knows no holes
                raise
        volume.seek(at)
        if not (block := volume.read(_BLOCK_BYTES)):
            return
        yield block
        at += len(block)
