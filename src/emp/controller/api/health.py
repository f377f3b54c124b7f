"""Is the controller there, and how does the pool do? For probes and for Prometheus."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from emp.controller.services import Services
from emp.model.api import Health


def open_router(services: Services) -> APIRouter:
    """What needs no token."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def healthz() -> Health:
        """Answers 503 when the store cannot be read."""
        revision = (await services.book.store.range("/nodes/", limit=1)).revision
        return Health(
            pool=services.pool,
            version=version("emp"),
            revision=revision,
            nodes=len(services.nodes.all()),
            nodes_ready=len(services.nodes.ready()),
        )

    return router


def router(services: Services) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(services.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
