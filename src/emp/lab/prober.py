"""The client-side checker: a numbered UDP stream and one TCP connection to each target, and what became of them.

Runs inside the client's namespace, on the standard library alone::

    python -m emp.lab.prober web=10.77.1.5 web-0=10.77.1.6 --report FILE --snapshot FILE

On standard output it says ``ready`` once everything is open. On standard input it takes ``mark NAME`` (as does
SIGUSR1, with a name of its own) and answers ``marked NAME``: from then on the figures are those of a new window.
``stop``, SIGTERM, SIGINT or the end of ``--duration`` end it; replies on their way are waited for.

Requests leave on an absolute schedule. The kernel stamps the datagrams that arrive, so the prober wakes up only to
send, and what it is late in reading is not the network's delay; by how much a send was late, ``prober_stall_ms`` says.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import ipaddress
import json
import os
import secrets
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from emp.lab.prober_stats import Stream

ECHO_PORT = 7777
TCP_INTERVAL_NS = 10_000_000
RECONNECT_NS = 1_000_000_000
CATCH_UP = 50
"""So many missed sends are made up for after a stall of the prober; what is beyond that is left out of the schedule."""

Receiver = Callable[[int, int], None]
"""Takes the present time and the offset from our clock to Unix time, in ns."""

_TIMESTAMP = struct.Struct("qq")
_TIMESTAMP_SPACE = socket.CMSG_SPACE(_TIMESTAMP.size)
_SO_TIMESTAMPNS = 35  # asm-generic/socket.h


class Poller:
    """Calls ``receive`` of the probes whose sockets have something."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._receivers: dict[int, Receiver] = {}

    def add(self, fileno: int, receiver: Receiver) -> None:
        """Watch a socket from now on; closing it ends that."""
        self._receivers[fileno] = receiver
        self._epoll.register(fileno, select.EPOLLIN)

    def receive(self) -> int:
        """Receive until there is nothing more; return the time of the look."""
        now_ns = time.monotonic_ns()
        offset_ns = time.time_ns() - now_ns
        while ready := self._epoll.poll(0):
            for fileno, _ in ready:
                self._receivers[fileno](now_ns, offset_ns)
        return now_ns

    def close(self) -> None:
        self._epoll.close()


