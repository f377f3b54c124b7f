"""Talks to the guest service of an EVM or a pod over the lab's network, as a client there would.

The socket is made in the network namespace of the place ``client`` by a thread that visits it; a socket stays where it
was made, so the caller can use it from anywhere. The commands are those of ``guest/service.c``.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from emp.lab.kernel import in_network
from emp.lab.places import NAMESPACES
from emp.lab.topology import CLIENT, Topology
from emp.model.errors import HostError, Unreachable

CONTROL_PORT = 7778
ECHO_PORT = 7777
ANSWER_S = 30.0


def socket_in(
    topology: Topology, kind: socket.SocketKind, where: str = CLIENT.name, *, to: str = "0.0.0.0"
) -> socket.socket:
    """Return a new socket of a place of the lab, of the version of the address ``to``."""
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    try:
        return in_network(str(NAMESPACES / topology.namespace(where)), lambda: socket.socket(family, kind))
    except OSError as error:
        raise HostError(f"cannot enter the network of {where}: {error}") from error


class Guest:
    """The control port of one EVM or pod. Each question is a connection of its own, so a migration breaks nothing."""

    def __init__(self, topology: Topology, address: str) -> None:
        self._topology = topology
        self.address = address

    def ask(self, command: str, *, timeout_s: float = ANSWER_S) -> Any:
        """Return the answer to a command; ``Unreachable`` without one in time, ``HostError`` when the guest refuses."""
        with socket_in(self._topology, socket.SOCK_STREAM, to=self.address) as connection:
            connection.settimeout(timeout_s)
            try:
                connection.connect((self.address, CONTROL_PORT))
                connection.sendall(command.encode() + b"\n")
                with connection.makefile() as lines:
                    answer = json.loads(lines.readline() or "null")
            except OSError as error:
                raise Unreachable(f"the guest at {self.address} does not answer {command!r}: {error}") from error
        if answer is None or (isinstance(answer, dict) and "error" in answer):
            problem = answer["error"] if answer else "it closed the connection"
            raise HostError(f"the guest at {self.address} refuses {command!r}: {problem}")
        return answer

    def start_journal(self, serial: str, rate_hz: int, *, timeout_s: float = ANSWER_S) -> None:
        """Let the guest append records to the volume ``serial``; its disk is there a little later than its network."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.ask(f"journal start {serial} {rate_hz}")
            except HostError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return

    def wait_first_packet(self, *, timeout_s: float = 60.0) -> float:
        """Send a datagram to the echo port every 20 ms until one is answered; return the seconds that it took."""
        began = time.monotonic()
        with socket_in(self._topology, socket.SOCK_DGRAM, to=self.address) as probe:
            probe.settimeout(0.02)
            while time.monotonic() < began + timeout_s:
                try:
                    probe.sendto(b"hello", (self.address, ECHO_PORT))
                    probe.recv(2048)
                except TimeoutError:
                    continue
                except OSError:  # no route, or nobody listens there yet
                    time.sleep(0.02)
                    continue
                return time.monotonic() - began
        raise Unreachable(f"no answer from {self.address} within {timeout_s:.0f} s", hint="emp evm console shows why")
