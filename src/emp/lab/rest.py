"""The few questions that the lab asks of its controller, on the standard library alone: it is loaded at once."""

from __future__ import annotations

import http.client
import json
import ssl
from typing import Any
from urllib.parse import urlsplit

from emp.client.context import Context
from emp.model.errors import Unreachable, error_from_dict

TIMEOUT_S = 30.0


class Rest:
    """One connection to a pool's controller, made anew when it breaks. Not for two threads."""

    def __init__(self, context: Context, *, timeout_s: float = TIMEOUT_S) -> None:
        self._connection = _Named(context, timeout_s)
        self._token = context.token

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON of the answer. Raises ``Unreachable``, or the typed error that the controller answered."""
        headers = {"Authorization": f"Bearer {self._token.reveal()}", "Content-Type": "application/json"}
        try:
            self._connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise Unreachable(f"the controller does not answer: {error}") from error
        found = json.loads(content) if content else None
        if answer.status >= http.client.BAD_REQUEST:
            raise error_from_dict(found or {"message": f"the controller answered {answer.status}"})
        return found

    def close(self) -> None:
        self._connection.close()


class _Named(http.client.HTTPSConnection):
    """A connection whose other end must show the certificate of the context's ``server_name``."""

    def __init__(self, context: Context, timeout_s: float) -> None:
        self._tls = ssl.create_default_context(cadata=context.ca_pem)
        self._server_name = context.server_name
        super().__init__(str(urlsplit(context.url).netloc), context=self._tls, timeout=timeout_s)

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._server_name)
