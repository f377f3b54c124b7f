"""Every change of the pool's records, from any revision that the store remembers."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from emp.controller.events import check_prefix, event_stream, record_frames, resume_point
from emp.controller.services import Services


def router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["watch"])

    @router.get("/watch", response_class=StreamingResponse)
    async def watch(
        prefix: str,
        after: Annotated[int | None, Query(alias="from", ge=0)] = None,
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> StreamingResponse:
        """``prefix`` such as ``/evms/`` or ``/evms/web``; ``from``: the revision of a list, else from now on.

        A revision that is forgotten, or that this store never had, gives one event ``error`` with the error's body.
        """
        start = resume_point(after, last_event_id)
        if start is None:
            start = (await services.book.store.range(check_prefix(prefix), limit=1)).revision
        return event_stream(record_frames(services.book, check_prefix(prefix), start))

    return router
