"""What a machine has on this node while it lives: one directory per EVM, ``evm/NAME`` in the agent's run directory.

::

    NAME/            root:GID 0710   GID is the machine's own; it may pass, not list or write
      machine.json   root      0600   who this is: uuid, uid, pid and start time
      control        root      0600   QMP, the agent's
      cancel         root      0600   QMP, the agent's way to ``yank`` when ``control`` is stuck
      guard          root      0600   QMP, for a guard that outlives the agent
      console        root      0600   the guest's first serial port, its console
      qga            root      0600   its second one, on which an agent in the guest answers
      config         root:GID  0440   what the guest reads through fw_cfg
      tls/           root:GID  0710   copies of the node's certificate and key for this QEMU
      log            root      0600   QEMU's standard output and error, and its guard's
      guard.json     root      0600   the guard process of the latest migration: pid and start time

QEMU gets the sockets, the log and this directory as open descriptors. It can therefore write nothing here, whatever
happens to it, and no directory above needs to be open to its uid.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from emp.host.processes import Process, find
from emp.model.errors import BadInput, HypervisorError
from emp.wire import dh

MACHINES = "evm"
"""Nothing else may lie in there: what belongs to no living machine is removed."""
LAUNCH_VARIABLE = "EMP_LAUNCH"
"""Environment variable of a machine's process: tells this launch from every other one, also from a twin with the same
uuid, uid and paths in another mount namespace of the same host."""
MONITORS = ("control", "cancel", "guard")
SOCKETS = (*MONITORS, "console", "qga")
TLS_FILES = ("ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem")
_SOCKET_PATH_LIMIT_BYTES = 107
_LOG_TAIL_BYTES = 2000
_RECORD = "machine.json"
_GUARD = "guard.json"


@dataclass(frozen=True)
class Record:
    """``machine.json``. ``pid`` and ``start_ticks`` are 0 from before the process is started until it is known."""

    name: str
    uuid: str
    uid: int
    directory_fd: int
    """the number under which the machine itself has this directory open"""
    tap_fds: tuple[int, ...]
    """the machine's own numbers of its taps, one per NIC"""
    launch: str = field(default_factory=lambda: secrets.token_hex(16))
    pid: int = 0
    start_ticks: int = 0

    def with_process(self, process: Process) -> Record:
        return replace(self, pid=process.pid, start_ticks=process.start_ticks)

    def process(self) -> Process | None:
        """Return the machine's process if it is alive, also when the agent died before it could write down the pid."""
        if self.pid:
            process = Process(self.pid, self.start_ticks)
            return process if process.alive else None
        wanted = f"{LAUNCH_VARIABLE}={self.launch}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        return find(int(entry.name))
        return None


class RunDirectory:
    """One machine's directory. Making one for a name replaces what a dead machine left."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def log(self) -> Path:
        return self.path / "log"

    def socket_path(self, name: str) -> Path:
        return self.path / name

    @classmethod
    def of(cls, root: Path, name: str) -> RunDirectory:
        path = root / name
        if len(os.fsencode(path / "console")) > _SOCKET_PATH_LIMIT_BYTES:
            raise BadInput(
                f"{path} is too long for a socket's path",
                field="run_dir",
                hint=f"run directory and EVM name may have {_SOCKET_PATH_LIMIT_BYTES - 9} bytes together",
            )
        return cls(path)

    @classmethod
    def all(cls, root: Path) -> list[RunDirectory]:
        """Every directory that has a machine's name, complete or not."""
        try:
            return [cls(entry) for entry in sorted(root.iterdir()) if entry.is_dir() and not entry.is_symlink()]
        except FileNotFoundError:
            return []

    def make(self, uid: int) -> None:
        """Make the empty directory for a machine that will run as ``uid``."""
        self.remove()
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700)
        os.chown(self.path, 0, uid)
        self.path.chmod(0o710)

    def make_log(self) -> None:
        os.close(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def write_config(self, text: str, uid: int) -> None:
        _write(self.path / "config", text.encode(), uid, 0o440)

    def copy_credentials(self, source: Path, uid: int) -> None:
        """Give the machine its own copy of the node's QEMU credentials (``tls-creds-x509`` layout), replacing older.

        Raises ``HypervisorError`` naming the file that is missing.
        """
        target = self.path / "tls"
        if not target.is_dir():
            target.mkdir(mode=0o700)
            os.chown(target, 0, uid)
            target.chmod(0o710)
        for name in TLS_FILES:
            try:
                content = (source / name).read_bytes()
            except OSError as error:
                raise HypervisorError(
                    f"cannot read {source / name}: {error.strerror}",
                    hint="the node's credentials must be there before a machine is started",
                ) from error
            _write(target / name, content, uid, 0o440)
        _write(target / dh.FILE, dh.FFDHE2048, uid, 0o440)

    def listen(self) -> dict[str, socket.socket]:
        """Return listening sockets for ``SOCKETS``: clients may connect at once, QEMU accepts when it is ready."""
        made: dict[str, socket.socket] = {}
        try:
            for name in SOCKETS:
                made[name] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
                made[name].bind(os.fsencode(self.socket_path(name)))
                self.socket_path(name).chmod(0o600)
                made[name].listen(4)
        except OSError:
            for one in made.values():
                one.close()
            raise
        return made

    def open(self) -> int:
        """Return a descriptor of the directory, for the machine to find its files by."""
        return os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def write_record(self, record: Record) -> None:
        _write(self.path / _RECORD, json.dumps(asdict(record)).encode(), None, 0o600)

    def record(self) -> Record | None:
        """Return the record; None when there is none that can be read."""
        try:
            fields = json.loads((self.path / _RECORD).read_bytes())
            return Record(**(fields | {"tap_fds": tuple(fields["tap_fds"])}))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write_guard(self, process: Process) -> None:
        _write(self.path / _GUARD, json.dumps(asdict(process)).encode(), None, 0o600)

    def guard_process(self) -> Process | None:
        """Return the last guard's process, which may have ended."""
        try:
            return Process(**json.loads((self.path / _GUARD).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def log_tail(self) -> str:
        """Return the end of QEMU's log, on one line."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                return " / ".join(file.read().decode(errors="replace").strip().splitlines())
        except OSError:
            return ""

    def remove_launch(self, launch: str) -> None:
        """Remove everything if it is still of that launch, and not of a later machine of the same name."""
        record = self.record()
        if record is not None and record.launch == launch:
            self.remove()

    def remove(self) -> None:
        """Remove everything. Idempotent."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path)


def free_uid(root: Path, base: int, count: int) -> int:
    """Return a uid from ``base`` on that no machine of this node has, nor any process of this host.

    Raises ``HypervisorError`` when ``count`` of them are taken.
    """
    taken = {record.uid for directory in RunDirectory.all(root) if (record := directory.record())}
    taken |= set(_uids_of_processes())
    for uid in range(base, base + count):
        if uid not in taken:
            return uid
    raise HypervisorError(
        f"all {count} user ids from {base} on are taken", hint="give the agent another range, or stop some EVMs"
    )


def _uids_of_processes() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield entry.stat().st_uid


def _write(path: Path, content: bytes, gid: int | None, mode: int) -> None:
    """Replace a file as a whole; it never exists with a wider mode or another owner."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, stat.S_IRUSR)
    with os.fdopen(descriptor, "wb") as file:
        if gid is not None:
            os.fchown(descriptor, 0, gid)
        os.fchmod(descriptor, mode)
        file.write(content)
    scratch.replace(path)