class UdpProbe:
    """The UDP stream to one target."""

    def __init__(self, poller: Poller, address: tuple[str, int], interval_ns: int, now_ns: int, grace_ns: int) -> None:
        self.stream = Stream(interval_ns, now_ns, grace_ns=grace_ns)
        self._socket = socket.socket(_family(address[0]), socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.setblocking(False)
        try:
            self._socket.connect(address)
        except OSError:
            self._socket.close()
            raise
        self._nonce = secrets.token_hex(4).encode()
        poller.add(self._socket.fileno(), self.receive)

    def send(self, now_ns: int, due_ns: int) -> None:
        seq = self.stream.sent(now_ns, due_ns)
        try:
            self._socket.send(b"%s %d %d" % (self._nonce, seq, now_ns))
        except OSError:
            self.stream.error()

    def receive(self, now_ns: int, clock_offset_ns: int) -> None:
        """Count one datagram. ``clock_offset_ns``: Unix time, which the kernel stamps, less our clock."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(2048, _TIMESTAMP_SPACE)
        except BlockingIOError:
            return
        except OSError:  # an ICMP error about an earlier request
            self.stream.error()
            return
        seconds, nanoseconds = _TIMESTAMP.unpack(ancillary[0][2])
        at_ns = seconds * 1_000_000_000 + nanoseconds - clock_offset_ns
        try:
            nonce, seq, sent_ns, counter, boot_id = data.split()
            if nonce != self._nonce:
                raise ValueError
            self.stream.received(int(seq), int(sent_ns), at_ns, int(counter), boot_id.decode())
        except ValueError:
            self.stream.mismatched()

    def close(self) -> None:
        self._socket.close()


class TcpProbe:
    """One TCP connection to one target, a line every 10 ms. A connection that ends is counted, then made again."""

    def __init__(self, poller: Poller, address: tuple[str, int], now_ns: int, grace_ns: int) -> None:
        self.stream = Stream(TCP_INTERVAL_NS, now_ns, grace_ns=grace_ns)
        self.connects = self.resets = 0
        self.last_error: str | None = None
        self._poller = poller
        self._address = address
        self._retry_ns = 0
        self._nonce = secrets.token_hex(4).encode()
        self._waiting: deque[tuple[int, int, bytes]] = deque()
        self._out = self._in = b""
        self._socket: socket.socket | None = None
        self._connected = False
        self._connect()

    def _connect(self) -> None:
        self._socket = socket.socket(_family(self._address[0]), socket.SOCK_STREAM)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        code = self._socket.connect_ex(self._address)
        if code in (0, errno.EINPROGRESS):
            self._poller.add(self._socket.fileno(), self.receive)
        else:
            self._lost(os.strerror(code))

    def _lost(self, why: str) -> None:
        self.last_error = why
        self.resets += self._connected
        if self._socket:
            self._socket.close()
        self._socket, self._connected = None, False
        self._waiting.clear()
        self._out = self._in = b""
        self._retry_ns = time.monotonic_ns() + RECONNECT_NS

    def send(self, now_ns: int, due_ns: int) -> None:
        """Send the next line. Without a connection it counts as sent and lost: the user's view of it."""
        seq = self.stream.sent(now_ns, due_ns)
        if self._socket is None and now_ns >= self._retry_ns:
            self._connect()
        if self._socket is None:
            return
        line = b"%s %d" % (self._nonce, seq)
        self._waiting.append((seq, now_ns, line))
        self._out += line + b"\n"
        try:
            self._out = self._out[self._socket.send(self._out) :]
        except BlockingIOError:  # still connecting, or the target does not take any more
            return
        except OSError as error:
            self._lost(str(error))
            return
        if not self._connected:
            self._connected = True
            self.connects += 1

    def receive(self, now_ns: int, clock_offset_ns: int) -> None:
        """Count the lines that have arrived, and notice the end of the connection."""
        if self._socket is None:
            return
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(str(error))
            return
        if not data:
            self._lost("closed by the target")
            return
        *lines, self._in = (self._in + data).split(b"\n")
        for line in lines:
            self._line(line, now_ns)

    def _line(self, line: bytes, now_ns: int) -> None:
        try:
            nonce, seq, counter, boot_id = line.split()
            expected_seq, sent_ns, expected = self._waiting.popleft()
            if b"%s %s" % (nonce, seq) != expected:
                raise ValueError
            answer = int(counter), boot_id.decode()
        except (ValueError, IndexError):
            self.stream.mismatched()
            return
        self.stream.received(expected_seq, sent_ns, now_ns, *answer)

    def report(self, now_ns: int, clock_offset_ns: int) -> dict[str, Any]:
        state = {
            "connected": self._connected,
            "resets": self.resets,
            "reconnects": max(self.connects - 1, 0),
            "last_error": self.last_error,
        }
        return state | self.stream.report(now_ns, clock_offset_ns)

    def close(self) -> None:
        if self._socket:
            self._socket.close()


class Prober:
    """Probes ``targets`` (name -> IP address) at ``rate_hz``; ``run`` blocks until it is told to stop.

    Raises ValueError for what is no IP address, OSError for one that no route leads to.
    """

    def __init__(
        self,
        targets: dict[str, str],
        *,
        rate_hz: float = 1000,
        port: int = ECHO_PORT,
        grace_s: float = 0.5,
        tcp: bool = True,
    ) -> None:
        self.targets = targets
        self.rate_hz = rate_hz
        self.stopping = False
        self._grace_ns = int(grace_s * 1e9)
        self._interval_ns = int(1e9 / rate_hz)
        self._begun_ns = now_ns = time.monotonic_ns()
        self._poller = Poller()
        self._udp: dict[str, UdpProbe] = {}
        self._tcp: dict[str, TcpProbe] = {}
        self._probes: list[UdpProbe | TcpProbe] = []
        try:
            for name, address in targets.items():
                at = str(ipaddress.ip_address(address)), port
                self._udp[name] = UdpProbe(self._poller, at, self._interval_ns, now_ns, self._grace_ns)
                self._probes.append(self._udp[name])
                if tcp:
                    self._tcp[name] = TcpProbe(self._poller, at, now_ns, self._grace_ns)
                    self._probes.append(self._tcp[name])
        except (OSError, ValueError):
            self.close()
            raise

    def mark(self, name: str) -> None:
        """Begin a new window on every stream."""
        now_ns = time.monotonic_ns()
        for probe in self._probes:
            probe.stream.mark(name, now_ns)

    def report(self, *, final: bool = False) -> dict[str, Any]:
        """Return all figures as of now; see ``prober_stats`` for those of a stream."""
        now_ns = time.monotonic_ns()
        offset_ns = time.time_ns() - now_ns
        return {
            "final": final,
            "elapsed_s": round((now_ns - self._begun_ns) / 1e9, 3),
            "rate_hz": self.rate_hz,
            "cpu_s": round(time.process_time(), 3),
            "targets": {
                name: {
                    "address": address,
                    "udp": self._udp[name].stream.report(now_ns, offset_ns),
                    "tcp": self._tcp[name].report(now_ns, offset_ns) if name in self._tcp else None,
                }
                for name, address in self.targets.items()
            },
        }

    def run(
        self, *, duration_s: float | None = None, each: Callable[[], None] | None = None, each_s: float = 0.2
    ) -> dict[str, Any]:
        """Send and count until ``stopping`` is set or ``duration_s`` is over; return the final report.

        ``each()``, if given, is called after every ``each_s`` seconds.
        """
        interval_ns, now_ns = self._interval_ns, time.monotonic_ns()
        udp_due = tcp_due = each_due = now_ns
        end_ns = now_ns + int(duration_s * 1e9) if duration_s is not None else None
        while not self.stopping and (end_ns is None or now_ns < end_ns):
            while udp_due <= now_ns:
                for udp in self._udp.values():
                    udp.send(now_ns, udp_due)
                udp_due += interval_ns
                if now_ns - udp_due > CATCH_UP * interval_ns:
                    udp_due += (now_ns - udp_due) // interval_ns * interval_ns
            while tcp_due <= now_ns:
                for tcp in self._tcp.values():
                    tcp.send(now_ns, tcp_due)
                tcp_due += max(TCP_INTERVAL_NS, (now_ns - tcp_due) // TCP_INTERVAL_NS * TCP_INTERVAL_NS)
            if each and each_due <= now_ns:
                each()
                each_due = now_ns + int(each_s * 1e9)
            pause_ns = min(udp_due, tcp_due, now_ns + 2_000_000) - time.monotonic_ns()
            if pause_ns > 0:
                time.sleep(pause_ns / 1e9)
            now_ns = self._poller.receive()
        end_ns = now_ns + self._grace_ns
        streams = [probe.stream for probe in self._probes]
        while now_ns < end_ns and any(stream.unanswered() for stream in streams):
            time.sleep(0.002)
            now_ns = self._poller.receive()
        return self.report(final=True)

    def close(self) -> None:
        for probe in self._probes:
            probe.close()
        self._poller.close()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def write_atomically(path: Path, report: dict[str, Any]) -> None:
    """Replace ``path`` by the report as JSON; a reader sees the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(report))
    aside.replace(path)


class Marked(Protocol):
    """Takes the commands: ``stop`` sets ``stopping``."""

    stopping: bool

    def mark(self, name: str) -> None: ...


class Commands:
    """``mark NAME`` and ``stop`` from standard input, read without waiting."""

    def __init__(self, prober: Marked) -> None:
        self._prober = prober
        self._buffer = b""
        self._open = True
        self._marks = 0
        self.signals = 0

    def poll(self) -> None:
        while self._marks < self.signals:  # not in the handler: it may interrupt the counting
            self._marks += 1
            self._mark(f"mark-{self._marks}")
        while self._open and select.select([0], [], [], 0)[0]:
            data = os.read(0, 4096)
            self._open = bool(data)
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                words = line.decode(errors="replace").split()
                if words[:1] == ["mark"] and len(words) == 2:
                    self._mark(words[1])
                elif words == ["stop"]:
                    self._prober.stopping = True
                elif words:
                    print(f"unknown: {' '.join(words)}", flush=True)

    def _mark(self, name: str) -> None:
        self._prober.mark(name)
        print(f"marked {name}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Probe until stopped and print or write the report."""
    parser = argparse.ArgumentParser(prog="python -m emp.lab.prober", description="Probe targets over UDP and TCP.")
    parser.add_argument("targets", nargs="+", metavar="NAME=ADDR")
    parser.add_argument("--rate", type=float, default=1000, help="UDP requests per second and target (1000)")
    parser.add_argument("--port", type=int, default=ECHO_PORT)
    parser.add_argument("--udp-only", action="store_true", help="no TCP connections: for many targets")
    parser.add_argument("--duration", type=float, help="seconds; until SIGTERM by default")
    parser.add_argument("--grace", type=float, default=0.5, help="seconds after which a reply counts as lost (0.5)")
    parser.add_argument("--report", type=Path, help="where the final report goes; standard output by default")
    parser.add_argument("--snapshot", type=Path, help="where a report goes periodically, replaced atomically")
    parser.add_argument("--every", type=float, default=0.2, help="seconds between snapshots (0.2)")
    options = parser.parse_args(argv)
    targets = dict(target.split("=", 1) for target in options.targets if "=" in target)
    if len(targets) != len(options.targets):
        parser.error("targets are NAME=ADDR, each name once")
    if not 1 <= options.rate <= 20000:
        parser.error("--rate: 1 to 20000 per second")
    try:
        prober = Prober(
            targets, rate_hz=options.rate, port=options.port, grace_s=options.grace, tcp=not options.udp_only
        )
    except (OSError, ValueError) as error:
        parser.error(f"cannot probe {', '.join(options.targets)}: {error}")
    commands = Commands(prober)

    def stop(signum: int, frame: object) -> None:
        prober.stopping = True

    def mark(signum: int, frame: object) -> None:
        commands.signals += 1

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    signal.signal(signal.SIGUSR1, mark)
    with contextlib.suppress(PermissionError):  # a busy machine must not look like a slow network
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    gc.freeze()
    gc.disable()  # no cycles are made here, and a collection would look like a stall
    print("ready", flush=True)
    snapshot_due = 0.0

    def each() -> None:
        nonlocal snapshot_due
        commands.poll()
        if options.snapshot and time.monotonic() >= snapshot_due:
            write_atomically(options.snapshot, prober.report())
            snapshot_due = time.monotonic() + options.every

    report = prober.run(duration_s=options.duration, each=each, each_s=0.02)
    prober.close()
    if options.snapshot:
        write_atomically(options.snapshot, report)
    if options.report:
        write_atomically(options.report, report)
    else:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
