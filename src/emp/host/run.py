"""Run an external command: an argument list, never a shell, always with a deadline."""

from __future__ import annotations

import asyncio
import shlex
import subprocess
from collections.abc import Sequence

from emp.model.errors import CommandFailed, HostError, MissingDependency

_STDERR_CHARS = 2000


def command_failed(argv: Sequence[str], returncode: int | None, stderr: str) -> CommandFailed:
    """Make the one error for whatever the node's system refused; ``returncode`` None = it did not end in time."""
    said = stderr.strip()[-_STDERR_CHARS:]
    what = "did not end in time" if returncode is None else f"failed with code {returncode}"
    return CommandFailed(
        f"`{shlex.join(argv)}` {what}: {said or 'it said nothing'}",
        argv=list(argv),
        returncode=returncode,
        stderr=said,
    )


def _missing(argv: Sequence[str], error: OSError) -> HostError:
    return MissingDependency(f"cannot run {argv[0]}: {error.strerror}", hint=f"install the package with {argv[0]}")


async def run(*argv: str, stdin: str | None = None, timeout_s: float = 30.0) -> str:
    """Run a command and return its standard output.

    Raises ``CommandFailed`` on a non-zero exit or after ``timeout_s``, ``MissingDependency`` without such a command.
    The process is killed and reaped when the caller is cancelled.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise _missing(argv, error) from error
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(None if stdin is None else stdin.encode())
    except TimeoutError:
        raise command_failed(argv, None, f"killed after {timeout_s} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise command_failed(argv, process.returncode, err.decode(errors="replace"))
    return out.decode(errors="replace")


def run_sync(*argv: str, stdin: str | None = None, timeout_s: float = 30.0) -> str:
    """``run`` for places without an event loop; the same errors."""
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise command_failed(argv, None, f"killed after {timeout_s} s") from None
    except OSError as error:
        raise _missing(argv, error) from error
    if done.returncode:
        raise command_failed(argv, done.returncode, done.stderr)
    return done.stdout
