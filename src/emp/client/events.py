"""Server-sent events, over breaks of the connection: what was missed comes after it, and the user hears of the break.

Format: HTML Living Standard, section 9.2.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from emp.client.transport import Query, Transport
from emp.model.errors import EmpError, Unavailable

QUIET_S = 40.0
"""a stream without even a keep-alive comment (one each 15 s) for so long is dead"""
PATIENCE_S = 120.0
"""how long a controller that has gone is waited for"""
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0

OnBreak = Callable[[EmpError | None], None]
"""is told of a break, once, and with None of its end"""


class Event(NamedTuple):
    """``data`` is JSON; ``id`` is empty where the event has none of its own."""

    id: str
    event: str
    data: str


def parse(pieces: Iterable[bytes]) -> Iterator[Event]:
    """Yield the events in a stream of bytes, cut anywhere. An event that is not complete at the end is dropped."""
    rest = b""
    fields: dict[str, str] = {}
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            text = line.rstrip(b"\r").decode()
            if text:
                name, _, value = text.partition(":")
                value = value.removeprefix(" ")
                fields[name] = f"{fields['data']}\n{value}" if name == "data" and "data" in fields else value
                continue
            if "data" in fields:
                yield Event(fields.get("id", ""), fields.get("event", "message"), fields["data"])
            fields = {}


def follow(
    transport: Transport,
    path: str,
    *,
    query: Query | None = None,
    last_event_id: str = "",
    patience_s: float = PATIENCE_S,
    on_break: OnBreak | None = None,
) -> Iterator[Event]:
    """Yield events for ever; after a break go on behind the last one seen.

    :raises Unavailable: after ``patience_s`` seconds without a connection
    """
    broken_at: float | None = None
    delay_s = FIRST_DELAY_S
    while True:
        loss: EmpError = Unavailable(f"{transport.shown} ended the stream {path}")
        try:
            for event in _connect(transport, path, query, last_event_id):
                if event is None:
                    if broken_at is not None and on_break is not None:
                        on_break(None)
                    broken_at = None
                    continue
                delay_s = FIRST_DELAY_S
                last_event_id = event.id or last_event_id
                yield event
        except Unavailable as error:
            loss = error
        now = time.monotonic()
        if broken_at is None:
            broken_at = now
            if on_break is not None and patience_s > 0:
                on_break(loss)
        if now - broken_at >= patience_s:
            raise loss
        time.sleep(delay_s)
        delay_s = min(2 * delay_s, LONGEST_DELAY_S)


def _connect(transport: Transport, path: str, query: Query | None, last_event_id: str) -> Iterator[Event | None]:
    """Yield None once connected, then events to the end of the connection."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    pieces = transport.send("GET", path, query=query, headers=headers, timeout_s=QUIET_S).stream()
    yield None
    yield from parse(pieces)
