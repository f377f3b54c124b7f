"""HTTP to a daemon by the standard library alone: it is imported at every start of ``emp``, and is in its time.

What a failure means is the same as in ``emp.wire.exchange``: ``Unreachable`` (never sent), ``OutcomeUnknown`` (an order
sent, not answered), ``Unavailable`` (a question not answered), or the typed error in the daemon's own answer.
"""

from __future__ import annotations

import http.client
import json
import select
import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

from emp.client.connection import Connection, LocalConnection, SecureConnection, reason_of, trusting
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

if TYPE_CHECKING:
    from emp.client.context import Context

TIMEOUT_S = 15.0
FAILURES = (OSError, http.client.HTTPException)

Query = Mapping[str, str | int | float | None]


class Transport(ABC):
    """Connections to one daemon. A request finds the last connection open, if nobody else uses it."""

    shown: str
    """the daemon in words"""
    hint: str
    """what to do where it cannot be reached"""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = dict(headers)
        self._idle: list[Connection] = []

    @abstractmethod
    def new_connection(self) -> Connection:
        """Return a connection that is not open yet."""

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        query: Query | None = None,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Call:
        """Send a request and return while it is on its way. ``timeout_s`` bounds each wait for the network."""
        given = {key: value for key, value in (query or {}).items() if value is not None}
        call = Call(self, method, path, timeout_s)
        call.connection = self._connected(call)
        sent_headers = self._headers | ({} if body is None else {"Content-Type": content_type}) | dict(headers or {})
        call.sent = True
        with call:
            call.connection.sock.settimeout(timeout_s)
            call.connection.request(method, f"{path}?{urlencode(given)}" if given else path, body, sent_headers)
        return call

    def _connected(self, call: Call) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not select.select([connection.sock], [], [], 0)[0]:
                return connection
            connection.close()  # by the other end, or it would be silent
        connection = self.new_connection()
        with call:
            connection.connect()
        return connection

    def keep(self, connection: Connection) -> None:
        """Take back a connection whose answer has been read."""
        self._idle.append(connection)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class ControllerTransport(Transport):
    """HTTPS to a pool's controller, with the token of its context."""

    hint = "is it running (a lab: emp lab status)? Another pool: --context NAME"

    def __init__(self, context: Context) -> None:
        url = urlsplit(context.url)
        if url.scheme != "https" or not url.hostname:
            raise BadInput(f"{context.url[:80]!r} is not a https URL", field="url", hint="like https://10.0.0.5:7440")
        super().__init__({"Authorization": f"Bearer {context.token.reveal()}"})
        self.context = context
        self.shown = f"the controller of {context.name!r} at {context.url}"
        self._address = (url.hostname, url.port or 443)
        self._tls = trusting(context.ca_pem)

    def new_connection(self) -> Connection:
        return SecureConnection(*self._address, self._tls, self.context.server_name)


class LocalTransport(Transport):
    """A node's agent at its local socket."""

    hint = "is the agent running on this node, and are you root? Another socket: --socket PATH"

    def __init__(self, path: Path) -> None:
        super().__init__({})
        self.shown = f"the agent at {path}"
        self._path = path

    def new_connection(self) -> Connection:
        return LocalConnection(self._path)


class Call:
    """A request on its way: ``answer`` it is, or ``stream``, once."""

    def __init__(self, transport: Transport, method: str, path: str, timeout_s: float) -> None:
        self._transport = transport
        self._method = method
        self._path = path
        self._timeout_s = timeout_s
        self.connection: Connection | None = None
        self.sent = False
        """whether the first byte of the request may have left"""

    def answer(self) -> bytes:
        """Wait for the whole answer and return its body. Raises the error that it holds, or what a failure means."""
        assert self.connection is not None
        with self:
            response = self.connection.getresponse()
            body = response.read()
        if response.will_close:
            self.connection.close()
        else:
            self._transport.keep(self.connection)
        if not 200 <= response.status < 300:
            raise self._error(response, body)
        return body

    def stream(self) -> Iterator[bytes]:
        """Wait for the head of the answer; yield its body as it comes, until the other end closes it."""
        assert self.connection is not None
        with self:
            response = self.connection.getresponse()
            body = b"" if response.status == http.client.OK else response.read()
        if response.status != http.client.OK:
            self.connection.close()
            raise self._error(response, body)
        return self._pieces(response)

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        assert self.connection is not None
        try:
            while True:
                with self:
                    piece = response.read1(65536)
                if not piece:
                    return
                yield piece
        finally:
            self.connection.close()

    def unreadable(self, error: Exception) -> EmpError:
        """Return what it means that a good answer does not have the expected shape."""
        kind = Internal if self._is_question else OutcomeUnknown
        text = f"{self._transport.shown} answered {self._order} with what this version cannot read: {error}"
        return kind(text, hint="do both ends run the same version of emp?")

    # -------------------------------------------------------------- failures

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close the connection at any failure, and say what one of the network, or Ctrl-C, means."""
        if error is None:
            return
        if self.connection is not None:
            self.connection.close()
        if isinstance(error, FAILURES):
            raise self._failure(error) from error
        if isinstance(error, KeyboardInterrupt) and self.sent and not self._is_question:
            error.add_note(f"{self._order} was sent, and goes on: read the state before you ask again")

    @property
    def _order(self) -> str:
        return f"{self._method} {self._path}"

    @property
    def _is_question(self) -> bool:
        return self._method == "GET"

    def _failure(self, error: BaseException) -> EmpError:
        who = self._transport.shown
        if not self.sent:
            if isinstance(error, ssl.SSLCertVerificationError):
                hint = "another daemon answers there, or one of another pool"
            else:
                hint = self._transport.hint
            reason = "no connection in time" if isinstance(error, TimeoutError) else reason_of(error)
            return Unreachable(f"{who} cannot be reached: {reason}", hint=hint)
        reason = f"no answer within {self._timeout_s:g} s" if isinstance(error, TimeoutError) else reason_of(error)
        if self._is_question:
            return Unavailable(f"{who} did not answer {self._order}: {reason}")
        hint = "it may or may not have happened: read the state, then decide"
        return OutcomeUnknown(f"{who} did not answer {self._order}: {reason}", hint=hint)

    def _error(self, response: http.client.HTTPResponse, body: bytes) -> EmpError:
        try:
            found = json.loads(body)
        except ValueError:
            found = None
        if isinstance(found, dict) and "code" in found:
            return error_from_dict(found)
        kind = kind_of_status(response.status)
        text = f"{self._transport.shown} answered {self._order} with {response.status} {response.reason}"
        return kind(text, status=response.status)
