"""A pool's certificates and the node's end of an NBD connection, for tests of the volume service."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from emp.model.volume import Attachment, NbdEndpoint, Volume
from emp.volumes.server.config import Config
from emp.volumes.server.tls import write_tls_directory
from emp.wire.http import WireClient
from emp.wire.pki import CertificateAuthority, Identity, Role
from emp.wire.tls import mutual_client

POOL = "p"
SERVER = Identity(Role.VOLUMES, "v1")


def endpoint_of(attachment: Attachment) -> NbdEndpoint:
    """Return where the pool's own volume service serves an attachment: it always says."""
    assert isinstance(attachment.endpoint, NbdEndpoint)
    return attachment.endpoint


class NbdPool:
    """Credentials in ``directory``, one subdirectory per identity, made on first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ca = CertificateAuthority.create(directory / "ca", POOL)

    def credentials(self, identity: Identity) -> Path:
        where = self.directory / identity.cn
        if not where.exists():
            self._ca.issue(identity.role, identity.name).write(where)
        return where

    @contextlib.contextmanager
    def serving(self, image: Path, *, name: str = "disk", names: Sequence[str] = ("127.0.0.1",)) -> Iterator[str]:
        """Serve a raw file as anybody might: an NBD server under TLS, its certificate for ``names``. Yield its URL."""
        tls = self.directory / f"store-{name}"
        write_tls_directory(self._ca.issue(Role.VOLUMES, f"store-{name}", names), tls)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        creds = {"qom-type": "tls-creds-x509", "id": "tls", "endpoint": "server", "verify-peer": True, "dir": str(tls)}
        argv = ["qemu-nbd", "--persistent", "--shared", "0", "--object", json.dumps(creds), "--tls-creds", "tls"]
        argv += ["--bind", "127.0.0.1", "--port", str(port), "--export-name", name, "--format", "raw", str(image)]
        with subprocess.Popen(argv) as server:
            try:
                _await_port(port, server)
                yield f"nbds://127.0.0.1:{port}/{name}"
            finally:
                server.kill()

    def config(self, state_dir: Path, port: int, nbd_ports: tuple[int, int]) -> Config:
        return Config(
            address="127.0.0.1",
            port=port,
            nbd_ports=nbd_ports,
            credentials=self.credentials(SERVER),
            state_dir=state_dir,
            pool=POOL,
        )

    def client(self, port: int, identity: Identity) -> WireClient:
        tls = mutual_client(self.credentials(identity))
        return WireClient(f"https://127.0.0.1:{port}", tls=tls, server=SERVER)

    def qemu_io(self, attachment: Attachment, identity: Identity) -> list[str]:
        """Return the command line of a client that does block I/O; commands come on its standard input."""
        endpoint = endpoint_of(attachment)
        tls = {"qom-type": "tls-creds-x509", "id": "tls", "endpoint": "client", "verify-peer": True}
        return [
            *("qemu-io", "--object", json.dumps(tls | {"dir": str(self.credentials(identity))}), "--image-opts"),
            f"driver=nbd,host={endpoint.host},port={endpoint.port},export={endpoint.export},"
            f"tls-creds=tls,tls-hostname={endpoint.tls_hostname}",
        ]

    def io(self, attachment: Attachment, *commands: str, identity: Identity | None = None) -> str | None:
        """Return what ``qemu-io`` says to ``commands``; None if it cannot connect or one of them fails.

        Without ``identity`` it connects as the node's QEMU would.
        """
        argv = self.qemu_io(attachment, identity or Identity(Role.QEMU, attachment.node))
        for command in commands:
            argv += ["-c", command]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
        return None if done.returncode or "failed" in done.stdout + done.stderr else done.stdout

    def is_open(self, attachment: Attachment, identity: Identity | None = None) -> bool:
        return self.io(attachment, "read 0 4k", identity=identity) is not None


class MemoryRegistry:
    """See ``emp.volumes.shared.Registry``."""

    def __init__(self) -> None:
        self.held: dict[str, Volume] = {}

    def all(self) -> Sequence[Volume]:
        return list(self.held.values())

    def find(self, volume: str) -> Volume | None:
        return self.held.get(volume)

    async def change(self, volume: str, update: Callable[[Volume | None], Volume | None]) -> None:
        if (made := update(self.held.get(volume))) is None:
            self.held.pop(volume, None)
        else:
            self.held[volume] = made


def _await_port(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        time.sleep(0.02)
    raise AssertionError(f"qemu-nbd does not listen at port {port}: {server.poll()}")
