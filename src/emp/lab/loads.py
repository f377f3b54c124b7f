"""What a client does to an EVM beside probing it: a fast stream one way, TCP in bulk, many TCP connections.

Runs inside the client's namespace, on the standard library alone, and speaks as the prober does (``ready``,
``mark NAME``, ``stop``, then a report as JSON)::

    python -m emp.lab.loads one-way 10.77.1.5 --rate 20000 --stream 7
    python -m emp.lab.loads bulk 10.77.1.5
    python -m emp.lab.loads connections 10.77.1.5 --number 1000

``mark`` ends a window. The guest's ends of these are in ``guest/streams.h``; the connections are to its echo.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import itertools
import json
import os
import resource
import secrets
import select
import socket
import struct
import sys
import termios
import time
from collections.abc import Sequence
from typing import Any, Protocol

from emp.lab.prober import CATCH_UP, ECHO_PORT, Commands

SINK_PORT = 7779
SOURCE_PORT = 7780
PATIENCE_S = 5.0
"""within which each open connection answers at a mark"""
DATAGRAM_BYTES = 64
ASK_NS = 10_000_000
"""between two questions, to one connection after the other"""
LOOK_MS = 1
_READ_BYTES = 1 << 18
_PERIOD_BYTES = 65521


def bulk_pattern() -> bytes:
    """Return what a bulk transfer repeats, as ``guest/streams.h`` has it."""
    state, made = 1, bytearray()
    for _ in range(_PERIOD_BYTES):
        state = (state * 1103515245 + 12345) & 0xFFFFFFFF
        made.append(state >> 16 & 0xFF)
    return bytes(made)


class Load(Protocol):
    stopping: bool

    def mark(self, name: str) -> None: ...
    def step(self) -> None:
        """Do what is due; return after some milliseconds at most."""

    def report(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class OneWay:
    """Numbered datagrams on an absolute schedule; the guest's ``sink`` says what has come of them."""

    def __init__(self, address: str, rate_hz: float, stream: int, *, port: int = SINK_PORT) -> None:
        self.stopping = False
        self._interval_ns = int(1e9 / rate_hz)
        self._stream = stream
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect((address, port))
        self._begun_ns = self._due_ns = time.monotonic_ns()
        self.sent = self._errors = self._worst_late_ns = self._left_out = 0

    def mark(self, name: str) -> None:
        """One stream is one window."""

    def step(self) -> None:
        now_ns = time.monotonic_ns()
        until_ns = now_ns + 5_000_000
        send, pack, padding = self._socket.send, struct.Struct("!QQ").pack, bytes(DATAGRAM_BYTES - 16)
        while now_ns < until_ns:
            while self._due_ns <= now_ns:
                self._worst_late_ns = max(self._worst_late_ns, now_ns - self._due_ns)
                if now_ns - self._due_ns > CATCH_UP * 20 * self._interval_ns:
                    missed = (now_ns - self._due_ns) // self._interval_ns
                    self._left_out += missed
                    self._due_ns += missed * self._interval_ns
                try:
                    send(pack(self._stream, self.sent) + padding)
                except OSError:
                    self._errors += 1
                self.sent += 1
                self._due_ns += self._interval_ns
            time.sleep(max(self._due_ns - time.monotonic_ns(), 0) / 1e9)
            now_ns = time.monotonic_ns()

    def report(self) -> dict[str, Any]:
        """``begun_at_s``: when number 0 was due, in Unix time. ``left_out``: sends that a stall of ours has cost;
        ``errors``: those that our own host refused."""
        took_s = (time.monotonic_ns() - self._begun_ns) / 1e9
        return {
            "begun_at_s": round(time.time() - took_s, 6),
            "sent": self.sent,
            "errors": self._errors,
            "left_out": self._left_out,
            "rate_hz": round(self.sent / took_s, 1),
            "worst_late_ms": round(self._worst_late_ns / 1e6, 3),
            "cpu_share": round(time.process_time() / took_s, 3),
        }

    def close(self) -> None:
        self._socket.close()


