"""``emp evm console`` as a person has it: at a terminal, and still attached when the EVM is on another node."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab.conftest import EMP, Pool
from tests.lab.pool import WAIT_S, subject

DETACH = b"\x1d"


class Terminal:
    """A terminal with ``emp evm console NAME`` at it."""

    def __init__(self, process: subprocess.Popen[bytes], keyboard: int) -> None:
        self.process = process
        self._keyboard = keyboard
        self.shown = b""

    def type(self, keys: bytes) -> None:
        os.write(self._keyboard, keys)

    def read_until(self, pattern: bytes) -> re.Match[bytes]:
        """Return the first match in what is shown from now on, or has been shown and not looked at."""
        deadline = time.monotonic() + WAIT_S
        while not (found := re.search(pattern, self.shown)):
            if not select.select([self._keyboard], [], [], max(0.0, deadline - time.monotonic()))[0]:
                pytest.fail(f"the terminal does not show {pattern!r}: {self.shown[-500:]!r}")
            try:
                self.shown += os.read(self._keyboard, 4096)
            except OSError:  # the other end of the terminal is closed
                pytest.fail(f"the console ended without {pattern!r}: {self.shown[-500:]!r}")
        self.shown = self.shown[found.end() :]
        return found


@contextmanager
def console(pool: Pool, name: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*EMP, "--context", pool.name, "evm", "console", name], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_the_console_stays_attached_over_a_migration(pool: Pool) -> None:
    with subject(pool, node="n1") as evm, console(pool, evm.name) as terminal:
        prompt = re.escape(f"{evm.name}:".encode()) + rb"\S*# "
        terminal.read_until(rb"attached to")
        terminal.type(b"\n")
        terminal.read_until(prompt)
        terminal.type(b"here=first; echo on-$here\n")
        terminal.read_until(rb"\non-first\r?\n")
        evm.migrate("n2")
        terminal.type(b"echo still-$here\n")
        terminal.read_until(rb"\nstill-first\r?\n")
        evm.migrate("n3")
        terminal.type(b"echo again-$here\n")
        terminal.read_until(rb"\nagain-first\r?\n")
        assert terminal.process.poll() is None
        terminal.type(DETACH)
        terminal.read_until(rb"detached from")
        assert terminal.process.wait(WAIT_S) == 0


def test_the_console_ends_with_the_evm(pool: Pool) -> None:
    with subject(pool, node="n1") as evm, console(pool, evm.name) as terminal:
        terminal.read_until(rb"attached to")
        evm.client.evms.stop(evm.name, grace_s=0)
        terminal.read_until(rb"stopped")
        assert terminal.process.wait(WAIT_S) == 0
