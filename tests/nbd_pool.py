"""A pool's certificates and the node's end of an NBD connection, for tests of the volume service."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from emp.model.volume import Attachment, NbdEndpoint
from emp.volumes.server.config import Config
from emp.wire.http import WireClient
from emp.wire.pki import CertificateAuthority, Identity, Role
from emp.wire.tls import mutual_client

POOL = "p"
SERVER = Identity(Role.VOLUMES, "v1")


def endpoint_of(attachment: Attachment) -> NbdEndpoint:
    """Return where the pool's own volume service serves an attachment: it always says."""
    assert attachment.endpoint is not None
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
