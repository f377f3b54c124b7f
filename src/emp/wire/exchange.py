"""What the asynchronous and the synchronous client share: one request, how far it got, and what a failure then means.

The distinction that matters: an order that was never sent (``Unreachable``) may be given again, one that was sent and
not answered (``OutcomeUnknown``) may have been carried out. The HTTP library's own exceptions do not tell them apart,
so the moment of sending is taken from its trace.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx2
import pydantic_core
from pydantic import TypeAdapter, ValidationError

from emp.model.errors import (
    BadInput,
    EmpError,
    Internal,
    OutcomeUnknown,
    Unavailable,
    Unreachable,
    error_from_dict,
    kind_of_status,
)
from emp.wire.identity import Identity
from emp.wire.secret import Secret
from emp.wire.tls import refusal

_SENDING = "http11.send_request_headers.started"
_READ_THEN_DECIDE = "it may or may not have happened: read the state, then decide"

FAILURES = (httpx2.TransportError, httpx2.DecodingError, OSError)
"""what a transport may raise; ``TimeoutError`` and a TLS alert met while reading are ``OSError``"""

Query = Mapping[str, str | int | float | bool | None]


class Event(NamedTuple):
    """One server-sent event; ``data`` is its text, JSON in this project."""

    id: str
    event: str
    data: str


class Target:
    """A server as its clients know it: where it is, who it must be, and what opens it."""

    def __init__(
        self,
        base_url: str,
        *,
        tls: ssl.SSLContext,
        server: Identity | None,
        token: Secret | None,
        timeout_s: float,
        connect_s: float,
    ) -> None:
        try:
            self.url = httpx2.URL(base_url)
        except httpx2.InvalidURL as error:
            raise BadInput(f"{base_url[:80]!r} is not a URL: {error}", field="url") from None
        if self.url.scheme != "https" or not self.url.host:
            raise BadInput(f"{base_url[:80]!r} is not a https URL", field="url", hint="like https://10.0.0.5:7443")
        self.server = server
        self.timeout_s = timeout_s
        self.connect_s = connect_s
        headers = {"Authorization": f"Bearer {token.reveal()}"} if token else None
        # a proxy of the environment has no business between the parts of a pool: trust_env is off
        self.options: dict[str, Any] = {
            "base_url": self.url,
            "verify": tls,
            "headers": headers,
            "trust_env": False,
            "limits": httpx2.Limits(max_connections=64, max_keepalive_connections=16, keepalive_expiry=30.0),
        }

    @property
    def shown(self) -> str:
        place = self.url.netloc.decode("ascii")
        return f"{self.server} at {place}" if self.server else place


class Exchange:
    """One request to a target."""

    def __init__(
        self, target: Target, method: str, path: str, *, idempotent: bool | None, timeout_s: float | None
    ) -> None:
        self.target = target
        self.method = method
        self.path = path
        self.idempotent = method in ("GET", "HEAD") if idempotent is None else idempotent
        self.timeout_s = target.timeout_s if timeout_s is None else timeout_s
        self.sent = False
        """whether the first byte of the request may have left"""

        self._half_open: Any = None

    async def atrace(self, step: str, info: Mapping[str, Any]) -> None:
        self.sent = self.sent or step == _SENDING
        if step == "connection.connect_tcp.complete":
            self._half_open = info["return_value"]
        elif step == "connection.start_tls.failed" and self._half_open is not None:
            # httpcore2 leaves the socket open when the request is cancelled in the TLS handshake.
            await self._half_open.aclose()

    def parameters(self, body: Any, query: Query | None, *, trace: Any, read_s: float | None) -> dict[str, Any]:
        """Return the arguments of ``httpx2``'s ``build_request`` and ``stream``."""
        extensions: dict[str, Any] = {"trace": trace}
        if self.target.server:
            extensions["sni_hostname"] = self.target.server.cn
        connect_s = min(self.target.connect_s, self.timeout_s)
        return {
            "method": self.method,
            "url": self.path,
            "params": query,
            "content": None if body is None else pydantic_core.to_json(body),
            "headers": None if body is None else {"Content-Type": "application/json"},
            "timeout": httpx2.Timeout(read_s, connect=connect_s),
            "extensions": extensions,
        }

    def failure(self, error: BaseException) -> EmpError:
        """Return what a transport failure means for the caller."""
        who, order, reason = self.target.shown, f"{self.method} {self.path}", _reason(error)
        refused = refusal(error)
        if refused:
            return Unreachable(f"{who} refuses our certificate: {refused}", hint="is it of this pool, and not expired?")
        if not self.sent:
            hint = "another daemon answers there, or one of another pool" if _is_wrong_server(error) else None
            late = isinstance(error, TimeoutError | httpx2.TimeoutException)
            return Unreachable(f"{who} cannot be reached: {'no connection in time' if late else reason}", hint=hint)
        if isinstance(error, TimeoutError | httpx2.TimeoutException):
            reason = f"no answer within {self.timeout_s:g} s"
        if self.idempotent:
            return Unavailable(f"{who} did not answer {order}: {reason}")
        return OutcomeUnknown(f"{who} did not answer {order}: {reason}", hint=_READ_THEN_DECIDE)

    def result(self, response: httpx2.Response, response_model: Any) -> Any:
        """Return the answer's body as ``response_model`` (plain JSON without one), or raise the error that it holds."""
        if not response.is_success:
            raise self.error(response)
        try:
            if response_model is not None:
                return _adapter(response_model).validate_json(response.content)
            return pydantic_core.from_json(response.content) if response.content else None
        except (ValidationError, ValueError) as error:
            text = f"{self.target.shown} answered {self.method} {self.path} with what this version cannot read: {error}"
            kind = Internal if self.idempotent else OutcomeUnknown
            raise kind(text, hint="do both ends run the same version of emp?") from error

    def error(self, response: httpx2.Response) -> EmpError:
        """Return the typed error in an answer of status 300 or more, whoever wrote it."""
        with contextlib.suppress(ValueError, TypeError):
            body = pydantic_core.from_json(response.content)
            if isinstance(body, dict) and "code" in body:
                return error_from_dict(body)
        status = response.status_code
        kind = kind_of_status(status)
        text = f"{self.target.shown} answered {self.method} {self.path} with {status} {response.reason_phrase}"
        return kind(text, status=status)


@functools.cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in found:
        found.append(seen)
        seen = seen.__cause__ or seen.__context__
    return found


def _is_wrong_server(error: BaseException) -> bool:
    return any(isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(error))


def _reason(error: BaseException) -> str:
    """Return the operating system's or TLS's own words, which the libraries above hide under theirs."""
    for cause in reversed(_causes(error)):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause.verify_message
        if isinstance(cause, ssl.SSLError | socket.gaierror) and cause.strerror:
            return cause.strerror
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)  # asyncio puts the address into ``strerror``
    return str(error) or type(error).__name__
