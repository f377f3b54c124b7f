"""Files that a QEMU can open as volumes in each of the ways that there are, for tests with real machines."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from emp.hypervisor.base import BlockDevice, BlockSource, RelaySocket
from emp.model.volume import HostDevice, NbdEndpoint, RbdImage
from emp.wire import dh
from emp.wire.pki import Role
from tests.qemu_bench import LOOPBACK, Bench

MEBIBYTE = 1 << 20
PATIENCE_S = 60.0


class Storage:
    """Files that can be opened as a volume in each of the three ways, one file in several at once."""

    def __init__(self, nodes: Bench) -> None:
        self.directory = nodes.directory
        self.opened = contextlib.ExitStack()
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        nodes.authority.issue(Role.CONTROLLER, "volumes", [LOOPBACK]).write(self.directory / "server")
        (self.directory / "server" / dh.FILE).write_bytes(dh.FFDHE2048)
        self.relays = self.directory / "relays"
        self.relays.mkdir(mode=0o711)

    def image(self, name: str) -> Path:
        """Return the file behind a volume; a new one has 16 MiB."""
        image = self.directory / f"{name}.image"
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(16 * MEBIBYTE)
        return image

    def export(self, name: str, **wrong: Any) -> BlockDevice:
        """A file as an NBD export under TLS."""
        with socket.socket() as chosen:
            chosen.bind((LOOPBACK, 0))
            port = chosen.getsockname()[1]
        creds = f"tls-creds-x509,id=tls,endpoint=server,dir={self.directory / 'server'},verify-peer=yes"
        where = [f"--export-name={name}", f"--bind={LOOPBACK}", f"--port={port}"]
        self._serve(name, [*where, "--object", creds, "--tls-creds=tls"])
        source = NbdEndpoint(host=LOOPBACK, port=port, export=name, tls_hostname="controller-volumes")
        return self._device(name, source.model_copy(update=wrong))

    def relay(self, name: str) -> BlockDevice:
        """The same file behind a unix socket, as the node's relay serves it."""
        path = self.relays / name
        self._serve(name, [f"--socket={path}"])
        path.chmod(0o666)
        return self._device(name, RelaySocket(path))

    def attached(self, name: str) -> BlockDevice:
        """The same file as a block device of the node."""
        image = self.image(name)
        path = run("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
        self.opened.callback(run, "losetup", "--detach", path)
        device = HostDevice(path=path, serial=name, size_bytes=image.stat().st_size)
        return self._device(name, device)

    def grown(self, device: BlockDevice) -> BlockDevice:
        """The same file, twice as big, from the same place; an export is served anew, as it would be."""
        size_bytes = 2 * device.size_bytes
        with self.image(device.volume).open("ab") as file:
            file.truncate(size_bytes)
        match device.source:
            case HostDevice() as source:
                run("losetup", "--set-capacity", source.path)
                return replace(
                    device, size_bytes=size_bytes, source=source.model_copy(update={"size_bytes": size_bytes})
                )
            case NbdEndpoint():
                return self.export(device.volume)
            case RelaySocket():
                return self.relay(device.volume)
            case RbdImage():
                raise AssertionError("there is no Ceph here")

    def absent(self, device: BlockDevice) -> BlockDevice:
        """A source that nobody serves."""
        with socket.socket() as chosen:
            chosen.bind((LOOPBACK, 0))
            port = chosen.getsockname()[1]
        return replace(device, source=NbdEndpoint(host=LOOPBACK, port=port, export="absent", tls_hostname="x"))

    def _device(self, name: str, source: BlockSource) -> BlockDevice:
        return BlockDevice(name, name, self.image(name).stat().st_size, source)

    def kill(self, name: str) -> None:
        """End what serves the volume; the latest, where there are several."""
        self._servers[name].kill()
        self._servers[name].wait()

    def _serve(self, name: str, where: list[str]) -> None:
        image, ready = self.image(name), self.directory / f"{name}-{time.monotonic_ns()}.pid"
        argv = ["qemu-nbd", "--format=raw", "--shared=0", "--persistent", "--cache=none", f"--pid-file={ready}"]
        server = subprocess.Popen([*argv, *where, str(image)], stderr=subprocess.DEVNULL)
        self.opened.callback(server.wait)
        self.opened.callback(server.kill)
        self._servers[name] = server
        deadline = time.monotonic() + PATIENCE_S
        while not ready.exists():
            assert server.poll() is None, "qemu-nbd did not start"
            assert time.monotonic() < deadline
            time.sleep(0.01)


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout
