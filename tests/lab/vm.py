"""A bare QEMU with the `micro` image for tests of the guest alone: no agent, no driver; taps on a bridge of the tests.

The host is 10.99.0.1/16 and fd99::1/64 on the bridge, in the namespace in which the tests run.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emp.lab.images import FW_CFG_NAME, KERNEL_COMMAND_LINE, Image

BRIDGE = "guests0"
PATIENCE_S = 30.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def segment(taps: int) -> Iterator[list[str]]:
    """A bridge with that many taps on it; yields the taps' names."""
    names = [f"guest{number}" for number in range(taps)]
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("link", "set", BRIDGE, "up")
        ip("addr", "add", "10.99.0.1/16", "dev", BRIDGE)
        ip("-6", "addr", "add", "fd99::1/64", "dev", BRIDGE, "nodad")
        for name in names:
            ip("tuntap", "add", name, "mode", "tap")
            ip("link", "set", name, "master", BRIDGE, "up", "txqueuelen", "10000")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "link", "delete", name], check=False)
        ip("link", "delete", BRIDGE)


@dataclass(frozen=True)
class Disk:
    """A virtio-blk disk: a raw file. ``inject`` are rules of QEMU's blkdebug driver."""

    serial: str
    path: Path
    inject: tuple[dict[str, Any], ...] = ()


class Vm:
    """A running guest; ``close`` ends it."""

    def __init__(
        self,
        image: Image,
        directory: Path,
        config: str,
        nics: list[tuple[str, str]] | None = None,
        disks: tuple[Disk, ...] = (),
    ) -> None:
        (directory / "config").write_text(config)
        self._monitor, theirs = socket.socketpair()
        self._lines = self._monitor.makefile("rw")
        self._events: list[dict[str, Any]] = []
        self._console = b""
        argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
        argv += ["-machine", "pc-i440fx-10.0", "-cpu", "Westmere-v1", "-m", "256M"]
        argv += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", KERNEL_COMMAND_LINE]
        argv += ["-fw_cfg", f"name={FW_CFG_NAME},file={directory / 'config'}", "-serial", "stdio"]
        argv += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
        argv += ["-device", "pvpanic", "-action", "panic=pause"]
        for number, (tap, mac) in enumerate(nics or []):
            argv += ["-netdev", f"tap,id=n{number},ifname={tap},script=no,downscript=no"]
            argv += ["-device", f"virtio-net-pci,netdev=n{number},mac={mac},romfile=,disable-legacy=on"]
        for number, disk in enumerate(disks):
            file: dict[str, Any] = {"driver": "file", "filename": str(disk.path)}
            if disk.inject:
                file = {"driver": "blkdebug", "image": file, "inject-error": list(disk.inject)}
            block = {"driver": "raw", "node-name": f"d{number}", "file": file}
            argv += ["-blockdev", json.dumps(block)]
            argv += ["-device", f"virtio-blk-pci,drive=d{number},serial={disk.serial},werror=report,rerror=report"]
        with theirs:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[theirs.fileno()]
            )
        self._lines.readline()  # the greeting
        self.qmp("qmp_capabilities")

    def qmp(self, command: str, **arguments: Any) -> Any:
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        while "return" not in (message := json.loads(self._lines.readline())):
            assert "error" not in message, message
            self._events.append(message)
        return message["return"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """Return the next event of that name; an event is the last thing that QEMU says when it ends."""
        self._monitor.settimeout(PATIENCE_S)
        while not (found := [event for event in self._events if event["event"] == name]):
            self._events.append(json.loads(self._lines.readline()))
        self._events.remove(found[0])
        return found[0]

    def type(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read_console(self, until: str) -> str:
        """Return what the console says up to and including ``until``."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + PATIENCE_S
        while until.encode() not in self._console:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            assert data, f"no {until!r} on the console: {self._console!r}"
            self._console += data
        seen, _, self._console = self._console.partition(until.encode())
        return seen.decode(errors="replace") + until

    def close(self) -> None:
        self._lines.close()
        self._monitor.close()
        self.process.kill()
        self.process.communicate()


def echo(address: str, request: bytes, *, timeout_s: float = 5.0) -> bytes:
    """Return the reply to one datagram; TimeoutError without one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(timeout_s)
        client.connect((address, 7777))
        client.send(request)
        return client.recv(65536)


def wait_for_echo(*addresses: str) -> None:
    """Ask each address every 20 ms until it has answered once."""
    deadline = time.monotonic() + PATIENCE_S
    for address in addresses:
        while True:
            try:
                echo(address, b"hello", timeout_s=0.02)
                break
            except OSError:  # no neighbour, nobody listening, no answer in time
                assert time.monotonic() < deadline, f"{address} does not answer"


def control(address: str, command: str) -> Any:
    """Return the answer to a control command."""
    with socket.create_connection((address, 7778), PATIENCE_S) as connection, connection.makefile("rw") as lines:
        lines.write(command + "\n")
        lines.flush()
        return json.loads(lines.readline())
