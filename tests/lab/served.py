"""A file system of a lab's EFS, as its users see it and as the kernel below its NFS server does."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from emp.lab import places
from emp.lab.topology import VOL
from tests.lab.conftest import Pool
from tests.lab.pool import until
from tests.leaks import outliving


class Served:
    """A file system of a lab, as its users and as its NFS server see it."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.record = pool.json("volume", "create", "efs")
        self.id = str(self.record["id"])
        self.home = f"/efs/{self.id}"
        # Its own mounts are seen through process 1 of its place alone.
        root = Path(f"/proc/{places.init_of(pool.files, VOL.name).pid}/root/var/lib/emp/efs")
        self.data, self._run = root / "data" / self.id, root / "run"

    @property
    def address(self) -> str:
        return str(self.record["targets"][0]["address"])

    def pid(self) -> str | None:
        """Of its NFS server, in its place; None while there is none."""
        file = self._run / f"{self.record['targets'][0]['id']}.pid"
        pid = file.read_text().strip() if file.exists() else ""
        alive = pid and self.pool.run_in(VOL.name, "kill", "-0", pid, check=False).returncode == 0
        return pid if alive else None

    def kill(self) -> None:
        """Kill its NFS server, and return once the next one runs."""
        before = self.pid()
        assert before is not None
        with outliving(f"the lab {self.pool.name}"):
            self.pool.run_in(VOL.name, "kill", "-KILL", before)
            until(lambda: self.pid() not in (None, before), "the NFS server is started again")

    def holds(self, path: str) -> bool:
        """Whether it has a file that a guest sees at ``path``: else that lies in the guest's own memory."""
        return (self.data / path.rpartition("/")[2]).exists()

    def locked(self, name: str) -> bool:
        """Whether somebody has the lock on a file, as the kernel under the NFS server says."""
        with (self.data / name).open("rb+") as file:
            asked = struct.pack("hhlli", fcntl.F_WRLCK, os.SEEK_SET, 0, 8, 0)
            return bool(struct.unpack("hhlli", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)
