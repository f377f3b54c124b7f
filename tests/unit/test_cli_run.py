"""Ways to run ``emp`` in tests: in this process, in one of its own, and at a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from emp.cli.root import run

POOL = "meadow"
EMP = [sys.executable, "-m", "emp.cli.main", "--context", POOL]

Emp = Callable[[str], tuple[int, str, str]]


def in_process(capsys: pytest.CaptureFixture[str]) -> Emp:
    """Return ``emp("evm list")``, which runs a command line here and gives its exit code, output and errors."""

    def call(line: str) -> tuple[int, str, str]:
        code = run(shlex.split(line))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def start_emp(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start ``emp --context meadow ARGUMENTS`` as a process of its own, its output in pipes."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
    return subprocess.Popen([*EMP, *arguments], text=True, env=os.environ | {"COLUMNS": "80"}, **pipes)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code and the rest of output and errors, once it has ended."""
    with process:  # not communicate(), which does not know what readline() has read ahead
        if process.stdin is not None:
            process.stdin.close()
        out = process.stdout.read() if process.stdout is not None else ""
        err = process.stderr.read() if process.stderr is not None else ""
    return process.returncode, out, err


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Return once something is so that another process brings about."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


class Terminal:
    """``emp`` at a terminal of 80 columns, and what it has shown."""

    def __init__(self, arguments: tuple[str, ...]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 80, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8"}
        environment = {name: value for name, value in environment.items() if name not in ("NO_COLOR", "COLUMNS")}
        self.modes_before = termios.tcgetattr(theirs)
        self._process = subprocess.Popen(
            [*EMP, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self._theirs = theirs
        self.raw = b""

    @property
    def text(self) -> str:
        """Everything shown, without colours and movements."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.raw.decode(errors="replace")).replace("\r", "\n")

    def type(self, data: bytes) -> None:
        os.write(self._ours, data)

    def modes(self) -> list[object]:
        """How the terminal treats keys and output."""
        return termios.tcgetattr(self._theirs)

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + 30
        while words not in self.text:
            assert time.monotonic() < deadline and self._read(deadline), f"never shown: {words}\n{self.text}"

    def end(self) -> int:
        """Return the exit code, once the terminal has shown everything."""
        deadline = time.monotonic() + 30
        while self._process.poll() is None:  # it may wait until what it shows is read
            assert time.monotonic() < deadline, f"it does not end:\n{self.text}"
            self._read(time.monotonic() + 0.02)
        while self._read(time.monotonic()):
            pass
        return int(self._process.returncode)

    def _read(self, deadline: float) -> bool:
        """Read on; return whether there was something."""
        if not select.select([self._ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        self.raw += os.read(self._ours, 65536)
        return True

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@contextlib.contextmanager
def at_terminal(*arguments: str) -> Iterator[Terminal]:
    """Start ``emp --context meadow ARGUMENTS`` at a terminal of its own."""
    terminal = Terminal(arguments)
    try:
        yield terminal
    finally:
        terminal.close()
