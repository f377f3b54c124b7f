"""``emp evm console``: the guest's serial console at this terminal, or between pipes.

Output is read in a thread of its own, so that a guest may write while our input waits for the end of a blackout. It
stays attached over migrations (the controller follows the EVM) and over restarts of the controller (we come back).
"""

from __future__ import annotations

import codecs
import json
import os
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from emp.client.events import FIRST_DELAY_S, LONGEST_DELAY_S, PATIENCE_S
from emp.model.errors import Conflict, EmpError, NotFound, OutcomeUnknown, Unavailable

if TYPE_CHECKING:
    from emp.cli.session import Session
    from emp.client import Client

DETACH = b"\x1d"
"""Ctrl-], as in telnet"""
STDIN, STDOUT = 0, 1


def attach(session: Session, name: str, *, for_s: float | None, as_json: bool) -> None:
    """Return when the user detaches, ``for_s`` seconds are over, or the EVM is stopped or deleted.

    Raises ``NotFound``, ``Conflict`` where there is no machine, ``Unavailable`` when the controller stays away.
    """
    until = None if for_s is None else time.monotonic() + for_s
    is_terminal = os.isatty(STDIN)
    with session.client() as reader, session.client() as typist:
        output = _Output(reader, name, as_json=as_json)
        with _raw(STDIN) if is_terminal else nullcontext():
            if is_terminal:
                _say(f"attached to {name}; Ctrl-] detaches")
            output.start()
            detached = _type(typist, name, output.over, until, is_terminal=is_terminal)
        if output.failure is not None:
            raise output.failure
        if detached:
            _say(f"detached from {name}")
        elif output.ended is not None:
            _say(output.ended)


def _type(client: Client, name: str, over: int, until: float | None, *, is_terminal: bool) -> bool:
    """Send what comes on stdin, until ``over`` can be read or the time is up; return whether the user detached."""
    sources = [over, STDIN]
    while until is None or until > time.monotonic():
        rest_s = None if until is None else max(0.0, until - time.monotonic())
        ready = select.select(sources, [], [], rest_s)[0]
        if over in ready:
            return False
        if STDIN not in ready:
            continue
        data = _read(STDIN)
        typed, escape, _ = data.partition(DETACH) if is_terminal else (data, b"", b"")
        if typed:
            _send(client, name, typed)
        if escape:
            return True
        if not data:
            if is_terminal:
                return True
            sources.remove(STDIN)
    return False


def _send(client: Client, name: str, data: bytes) -> None:
    try:
        client.evms.type(name, data)
    except (Unavailable, OutcomeUnknown) as error:
        _say(f"input was lost: {error.message}")


class _Output:
    """The reader of the console's output. ``over`` is a descriptor that becomes readable at its end."""

    def __init__(self, client: Client, name: str, *, as_json: bool) -> None:
        self._client = client
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace") if as_json else None
        self._pieces = client.evms.console(name)
        self.over, self._end = os.pipe()
        self.ended: str | None = None
        """why there is no more, once there is no more"""
        self.failure: Exception | None = None

    def start(self) -> None:
        # it may be waiting for a silent guest when we leave: then it ends with the process
        threading.Thread(target=self._run, name="console output", daemon=True).start()

    def _run(self) -> None:
        try:
            while True:
                loss: EmpError | None = None
                try:
                    for piece in self._pieces:
                        self._write(piece)
                except Unavailable as error:
                    loss = error
                self._open_again(loss)
        except (Conflict, NotFound) as error:
            self.ended = error.message
        except (EmpError, OSError) as error:
            self.failure = error
        finally:
            os.close(self._end)

    def _open_again(self, loss: EmpError | None) -> None:
        """Open the stream behind one that ended. The controller refuses that for an EVM that is stopped or gone."""
        deadline, delay_s = time.monotonic() + PATIENCE_S, FIRST_DELAY_S
        if loss is not None:
            _say(f"{loss.message}; trying again for {PATIENCE_S:.0f} s")
        while True:
            time.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
            try:
                self._pieces = self._client.evms.console(self._name)
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise
                if loss is None:
                    loss = error
                    _say(f"{error.message}; trying again for {PATIENCE_S:.0f} s")
            else:
                if loss is not None:
                    _say("attached again; the last output is repeated")
                return

    def _write(self, piece: bytes) -> None:
        if self._decoder is not None:
            piece = json.dumps({"output": self._decoder.decode(piece)}).encode() + b"\n"
        while piece:
            piece = piece[os.write(STDOUT, piece) :]


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # closed, or a terminal that has hung up: the same as its end
        return b""


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Let every key through to the guest."""
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _say(text: str) -> None:
    """Tell the user, on a line of its own also while the terminal is raw."""
    end = "\r\n" if sys.stderr.isatty() else "\n"
    print(f"[{text}]", end=end, file=sys.stderr, flush=True)
