"""Server-sent events: frames, keep-alive comments, and an error that comes too late for an HTTP status.

Format: HTML Living Standard, section 9.2 (server-sent events).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

from emp.model.errors import EmpError


def frame(data: str, *, id: int | None = None, event: str | None = None) -> bytes:  # noqa: A002
    """Return one event; ``data`` is JSON on one line."""
    lines = ([f"id: {id}"] if id is not None else []) + ([f"event: {event}"] if event else [])
    return "\n".join((*lines, f"data: {data}", "", "")).encode()


async def kept_alive(frames: AsyncGenerator[bytes], *, every_s: float) -> AsyncGenerator[bytes]:
    """Yield the frames, and a comment where none comes for ``every_s``; an ``EmpError`` becomes the last event."""
    coming: asyncio.Task[bytes] | None = None
    yield b": connected\n\n"  # the headers go out now, not with the first event
    try:
        while True:
            coming = coming or asyncio.create_task(_next(frames), name="next event")
            done, _ = await asyncio.wait([coming], timeout=every_s)
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


async def _next(frames: AsyncGenerator[bytes]) -> bytes:
    return await anext(frames)
