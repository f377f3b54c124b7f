"""Server-sent events: frames, keep-alive comments, and an error that comes too late for an HTTP status.

Format: HTML Living Standard, section 9.2 (server-sent events).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi.responses import StreamingResponse

from emp.controller.book import PUBLIC, Book
from emp.controller.hub import Snapshot
from emp.model.api import WatchEvent
from emp.model.errors import BadInput, EmpError
from emp.store.base import Event, EventKind

KEEP_ALIVE_S = 15.0
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def frame(data: str, *, id: int | None = None, event: str | None = None) -> bytes:  # noqa: A002
    """Return one event; ``data`` is JSON on one line."""
    lines = ([f"id: {id}"] if id is not None else []) + ([f"event: {event}"] if event else [])
    return "\n".join((*lines, f"data: {data}", "", "")).encode()


def event_stream(frames: AsyncGenerator[bytes]) -> StreamingResponse:
    """Return ``frames`` as an answer, with a comment where nothing happens for a while."""
    return StreamingResponse(_kept_alive(frames), media_type="text/event-stream", headers=HEADERS)


async def _kept_alive(frames: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    coming: asyncio.Task[bytes] | None = None
    yield b": connected\n\n"  # the headers go out now, not with the first event
    try:
        while True:
            coming = coming or asyncio.create_task(_next(frames), name="next event")
            done, _ = await asyncio.wait([coming], timeout=KEEP_ALIVE_S)
            if not done:
                yield b": keep-alive\n\n"
                continue
            try:
                data = coming.result()
            except StopAsyncIteration:
                return
            except EmpError as error:
                yield frame(json.dumps(error.as_dict()), event="error")
                return
            finally:
                coming = None
            yield data
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait([coming])
        await frames.aclose()


async def _next(frames: AsyncIterator[bytes]) -> bytes:
    return await anext(frames)


async def migration_frames(snapshots: AsyncGenerator[Snapshot]) -> AsyncGenerator[bytes]:
    try:
        async for snapshot in snapshots:
            yield frame(snapshot.migration.model_dump_json(), id=snapshot.revision, event="migration")
    finally:
        await snapshots.aclose()


# ------------------------------------------------------------------ records


def check_prefix(prefix: str) -> str:
    """Return a prefix, or a single key, that people may watch. Raises ``BadInput``."""
    if not prefix.startswith(PUBLIC):
        shown = prefix if len(prefix) <= 60 else prefix[:57] + "..."
        raise BadInput(f"{shown!r} cannot be watched", field="prefix", hint=f"one of {', '.join(PUBLIC)}")
    return prefix


async def record_frames(book: Book, prefix: str, after: int) -> AsyncGenerator[bytes]:
    """Yield every change of a record below ``prefix`` in the revisions after ``after``, for ever."""
    async with book.store.watch(prefix, after) as watch:
        async for event in watch:
            shown = _shown(event)
            yield frame(shown.model_dump_json(), id=event.revision if event.last else None, event=shown.kind)


def _shown(event: Event) -> WatchEvent:
    return WatchEvent(
        kind="put" if event.kind is EventKind.PUT else "delete",
        key=event.kv.key,
        revision=event.revision,
        last=event.last,
        value=json.loads(event.kv.value) if event.kind is EventKind.PUT else None,
    )


def resume_point(given: int | None, last_event_id: str | None) -> int | None:
    """Return the revision to go on after: the header that a reconnecting client sends wins. Raises ``BadInput``."""
    if not last_event_id:
        return given
    if not last_event_id.isascii() or not last_event_id.isdigit():
        raise BadInput(
            f"{last_event_id[:40]!r} is no revision", field="Last-Event-ID", hint="send back the id of an event"
        )
    return int(last_event_id)
