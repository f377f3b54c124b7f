"""Who gets the processor first, for benches on a machine that is shared: what others do there is then not measured."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_GROUP = "emp-bench"
_SHARES = ((Path("/sys/fs/cgroup/cpu"), "cpu.shares", 262_144), (Path("/sys/fs/cgroup"), "cpu.weight", 10_000))
"""where control groups of version 1 and 2 are, and the largest share that one can have (cgroups(7))"""


def before_others() -> bool:
    """Run this process, and all that it starts, before everything else on the machine (SCHED_RR, sched(7)).

    For processes that leave the processors idle most of the time. Where they do not, one that wakes up waits for up to
    100 ms until another has had its turn, and all of them stand still for 50 ms of each second. Return whether it was
    allowed.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        return False
    return True


@contextlib.contextmanager
def larger_share() -> Iterator[bool]:
    """Give this process, and all that it starts, nearly all of the processors, shared among them as ever.

    For processes that fill the processors: one that wakes up may still wait some milliseconds for somebody else's. Give
    whether it was allowed.
    """
    for base, name, most in _SHARES:
        if not (base / "cgroup.procs").exists():
            continue
        was_in, group = base / _group_of(os.getpid(), base), base / _GROUP
        try:
            group.mkdir(exist_ok=True)
            _write(group / name, most)
            _write(group / "cgroup.procs", os.getpid())
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield True
        finally:
            _write(was_in / "cgroup.procs", os.getpid())
            with contextlib.suppress(OSError):  # something that was started is still in it
                group.rmdir()
        return
    yield False


def _group_of(pid: int, base: Path) -> str:
    """Return where below ``base`` a process is (cgroups(7), /proc/PID/cgroup: number:controllers:path)."""
    parts = (line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    places = {controller: path for _, controllers, path in parts for controller in controllers.split(",")}
    return places["cpu" if base.name == "cpu" else ""].lstrip("/")


def _write(setting: Path, value: int) -> None:
    """Write to a file that is there: elsewhere than in a control group file system it would be made."""
    with setting.open("r+") as opened:
        opened.write(str(value))
