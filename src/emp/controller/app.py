"""The two applications: one for people, behind a token, and one for agents, behind their certificates."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI

from emp.controller.api import agents, efs, evms, health, migrations, nodes, volumes, watch
from emp.controller.services import Services
from emp.wire.faults import install_error_handlers
from emp.wire.guard import require_token


def people_app(services: Services) -> FastAPI:
    """Everything but ``/healthz`` needs the bearer token."""
    app = _app("EMP controller", "Live migration of EVMs between the bare-metal nodes of a pool.")
    app.include_router(health.open_router(services))
    guarded = [Depends(require_token(services.token))]
    for module in (health, nodes, evms, migrations, volumes, efs, watch):
        app.include_router(module.router(services), dependencies=guarded)

    @app.get("/openapi.json", include_in_schema=False, dependencies=guarded)
    async def openapi() -> dict[str, Any]:
        return app.openapi()

    return app


def agents_app(services: Services) -> FastAPI:
    app = _app("EMP controller, for agents", "What agents tell the controller.")
    app.include_router(agents.router(services))
    return app


def _app(title: str, description: str) -> FastAPI:
    app = FastAPI(
        title=title, description=description, version=version("emp"), docs_url=None, redoc_url=None, openapi_url=None
    )
    install_error_handlers(app)
    return app
