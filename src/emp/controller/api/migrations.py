"""Migrations: begin, list, show, follow, abort."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Response, status
from fastapi.responses import StreamingResponse

from emp.controller.events import event_stream, migration_frames, resume_point
from emp.controller.services import Services
from emp.model.api import AbortRequest, Listing
from emp.model.migration import Migration, MigrationRequest


def router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["migrations"])
    migrations = services.migrations

    @router.post("/evms/{name}/migrations", status_code=status.HTTP_201_CREATED)
    async def begin_migration(name: str, response: Response, request: MigrationRequest | None = None) -> Migration:
        """Answers once the plan is on disk; a dry run answers 200 with the plan and its checks, and does nothing."""
        migration = await migrations.begin(name, request or MigrationRequest())
        if migration.dry_run:
            response.status_code = status.HTTP_200_OK
        return migration

    @router.get("/migrations")
    async def list_migrations(evm: str | None = None) -> Listing[Migration]:
        return Listing[Migration](items=tuple(migrations.all(evm=evm)), revision=services.book.revision)

    @router.get("/migrations/{id}")
    async def show_migration(id: str) -> Migration:  # noqa: A002
        return migrations.get(id)

    @router.get("/migrations/{id}/events", response_class=StreamingResponse)
    async def follow_migration(
        id: str,  # noqa: A002
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> StreamingResponse:
        """Snapshots, about five a second, until the one that is closed; with ``Last-Event-ID`` every stage since."""
        migrations.get(id)
        after = resume_point(None, last_event_id)
        return event_stream(migration_frames(migrations.follow(id, after=after)))

    @router.post("/migrations/{id}/abort")
    async def abort_migration(id: str, request: AbortRequest | None = None) -> Migration:  # noqa: A002
        """Asks for the way back and answers at once; follow the migration to see the EVM back on its source."""
        return await migrations.abort(id, (request or AbortRequest()).reason)

    return router
