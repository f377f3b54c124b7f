"""Processes that outlive us: named by pid and start time, signalled and watched through a pidfd.

A pid alone is no name, because the kernel gives it out again. Pid and start time (field 22 of ``/proc/PID/stat``, in
clock ticks since boot) are one, until the machine reboots.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emp.host.run import command_failed
from emp.model.errors import MissingDependency

_SYS_PIDFD_GETFD = 438  # the same number on every architecture
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Process:
    """One process on this machine, now or in the past."""

    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        """True while it can still execute; a zombie cannot."""
        state, ticks = _stat(self.pid)
        return ticks == self.start_ticks and state not in "ZX"

    def pidfd(self) -> int:
        """Open a descriptor that stands for this process and for no later one; raise ``ProcessLookupError``."""
        descriptor = os.pidfd_open(self.pid)
        # Only now is the pid pinned: what was looked up before may have been another process.
        if _stat(self.pid)[1] != self.start_ticks:
            os.close(descriptor)
            raise ProcessLookupError(f"process {self.pid} has ended")
        return descriptor

    def send(self, signum: signal.Signals) -> bool:
        """Send a signal; return False if the process has ended."""
        try:
            descriptor = self.pidfd()
        except ProcessLookupError:
            return False
        try:
            signal.pidfd_send_signal(descriptor, signum)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    async def ended(self) -> None:
        """Wait until it has ended, and reap it if it is our child. No polling: a pidfd becomes readable."""
        try:
            descriptor = self.pidfd()
        except ProcessLookupError:
            return
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        loop.add_reader(descriptor, over.set)
        try:
            await over.wait()
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - does not wait
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)

    async def stop(self, *, grace_s: float) -> None:
        """Terminate it, kill it after ``grace_s``, and return when it has ended; 0 kills at once."""
        if grace_s > 0 and self.send(signal.SIGTERM):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.ended()
        self.send(signal.SIGKILL)
        await self.ended()


def _stat(pid: int) -> tuple[str, int]:
    """Return state letter and start time; ("X", -1) if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "X", -1
    state, *fields = stat.rpartition(")")[2].split()  # the command's name before it may hold spaces and parentheses
    return state, int(fields[18])


def find(pid: int) -> Process | None:
    """Return the process that has this pid now; None if there is none, or only a zombie."""
    state, ticks = _stat(pid)
    return None if state in "ZX" else Process(pid, ticks)


def spawn(
    argv: Sequence[str],
    *,
    log: Path,
    pass_fds: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    stdout: int | None = None,
) -> Process:
    """Start a program that outlives us: a session of its own, standard output and error appended to ``log``.

    ``stdin``, ``stdout``: descriptors that it gets instead of nothing and the log. Raises ``MissingDependency`` if
    there is no such program. Whether it gets anywhere is for the caller to find out.
    """
    with log.open("ab") as output:
        try:
            child = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=output if stdout is None else stdout,
                stderr=output,
                start_new_session=True,
                pass_fds=pass_fds,
                env=env,
            )
        except OSError as error:
            raise MissingDependency(f"cannot run {argv[0]}: {error.strerror}", hint="install its package") from error
    child.returncode = 0  # whoever watches the pidfd reaps it; Popen need not warn that it still runs
    return Process(child.pid, _stat(child.pid)[1])


def take_descriptor(process: Process, descriptor: int) -> int:
    """Return our own copy of another process's descriptor (``pidfd_getfd``; needs ptrace rights on it).

    Raises ``CommandFailed``, or ``ProcessLookupError`` if the process has ended.
    """
    pidfd = process.pidfd()
    try:
        copy = int(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, descriptor, 0))
        if copy < 0:
            code = ctypes.get_errno()
            raise command_failed(["pidfd_getfd", str(process.pid), str(descriptor)], code, os.strerror(code))
    finally:
        os.close(pidfd)
    return copy  # close-on-exec, as the kernel makes it