class Bulk:
    """One connection that the guest takes from and one that it gives to us, both as fast as they go.

    Progress is what the peer has acknowledged (sent, less TIOCOUTQ), and what has arrived here.
    """

    def __init__(self, address: str, *, ports: tuple[int, int] = (SINK_PORT, SOURCE_PORT)) -> None:
        self.stopping = False
        self._pattern = bulk_pattern() * 6
        self._up = socket.create_connection((address, ports[0]), timeout=PATIENCE_S)
        self._down = socket.create_connection((address, ports[1]), timeout=PATIENCE_S)
        for connection in (self._up, self._down):
            connection.setblocking(False)
        self._sent = self._acked = self._got = 0
        self._open = {self._up: "up", self._down: "down"}
        self._windows: list[dict[str, Any]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        self._begun_ns = time.monotonic_ns()
        self._last_ns = dict.fromkeys(("up", "down"), self._begun_ns)
        self._windows.append({"name": name, "resets": 0, "wrong": 0})
        for way in ("up", "down"):
            self._windows[-1][way] = {"bytes": 0, "stall_ms": 0.0, "seconds": 0.0}

    def step(self) -> None:
        writers = [self._up] if self._up in self._open else []
        readers = [self._down] if self._down in self._open else []
        readable, writable, _ = select.select(readers, writers, [], LOOK_MS / 1000)
        due = [(self._down, self._read)] if readable else []
        due += [(self._up, self._write)] if writable else []
        for connection, go_on in due:
            try:
                go_on()
            except BlockingIOError:
                continue
            except OSError:
                self._lost(connection)
        if self._up in self._open:
            queued = struct.unpack("i", fcntl.ioctl(self._up, termios.TIOCOUTQ, bytes(4)))[0]
            self._progress("up", self._sent - queued - self._acked)
            self._acked = self._sent - queued
        if not self._open:
            time.sleep(LOOK_MS / 1000)

    def _write(self) -> None:
        at = self._sent % _PERIOD_BYTES
        self._sent += self._up.send(memoryview(self._pattern)[at : at + _READ_BYTES])

    def _read(self) -> None:
        data = self._down.recv(_READ_BYTES)
        if not data:
            raise ConnectionResetError
        at = self._got % _PERIOD_BYTES
        self._windows[-1]["wrong"] += data != self._pattern[at : at + len(data)]
        self._got += len(data)
        self._progress("down", len(data))

    def _progress(self, way: str, more: int) -> None:
        now_ns, figures = time.monotonic_ns(), self._windows[-1][way]
        figures["stall_ms"] = max(figures["stall_ms"], round((now_ns - self._last_ns[way]) / 1e6, 3))
        figures["bytes"] += more
        figures["seconds"] = round((now_ns - self._begun_ns) / 1e9, 3)
        if more:
            self._last_ns[way] = now_ns

    def _lost(self, connection: socket.socket) -> None:
        del self._open[connection]
        self._windows[-1]["resets"] += 1

    def report(self) -> dict[str, Any]:
        return {"windows": self._windows}

    def close(self) -> None:
        self._up.close()
        self._down.close()


class Connections:
    """So many TCP connections to the guest's echo. One after the other is asked, ``ASK_NS`` apart; at a mark, each."""

    def __init__(self, address: str, number: int, *, port: int = ECHO_PORT) -> None:
        self.stopping = False
        self._epoll = select.epoll()
        self._open: dict[int, socket.socket] = {}
        self._asked_ns: dict[int, int] = {}
        self._text: dict[int, bytes] = {}
        for _ in range(number):
            connection = socket.create_connection((address, port), timeout=PATIENCE_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
            self._open[connection.fileno()] = connection
            self._epoll.register(connection.fileno(), select.EPOLLIN)
        self._turn = itertools.cycle(tuple(self._open))
        self._due_ns = time.monotonic_ns()
        self._nonce = secrets.token_hex(4).encode()
        self._windows: list[dict[str, Any]] = []
        self._begin("start")
        self._ask_all()

    def _begin(self, name: str) -> None:
        self._windows.append(
            {"name": name, "resets": 0, "asked": 0, "answered": 0, "wrong": 0, "unanswered": 0, "worst_ms": 0.0}
        )

    def mark(self, name: str) -> None:
        """Ask each connection and wait for the answers: they count in the window that ends here."""
        self._ask_all()
        self._begin(name)

    def _ask_all(self) -> None:
        for number in tuple(self._open):
            self._ask(number)
        end_ns = time.monotonic_ns() + int(PATIENCE_S * 1e9)
        while self._asked_ns and time.monotonic_ns() < end_ns:
            self._receive(LOOK_MS / 1000)
        self._windows[-1]["unanswered"] = len(self._asked_ns)

    def step(self) -> None:
        now_ns = time.monotonic_ns()
        if self._due_ns <= now_ns:
            self._due_ns = max(self._due_ns + ASK_NS, now_ns)
            self._ask(next(self._turn))
        self._receive(max(self._due_ns - time.monotonic_ns(), 0) / 1e9)

    def _ask(self, number: int) -> None:
        """Send one line, unless the answer to the one before is still due."""
        if number not in self._open or number in self._asked_ns:
            return
        now_ns = time.monotonic_ns()
        try:
            self._open[number].send(b"%s %d %d\n" % (self._nonce, number, now_ns))
        except OSError:
            self._lost(number)
            return
        self._windows[-1]["asked"] += 1
        self._asked_ns[number], self._text[number] = now_ns, b""

    def _receive(self, timeout_s: float) -> None:
        for number, _ in self._epoll.poll(timeout_s):
            try:
                data = self._open[number].recv(4096)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                self._lost(number)
                continue
            self._text[number] = self._text.get(number, b"") + data
            if self._text[number].endswith(b"\n"):
                self._answered(number)

    def _answered(self, number: int) -> None:
        window, asked_ns = self._windows[-1], self._asked_ns.pop(number, 0)
        expected = b"%s %d %d " % (self._nonce, number, asked_ns)
        window["answered"] += 1
        window["wrong"] += not self._text[number].startswith(expected)
        window["worst_ms"] = max(window["worst_ms"], round((time.monotonic_ns() - asked_ns) / 1e6, 3))
        self._text[number] = b""

    def _lost(self, number: int) -> None:
        self._epoll.unregister(number)
        self._open.pop(number).close()
        self._asked_ns.pop(number, None)
        self._windows[-1]["resets"] += 1

    def report(self) -> dict[str, Any]:
        return {"open": len(self._open), "windows": self._windows}

    def close(self) -> None:
        for connection in self._open.values():
            connection.close()
        self._epoll.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Load the guest until told to stop and print the report."""
    parser = argparse.ArgumentParser(prog="python -m emp.lab.loads", description="Load an EVM over UDP or TCP.")
    parser.add_argument("load", choices=["one-way", "bulk", "connections"])
    parser.add_argument("address")
    parser.add_argument("--rate", type=float, default=20_000, help="datagrams per second (20000)")
    parser.add_argument("--stream", type=int, default=1, help="number of the one-way stream, above 0 (1)")
    parser.add_argument("--number", type=int, default=1, help="connections (1)")
    options = parser.parse_args(argv)
    if not 1 <= options.rate <= 100_000 or options.stream < 1 or options.number < 1:
        parser.error("--rate: 1 to 100000 per second; --stream, --number: at least 1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, options.number + 64), hard), hard))
    load: Load
    try:
        if options.load == "one-way":
            with contextlib.suppress(PermissionError):  # short sends, before all that takes the processor for longer
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
            load = OneWay(options.address, options.rate, options.stream)
        elif options.load == "bulk":
            load = Bulk(options.address)
        else:
            load = Connections(options.address, options.number)
    except OSError as error:
        parser.error(f"cannot reach {options.address}: {error}")
    gc.freeze()
    gc.disable()  # a collection would look like a stall
    commands = Commands(load)
    print("ready", flush=True)
    while not load.stopping:
        load.step()
        commands.poll()
    print(json.dumps(load.report()))
    load.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
