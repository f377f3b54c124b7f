"""No double run: the scheduler's account of every vCPU thread of one EVM, on all nodes, side by side.

Once a second QEMU of the EVM executes, the first may never execute again; a guest that comes back by a rescue is the
first one again without the second ever having executed. ``/proc/PID/task/TID/schedstat`` (proc(5)) counts nanoseconds
on a processor. A paused vCPU is called up now and then for a fraction of a millisecond (to read its registers, or to be
made in the first place), so a stretch counts as executing only when the thread worked in most of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from emp.lab import daemons, places, scan
from emp.lab.checkers.witness import Witness
from emp.lab.state import LabFiles

TICK_S = 0.02
BUSY_NS = 1_000_000
"""in one tick; the guests of the tests do something all the time"""
STRETCH = 4
"""ticks in a row of which three have to be busy"""
_YOUNG_S = 2.0
"""a process may still become a QEMU for so long after it was first seen"""


@dataclass(frozen=True)
class Execution:
    """One QEMU executed its guest, from its first to its last busy stretch (CLOCK_MONOTONIC)."""

    node: str
    pid: int
    first_s: float
    last_s: float


@dataclass
class _Qemu:
    node: str
    pid: int
    threads: list[Path] = field(default_factory=list)
    spent_ns: int = 0
    ticks: list[tuple[float, int]] = field(default_factory=list)

    def look(self, now_s: float) -> None:
        """Note how long its vCPUs were on a processor since the last look. Raises ``OSError`` once it is gone."""
        if not self.threads:
            tasks = Path(f"/proc/{self.pid}/task").iterdir()
            self.threads = [task / "schedstat" for task in tasks if (task / "comm").read_text().startswith("CPU ")]
            self.spent_ns = self._spent()
        spent_ns = self._spent()
        self.ticks.append((now_s, spent_ns - self.spent_ns))
        self.spent_ns = spent_ns

    def _spent(self) -> int:
        return sum(int(thread.read_text().split()[0]) for thread in self.threads)


class VcpuWitness(Witness):
    """``with VcpuWitness(files, "web") as witness: ...``; then ``witness.violations()``."""

    def __init__(self, files: LabFiles, evm: str) -> None:
        super().__init__(f"vcpus of {evm}")
        self._evm = evm
        self._topology = files.load().topology
        self._node_of: dict[int | None, str] = {}
        self._qemus: dict[int, _Qemu] = {}
        self._gone: list[_Qemu] = []
        self._seen: dict[int, float] = {}
        self.ended: list[tuple[float, str]] = []
        """(moment, node) at which a QEMU of the EVM was found gone"""

    def executions(self) -> list[Execution]:
        """Return what has executed so far, in order of the beginning."""
        found = [execution for qemu in (*self._gone, *tuple(self._qemus.values())) for execution in _execution(qemu)]
        return sorted(found, key=lambda execution: execution.first_s)

    def violations(self) -> list[str]:
        """Return each pair of QEMUs of which one executed after the other had begun."""
        found = self.executions()
        return [
            f"{one.node}'s QEMU executed until {one.last_s - other.first_s:.3f} s after {other.node}'s had begun"
            for at, one in enumerate(found)
            for other in found[at + 1 :]
            if one.last_s > other.first_s + TICK_S
        ]

    def watch(self) -> None:
        next_s = time.monotonic()
        while not self._stop.is_set():
            self._find(next_s)
            for pid, qemu in list(self._qemus.items()):
                try:
                    qemu.look(time.monotonic())
                except OSError:
                    self.ended.append((time.monotonic(), qemu.node))
                    self._gone.append(self._qemus.pop(pid))
            next_s = max(next_s + TICK_S, time.monotonic())
            self._stop.wait(next_s - time.monotonic())

    def _find(self, now_s: float) -> None:
        """Look for new QEMUs among the processes that are new, or young enough to become one."""
        pids = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
        for pid in self._seen.keys() - pids:
            del self._seen[pid]
        for pid in pids - self._qemus.keys():
            if now_s - self._seen.setdefault(pid, now_s) > _YOUNG_S:
                continue
            with contextlib.suppress(OSError):
                argv = tuple(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0"))
                if argv[0] and daemons.evm_of(argv) == self._evm and (node := self._node(pid)):
                    self._qemus[pid] = _Qemu(node, pid)

    def _node(self, pid: int) -> str | None:
        """Return the node of this lab in which a process is; a node that is switched on again is another namespace."""
        inode = scan.namespace_inode(f"/proc/{pid}/ns/net")
        if inode not in self._node_of:
            names = {
                node.name: places.NAMESPACES / self._topology.namespace(node.name)
                for node in self._topology.node_places
            }
            self._node_of = {scan.namespace_inode(path): name for name, path in names.items()}
        return self._node_of.get(inode)


def _execution(qemu: _Qemu) -> Iterator[Execution]:
    busy = tuple(_executing(tuple(qemu.ticks)))
    if busy:
        yield Execution(qemu.node, qemu.pid, busy[0], busy[-1])


def _executing(ticks: tuple[tuple[float, int], ...]) -> Iterator[float]:
    """Yield when the busy ticks were, of the stretches in which three of four ticks are busy."""
    counted: set[int] = set()
    for first in range(len(ticks) - STRETCH + 1):
        stretch = [at for at in range(first, first + STRETCH) if ticks[at][1] >= BUSY_NS]
        if len(stretch) >= STRETCH - 1:
            counted.update(stretch)
    for at in sorted(counted):
        yield ticks[at][0]
