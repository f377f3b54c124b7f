"""TLS contexts for the four ends of the pool's connections. TLS 1.3 only, this pool's CA only, no switch to weaken it.

A daemon is verified under its common name (``server_hostname="agent-n1"``), independent of the address it is reached
at. What a client certificate entitles to is decided above, from ``emp.wire.identity``.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

from emp.model.errors import BadInput
from emp.wire.files import CA_CERT, IDENTITY

log = logging.getLogger(__name__)


def mutual_server(credentials: Path) -> ssl.SSLContext:
    """Return the context of a port for daemons: without a certificate of this pool the handshake fails."""
    return _server(credentials, ssl.CERT_REQUIRED)


def public_server(credentials: Path) -> ssl.SSLContext:
    """Return the context of a port for people too: a certificate is optional, a wrong one is refused all the same."""
    return _server(credentials, ssl.CERT_OPTIONAL)


def mutual_client(credentials: Path) -> ssl.SSLContext:
    """Return the context by which a daemon calls another one, showing its own certificate."""
    context = public_client(credentials / CA_CERT)
    _load(context, credentials)
    return context


def public_client(ca_cert: Path) -> ssl.SSLContext:
    """Return the context by which people's tools call the controller: trusts the pool's CA, shows no certificate."""
    context = _base(ssl.PROTOCOL_TLS_CLIENT)
    _trust(context, ca_cert)
    return context


def _server(credentials: Path, client_cert: ssl.VerifyMode) -> ssl.SSLContext:
    context = _base(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = client_cert
    context.num_tickets = 0  # no resumption: every connection shows and proves its certificate
    context.sslobject_class = _ServerSide
    _trust(context, credentials / CA_CERT)
    _load(context, credentials)
    return context


def _base(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.hostname_checks_common_name = False
    return context


def _trust(context: ssl.SSLContext, ca_cert: Path) -> None:
    try:
        context.load_verify_locations(cafile=ca_cert)
    except OSError as error:
        raise BadInput(f"cannot use the CA certificate {ca_cert}: {error.strerror or error}", field="ca") from error


def _load(context: ssl.SSLContext, credentials: Path) -> None:
    try:
        context.load_cert_chain(credentials / IDENTITY)
    except OSError as error:
        where = credentials / IDENTITY
        raise BadInput(f"cannot use the credentials {where}: {error.strerror or error}", field="credentials") from error


class _ServerSide(ssl.SSLObject):
    """Lets the alert of a failed handshake reach the client.

    asyncio drops what OpenSSL has written when ``do_handshake`` raises, so that a refused client sees a bare end of
    file and cannot tell a refusal from a crash after its order. Asking for one more read first makes asyncio flush.
    """

    _failure: ssl.SSLError | None = None

    def do_handshake(self) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            log.warning("TLS handshake refused: %s", error.reason or error)
            self._failure = error
            raise ssl.SSLWantReadError from error


def refusal(error: BaseException | None) -> str | None:
    """Return the reason when ``error`` or a cause of it is the peer's TLS alert: it has read no request from us."""
    seen: Any = error
    while seen is not None:
        reason = getattr(seen, "reason", None)
        if isinstance(seen, ssl.SSLError) and isinstance(reason, str) and "ALERT" in reason:
            return reason.lower().replace("_", " ")
        seen = seen.__cause__ or seen.__context__
    return None
