"""The daemons' disks: what was written and not synced is lost with the host's power, and a write may fail.

``FakeOs`` stands in for the module ``os`` in the agent's journal and shelf, ``DiskPath`` for their paths.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tests.simulation.loop import here


@dataclass
class File:
    data: bytearray = field(default_factory=bytearray)
    synced: int = 0
    """bytes from the beginning that survive a power cut"""


@dataclass
class Disk:
    """One host's. ``trouble`` says which error the next write or sync meets, if any."""

    host: str
    rng: random.Random
    files: dict[str, File] = field(default_factory=dict)
    failing: str | None = None
    """``EIO`` or ``ENOSPC``"""
    on_sync: Callable[[str], None] = lambda _: None
    syncs: ClassVar[bool] = True
    """False: fsync does nothing (a planted bug)"""

    def lose_power(self) -> None:
        """What lies in memory is gone (``run/``, on a tmpfs), and so is what was not synced."""
        self.files = {name: file for name, file in self.files.items() if "/run/" not in name}
        for file in self.files.values():
            if self.rng.random() < 0.7:  # the kernel may have written it out by itself
                del file.data[file.synced :]
            file.synced = len(file.data)


class DiskPath:
    """As much of ``pathlib.Path`` as the journal and the shelf use."""

    def __init__(self, disk: Disk, name: str) -> None:
        self.disk = disk
        self.name = name

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DiskPath) and other.name == self.name

    def __truediv__(self, name: str) -> DiskPath:
        return DiskPath(self.disk, f"{self.name}/{name}")

    @property
    def parent(self) -> DiskPath:
        return DiskPath(self.disk, self.name.rpartition("/")[0])

    def with_suffix(self, suffix: str) -> DiskPath:
        return DiskPath(
            self.disk, self.name.rpartition(".json")[0] + suffix if ".json" in self.name else self.name + suffix
        )

    def with_name(self, name: str) -> DiskPath:
        return self.parent / name

    @property
    def stem(self) -> str:
        return self.name.rpartition("/")[2].rpartition(".")[0]

    def glob(self, pattern: str) -> list[DiskPath]:
        found = [n for n in self.disk.files if fnmatch.fnmatchcase(n, f"{self.name}/{pattern}")]
        return [DiskPath(self.disk, name) for name in sorted(found)]

    def exists(self) -> bool:
        return self.name in self.disk.files

    def mkdir(self, **_: Any) -> None:
        pass

    def read_bytes(self) -> bytes:
        return bytes(self.disk.files[self.name].data)

    def rename(self, to: DiskPath) -> DiskPath:
        here()
        self.disk.files[to.name] = self.disk.files.pop(self.name)
        return to

    def replace(self, to: DiskPath) -> DiskPath:
        return self.rename(to)

    def unlink(self, missing_ok: bool = False) -> None:
        here()
        self.disk.files.pop(self.name, None)


class FakeOs:
    """As much of ``os`` as the journal and the shelf use."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Disk, File | None, str]] = {}
        self._next = 10_000

    def __getattr__(self, name: str) -> Any:
        if name.startswith("O_") or name in ("strerror", "fspath"):
            return getattr(os, name)
        raise AttributeError(f"the simulated disk has no os.{name}")

    def open(self, path: DiskPath, flags: int, mode: int = 0o600) -> int:
        here()
        file = path.disk.files.get(path.name)
        if flags & os.O_CREAT:
            _trouble(path.disk, "ENOSPC")
            file = path.disk.files.setdefault(path.name, File())
            if flags & os.O_TRUNC:
                file = path.disk.files[path.name] = File()
        elif file is None and not flags & os.O_WRONLY:
            file = None  # a directory
        self._next += 1
        self._open[self._next] = path.disk, file, path.name
        return self._next

    def write(self, fd: int, data: bytes) -> int:
        here()
        disk, file, _ = self._open[fd]
        assert file is not None
        _trouble(disk, "ENOSPC")
        file.data += bytes(data)
        return len(data)

    def pread(self, fd: int, count: int, offset: int) -> bytes:
        _, file, _ = self._open[fd]
        return bytes(file.data[offset : offset + count]) if file else b""

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        here()
        disk, file, _ = self._open[fd]
        assert file is not None
        _trouble(disk, "ENOSPC")
        file.data[offset : offset + len(data)] = data
        return len(data)

    def fdatasync(self, fd: int) -> None:
        here()
        disk, file, name = self._open[fd]
        _trouble(disk, "EIO")
        if file is not None and disk.syncs:
            file.synced = len(file.data)
        disk.on_sync(name)

    fsync = fdatasync

    def dup2(self, fd: int, over: int) -> int:
        self._open[over] = self._open[fd]
        return over

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)


def _trouble(disk: Disk, kind: str) -> None:
    if disk.failing == kind:
        number = getattr(errno, kind)
        raise OSError(number, os.strerror(number))
