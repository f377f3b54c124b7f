"""Which processes belong to a lab, read from /proc each time: no record of pids can be stale or lost."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from emp.host.processes import Process, find
from emp.model.errors import HostError


@dataclass(frozen=True)
class Running:
    """A live process: its command line, and its namespaces by inode number."""

    process: Process
    parent: int
    argv: tuple[str, ...]
    pid_namespace: int
    network_namespace: int

    @property
    def pid(self) -> int:
        return self.process.pid


def namespace_inode(path: str | Path) -> int | None:
    """Return the inode that names a namespace; None when there is no such file."""
    try:
        return Path(path).stat().st_ino
    except OSError:
        return None


def running(wanted: Callable[[str], bool] | None = None) -> Iterator[Running]:
    """Yield every live process with a command line; ``wanted`` chooses by ``/proc/PID`` before the costly part."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or (wanted and not wanted(entry.path)):
            continue
        try:
            command = Path(entry.path, "cmdline").read_bytes()
            parent = int(Path(entry.path, "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        process = find(int(entry.name))
        pid_namespace = namespace_inode(f"{entry.path}/ns/pid")
        network_namespace = namespace_inode(f"{entry.path}/ns/net")
        if process is None or pid_namespace is None or network_namespace is None or not command:
            continue
        argv = tuple(os.fsdecode(word) for word in command.rstrip(b"\0").split(b"\0"))
        yield Running(process, parent, argv, pid_namespace, network_namespace)


def in_pid_namespace(inode: int) -> list[Running]:
    """Return the processes of one PID namespace."""
    return list(running(lambda path: namespace_inode(f"{path}/ns/pid") == inode))


def in_network_namespaces(inodes: Iterable[int]) -> list[Running]:
    """Return the processes in any of these network namespaces, but not the caller."""
    wanted = frozenset(inodes)
    own = str(os.getpid())
    return list(
        running(lambda path: not path.endswith(f"/{own}") and namespace_inode(f"{path}/ns/net") in wanted)
        if wanted
        else ()
    )


def listens(pid: int, port: int) -> bool:
    """Whether anybody listens on a TCP port in the network namespace of ``pid`` (IPv4; proc(5), state 0A is LISTEN)."""
    try:
        rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    except OSError:
        return False
    return any(row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A" for row in rows)


def children(pid: int) -> list[Process]:
    """Return the live children of a process."""
    return [found.process for found in running() if found.parent == pid]


def frozen(process: Process) -> bool:
    """Whether a process is stopped by a signal (SIGSTOP)."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def kill(processes: Iterable[Process], *, timeout_s: float = 10.0) -> None:
    """SIGKILL and wait until all have ended; raise ``HostError`` if one has not in time."""
    dying = [process for process in processes if process.send(signal.SIGKILL)]
    deadline = time.monotonic() + timeout_s
    for process in dying:
        wait_ended(process, deadline - time.monotonic())


def wait_ended(process: Process, timeout_s: float) -> None:
    """Wait for the end of a process, which need not be a child; raise ``HostError`` if it does not come in time."""
    try:
        descriptor = process.pidfd()
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        if not poll.poll(max(0.0, timeout_s) * 1000):
            raise HostError(f"process {process.pid} does not end", hint="it may hang in the kernel")
    finally:
        os.close(descriptor)
