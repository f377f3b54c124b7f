"""The daemons' side of HTTPS in the pool as clients of each other.

``WireClient`` raises ``Unreachable`` (never sent), ``OutcomeUnknown`` (an order sent, not answered), ``Unavailable`` (a
question not answered) or the typed error in the server's body. People's tools have a leaner transport of their own
(``emp.client``), because they pay for its import at every start.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import httpx2

from emp.model.errors import EmpError, Unavailable
from emp.wire.exchange import FAILURES, Event, Exchange, Query, Target
from emp.wire.identity import Identity
from emp.wire.secret import Secret

T = TypeVar("T")

TIMEOUT_S = 10.0
CONNECT_S = 3.0
QUIET_S = 40.0
"""an event stream without even a keep-alive comment (one each 15 s) for so long is dead"""


class WireClient:
    """An HTTPS client of one daemon. ``server`` is who must answer, whatever the URL's host is.

    ``async with WireClient("https://10.0.0.5:7443", tls=mutual_client(dir), server=Identity(Role.AGENT, "n1")) as c:``
    """

    def __init__(
        self,
        base_url: str,
        *,
        tls: ssl.SSLContext,
        server: Identity | None,
        token: Secret | None = None,
        timeout_s: float = TIMEOUT_S,
        connect_s: float = CONNECT_S,
    ) -> None:
        self._target = Target(base_url, tls=tls, server=server, token=token, timeout_s=timeout_s, connect_s=connect_s)
        self._client = httpx2.AsyncClient(**self._target.options)

    @overload
    async def request(
        self, method: str, path: str, body: Any = ..., *, response_model: type[T], query: Query | None = ...,
        idempotent: bool | None = ..., timeout_s: float | None = ...,
    ) -> T: ...  # fmt: skip
    @overload
    async def request(
        self, method: str, path: str, body: Any = ..., *, response_model: None = ..., query: Query | None = ...,
        idempotent: bool | None = ..., timeout_s: float | None = ...,
    ) -> Any: ...  # fmt: skip
    async def request(
        self, method: str, path: str, body: Any = None, *, response_model: Any = None, query: Query | None = None,
        idempotent: bool | None = None, timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        """Send ``body`` (a model, a dict, a list, None) and return the answer as ``response_model``, or as plain JSON.

        ``idempotent`` says that asking twice is the same as once; by default only GET and HEAD are. ``timeout_s``
        bounds the whole call.
        """
        exchange = Exchange(self._target, method, path, idempotent=idempotent, timeout_s=timeout_s)
        request = self._client.build_request(**exchange.parameters(body, query, trace=exchange.atrace, read_s=None))
        try:
            async with asyncio.timeout(exchange.timeout_s):
                response = await self._client.send(request)
        except FAILURES as error:
            raise exchange.failure(error) from error
        return exchange.result(response, response_model)

    async def events(
        self,
        path: str,
        *,
        query: Query | None = None,
        last_event_id: str = "",
        reconnect_s: float = 0.0,
        quiet_s: float = QUIET_S,
    ) -> AsyncGenerator[Event]:
        """Yield the events of a stream, from after ``last_event_id`` on; after ``quiet_s`` of silence it is broken.

        When it ends or breaks: without ``reconnect_s`` the iteration ends, or raises; with it, it goes on behind the
        last event seen, and raises after so many seconds without a connection; the server's 204 ends it. Leave it early
        under ``contextlib.aclosing``.
        """
        retry = _Retry(reconnect_s)
        while True:
            exchange = Exchange(self._target, "GET", path, idempotent=True, timeout_s=None)
            parameters = _stream(exchange.parameters(None, query, trace=exchange.atrace, read_s=quiet_s), last_event_id)
            loss: EmpError | None = None
            try:
                async with self._client.stream(**parameters) as response:
                    if response.status_code != httpx2.codes.OK:
                        await response.aread()
                        if response.status_code == httpx2.codes.NO_CONTENT:
                            return
                        raise exchange.error(response)
                    retry.connected()
                    async for sse in httpx2.EventSource(response):
                        last_event_id = sse.id or last_event_id
                        retry.alive()
                        yield Event(sse.id, sse.event, sse.data)
            except FAILURES as error:
                loss = exchange.failure(error)
            except Unavailable as error:
                loss = error
            delay_s = retry.delay_after(loss)
            if delay_s is None:
                return
            await asyncio.sleep(delay_s)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _stream(parameters: dict[str, Any], last_event_id: str) -> dict[str, Any]:
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    return parameters | {"headers": headers}


class _Retry:
    """Decides after a broken stream: go on after a pause that doubles, or give up."""

    FIRST_S = 0.1
    LONGEST_S = 2.0

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._delay_s = self.FIRST_S
        self._lost_at: float | None = None

    def connected(self) -> None:
        self._lost_at = None

    def alive(self) -> None:
        self._delay_s = self.FIRST_S

    def delay_after(self, loss: EmpError | None) -> float | None:
        """Return the pause in seconds; None at a clean end that is to be the end; raise ``loss`` without patience."""
        now = time.monotonic()
        self._lost_at = self._lost_at or now
        if now - self._lost_at >= self._patience_s:
            if loss is not None:
                raise loss
            if not self._patience_s:
                return None
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, self.LONGEST_S)
        return delay_s
