"""A network segment for tests: two nodes and a client, each a network namespace, joined by a bridge at the client.

The namespaces belong to three sleeping processes, so nothing is left when the tests end, however they end.

::

    left: eth0 ──┐
                 ├── bridge "fabric", ports "left" and "right", in the client's namespace
    right: eth0 ─┘
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 0x0003
_PACKET_OUTGOING = 4
_MARK = bytes.fromhex("ffffffffffff02000000006d88b5") + b"mark".ljust(46, b"\0")
_libc = ctypes.CDLL(None, use_errno=True)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def frame(source: str, destination: str = "ff:ff:ff:ff:ff:ff", payload: bytes = b"hello") -> bytes:
    return mac_bytes(destination) + mac_bytes(source) + b"\x88\xb6" + payload.ljust(46, b"\0")


class Listener:
    """What arrives from one node at the client, and a way to send there."""

    def __init__(self, interface: str) -> None:
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(_ETH_P_ALL))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.socket.bind((interface, _ETH_P_ALL))

    def drain(self) -> list[bytes]:
        """Return the frames that have come in from the node since the last call."""
        found: list[bytes] = []
        while True:
            try:
                data, address = self.socket.recvfrom(65536)
            except BlockingIOError:
                return found
            if address[2] != _PACKET_OUTGOING and data != _MARK:
                found.append(data)

    def send(self, data: bytes) -> None:
        self.socket.send(data)


class Segment:
    def __init__(self) -> None:
        self._holders: dict[str, subprocess.Popen[str]] = {}
        for name in ("left", "right", "client"):
            self._holders[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sh", "-c", "echo; exec sleep infinity"],
                stdout=subprocess.PIPE,
                text=True,
            )
        for holder in self._holders.values():
            assert holder.stdout and holder.stdout.readline() == "\n", "cannot make a network namespace: not root?"
        with self.inside("client"):
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        self.ip("client", "link add fabric type bridge forward_delay 0 mcast_snooping 0", "link set fabric up")
        for name in ("left", "right"):
            self.ip(
                "client",
                f"link add {name} type veth peer name eth0 netns {self._holders[name].pid}",
                f"link set {name} master fabric",
                f"link set {name} up",
            )
            with self.inside(name):
                Path("/proc/sys/net/ipv6/conf/eth0/disable_ipv6").write_text("1")
            self.ip(name, "link set lo up", "link set eth0 up")
        with self.inside("client"):
            self.left, self.right = Listener("left"), Listener("right")

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Run in that namespace: this thread, and the threads and processes that it starts."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        within = os.open(f"/proc/{self._holders[name].pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(within)
            yield
        finally:
            _setns(before)
            os.close(before)
            os.close(within)

    def command(self, name: str, *argv: str, stdin: str = "") -> str:
        with self.inside(name):
            return subprocess.run(argv, input=stdin, check=True, stdout=subprocess.PIPE, text=True).stdout

    def ip(self, name: str, *commands: str) -> None:
        self.command(name, "ip", "-batch", "-", stdin="\n".join(commands))

    def settle(self) -> None:
        """Return when whatever "left" had sent before has arrived: a mark went the same way, and came in."""
        with self.inside("left"), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind(("eth0", 0))
            with self.inside("client"):
                watcher = Listener("left")
            sender.send(_MARK)
        watcher.socket.settimeout(5)
        while watcher.socket.recv(65536) != _MARK:
            pass
        watcher.socket.close()
        time.sleep(0.01)  # the mark may have overtaken a frame that another CPU was handling

    def close(self) -> None:
        self.left.socket.close()
        self.right.socket.close()
        for holder in self._holders.values():
            holder.kill()
        for holder in self._holders.values():
            holder.wait()
            assert holder.stdout
            holder.stdout.close()


def put_on_wire(interface: str, *frames: bytes) -> None:
    """Send frames out of an interface of the current namespace, past any bridge."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((interface, 0))
        for data in frames:
            sender.send(data)


def guest_sends(tap_fd: int, data: bytes) -> None:
    """Do what QEMU does when the guest sends."""
    os.write(tap_fd, bytes(10) + data)


def guest_receives(tap_fd: int) -> list[bytes]:
    """Do what QEMU does while the guest runs: take every frame that waits."""
    found = []
    while True:
        try:
            found.append(os.read(tap_fd, 65536)[10:])
        except BlockingIOError:
            return found


def arp_fields(data: bytes) -> tuple[int, str, str, str]:
    """Return operation, sender MAC, sender IP and target IP of an ARP frame."""
    operation, mac, sender, _, target = struct.unpack("!6xH6s4s6s4s", data[14:42])
    return operation, mac.hex(":"), socket.inet_ntoa(sender), socket.inet_ntoa(target)


@pytest.fixture
def segment() -> Iterator[Segment]:
    """Give a segment; the test is in its node ``left``."""
    made = Segment()
    try:
        with made.inside("left"):
            yield made
    finally:
        made.close()
