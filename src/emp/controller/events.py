"""The controller's streams of server-sent events: migrations, and the records that people may watch."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

from fastapi.responses import StreamingResponse

from emp.controller.book import PUBLIC, Book
from emp.controller.hub import Snapshot
from emp.model.api import WatchEvent
from emp.model.errors import BadInput
from emp.store.base import Event, EventKind
from emp.wire.sse import frame, kept_alive

KEEP_ALIVE_S = 15.0
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event_stream(frames: AsyncGenerator[bytes]) -> StreamingResponse:
    """Return ``frames`` as an answer, with a comment where nothing happens for a while."""
    return StreamingResponse(kept_alive(frames, every_s=KEEP_ALIVE_S), media_type="text/event-stream", headers=HEADERS)


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
