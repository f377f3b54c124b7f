"""QEMU takes the pool's credentials as they are written, and lets in only the one identity that it is told."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from emp.wire.pki import CertificateAuthority, Identity, Role, qemu_dn

N1 = Identity(Role.AGENT, "n1")


class Export:
    """A disk served over NBD and TLS to agent n1 alone, on a unix socket (TLS is the same as over TCP)."""

    def __init__(self, sock: str, log: Path) -> None:
        self.sock = sock
        self.log = log


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("certs")
    ca = CertificateAuthority.create(base / "ca", "meadow")
    for role, name in ((Role.VOLUMES, "v1"), (Role.AGENT, "n1"), (Role.AGENT, "n2"), (Role.AGENT, "n11")):
        ca.issue(role, name).write(base / f"{role}-{name}")
    other = CertificateAuthority.create(base / "ca2", "meadow")
    other.issue(Role.AGENT, "n1").write(base / "stranger")
    (base / "stranger" / "ca-cert.pem").write_bytes(ca.ca_pem + other.ca_pem)  # QEMU checks its own certificate too
    return base


def creds(end: str, directory: Path) -> str:
    return f"tls-creds-x509,id=tls,endpoint={end},dir={directory},verify-peer=yes"


@pytest.fixture
def export(certs: Path, tmp_path: Path) -> Iterator[Export]:
    disk, sock, pid_file, log = tmp_path / "disk", str(tmp_path / "nbd"), tmp_path / "pid", tmp_path / "log"
    disk.write_bytes(b"\xab" * 65536)
    argv = ["qemu-nbd", "--format=raw", f"--socket={sock}", "--persistent", f"--pid-file={pid_file}", "--read-only"]
    argv += ["--object", creds("server", certs / "volumes-v1"), "--tls-creds=tls"]
    argv += ["--object", f"authz-simple,id=only,identity={qemu_dn(N1)}", "--tls-authz=only", str(disk)]
    with log.open("w") as stderr:
        server = subprocess.Popen(argv, stderr=stderr)
    try:
        deadline = time.monotonic() + 20
        while not pid_file.exists():  # qemu-nbd writes it once it listens
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"qemu-nbd did not come up: {log.read_text()}")
            time.sleep(0.01)
        yield Export(sock, log)
    finally:
        server.kill()
        server.wait()


def read(export: Export, credentials: Path, *, server: str = "volumes-v1") -> subprocess.CompletedProcess[str]:
    """Read the first sector as the holder of ``credentials``."""
    image = f"driver=nbd,server.type=unix,server.path={export.sock},tls-creds=tls,tls-hostname={server}"
    argv = ["qemu-io", "--object", creds("client", credentials), "-r", "--image-opts", "-c", "read -v 0 16", image]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, env=os.environ | {"LC_ALL": "C"})


def test_the_named_node_reads_the_disk(export: Export, certs: Path) -> None:
    done = read(export, certs / "agent-n1")
    assert done.returncode == 0, done.stderr
    assert "ab ab ab ab" in done.stdout


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("agent-n2", "authz check for CN=agent-n2 is denied"),
        ("agent-n11", "authz check for CN=agent-n11 is denied"),
        ("volumes-v1", "authz check for CN=volumes-v1 is denied"),
        ("stranger", "hasn't got a known issuer"),
    ],
)
def test_no_other_certificate_reads_the_disk(export: Export, certs: Path, who: str, reason: str) -> None:
    done = read(export, certs / who)
    assert done.returncode != 0 and "ab ab" not in done.stdout
    assert read(export, certs / "agent-n1").returncode == 0, "the one who may read still can"
    assert reason in export.log.read_text()


def test_the_client_refuses_another_server(export: Export, certs: Path) -> None:
    done = read(export, certs / "agent-n1", server="volumes-v2")
    assert done.returncode != 0 and "does not match the hostname" in done.stderr
