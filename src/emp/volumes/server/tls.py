"""The directory from which qemu-nbd takes its TLS credentials."""

from __future__ import annotations

from pathlib import Path

from emp.wire.files import write_private
from emp.wire.pki import Credentials

DH_PARAMS = "dh-params.pem"

FFDHE2048 = b"""\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""the group ffdhe2048 of RFC 7919, appendix A.1"""


def write_tls_directory(credentials: Credentials, directory: Path) -> None:
    """Write what QEMU's ``tls-creds-x509`` reads, with a finite-field group beside the certificate.

    QEMU 10.0 makes a fresh group of 2048 bits at each start of a server that finds none, which takes 0.1 to 1.7 s. None
    of our connections uses it: TLS 1.3 with ECDSA agrees on its keys by elliptic curves.
    """
    credentials.write(directory)
    write_private(directory / DH_PARAMS, FFDHE2048)
