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
        group = base / _GROUP
        try:
            group.mkdir(exist_ok=True)
            (group / name).write_text(str(most))
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield True
        finally:
            (base / "cgroup.procs").write_text(str(os.getpid()))
            with contextlib.suppress(OSError):  # something that was started is still in it
                group.rmdir()
        return
    yield False
