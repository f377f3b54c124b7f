"""Processes that are found again by their pid file, and never mistaken for another one: its path is an argument."""

from __future__ import annotations

from pathlib import Path

from emp.host.processes import Process, find


def arguments(process: Process) -> list[str]:
    """Return the command line of a process; nothing if it has ended."""
    try:
        line = Path(f"/proc/{process.pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return line.split("\0")[:-1]


def running(pid_file: Path, *, mark: Path | None = None) -> Process | None:
    """Return the process whose pid is in ``pid_file``, if it still runs.

    ``mark``: what it has among its arguments, if not the pid file itself.
    """
    try:
        process = find(int(pid_file.read_text()))
    except (FileNotFoundError, ValueError):
        return None
    return process if process and str(mark or pid_file) in arguments(process) else None
