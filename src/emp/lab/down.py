"""Clears a lab, whatever state it is in: half made, half cleared, its daemons killed or frozen."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emp.client.context import remove_context
from emp.lab import places, scan
from emp.lab.state import LabFiles, LabState
from emp.model.errors import HostError, NotFound

CLEAR_S = 20.0


def down(files: LabFiles) -> bool:
    """Remove every trace of a lab; returns False if there was nothing. Raises ``HostError`` if something resists."""
    try:
        with files.locked():
            clear(files)
    except NotFound:
        return False
    return True


def clear(files: LabFiles) -> None:
    """``down`` for a caller who holds the lab's lock. Once begun, neither Ctrl-C nor SIGTERM stops it."""
    with uninterrupted():
        try:
            state = files.load()
        except NotFound:
            pass  # killed before anything else was made
        else:
            _kill(files, state)
            places.unwire(state.topology)
            remove_context(Path(state.context), made=[Path(path) for path in state.made])
        files.empty()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let neither Ctrl-C nor SIGTERM nor a lost terminal stop the block; they are forgotten."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals never come here
        return
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(files: LabFiles, state: LabState) -> None:
    """Kill process 1 of each place, and with it everything in it; then whoever else is in the lab's networks."""
    scan.kill(places.inits(files).values())
    inodes = [scan.namespace_inode(places.NAMESPACES / name) for name in state.topology.namespaces]
    deadline = time.monotonic() + CLEAR_S
    while left := scan.in_network_namespaces(inode for inode in inodes if inode is not None):
        if time.monotonic() > deadline:
            raise HostError(f"process {left[0].pid} ({left[0].argv[0]}) of the lab {files.name} does not end")
        scan.kill(found.process for found in left)
