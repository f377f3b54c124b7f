"""One connection to a daemon: who must be at the other end, and the words for why it failed."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from pathlib import Path

from emp.model.errors import BadInput

CONNECT_S = 3.0


class Connection(http.client.HTTPConnection):
    """To whom it goes is for the kinds below."""

    sock: socket.socket


class SecureConnection(Connection):
    """Whatever the address is, the other end must show the certificate of ``server_name``."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext, server_name: str) -> None:
        super().__init__(host, port, timeout=CONNECT_S)
        self._tls = tls
        self._server_name = server_name

    def connect(self) -> None:
        super().connect()
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._server_name)


class LocalConnection(Connection):
    """To a unix socket, whose file's mode says who may."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=CONNECT_S)
        self._path = path

    def connect(self) -> None:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(self.timeout)
            made.connect(str(self._path))
        except BaseException:
            made.close()
            raise
        self.sock = made


def trusting(ca_pem: str) -> ssl.SSLContext:
    """Return the same context as ``emp.wire.tls.public_client``: TLS 1.3, and this pool's CA alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.hostname_checks_common_name = False
    try:
        context.load_verify_locations(cadata=ca_pem)
    except (ssl.SSLError, ValueError) as error:
        raise BadInput(
            f"cannot use the CA certificate: {error}", field="ca_pem", hint="make the context anew"
        ) from error
    return context


def reason_of(error: BaseException) -> str:
    """Return the operating system's or TLS's own words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError | socket.gaierror) and error.strerror:
        return error.strerror
    if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
        return "the connection broke"
    if isinstance(error, http.client.BadStatusLine):
        return "what came is no HTTP"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
