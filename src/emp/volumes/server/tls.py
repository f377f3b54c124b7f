"""The directory from which qemu-nbd takes its TLS credentials."""

from __future__ import annotations

from pathlib import Path

from emp.wire import dh
from emp.wire.files import write_private
from emp.wire.pki import Credentials


def write_tls_directory(credentials: Credentials, directory: Path) -> None:
    """Write what QEMU's ``tls-creds-x509`` reads."""
    credentials.write(directory)
    write_private(directory / dh.FILE, dh.FFDHE2048)
