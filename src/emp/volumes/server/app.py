"""The volume service over HTTPS. The controller orders; an agent may claim for its own node; every daemon may ask how
it is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Path, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emp.model.errors import Forbidden
from emp.model.names import Name
from emp.model.volume import Attachment, Volume
from emp.volumes.server.protocol import PREFIX, VOLUME_ID, Claim, CreateVolume, Fence, Resize
from emp.volumes.server.service import VolumeService
from emp.wire.faults import install_error_handlers
from emp.wire.guard import require_role
from emp.wire.identity import Identity, Role
from emp.wire.points import route_class

VolumeId = Annotated[str, Path(pattern=VOLUME_ID)]
Epoch = Annotated[int, Path(ge=1)]


def make_app(service: VolumeService) -> FastAPI:
    """Return the app; its lifespan starts and stops ``service``."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await service.start()
            yield
        finally:
            await service.stop()

    app = FastAPI(title="EMP volume service", lifespan=lifespan)
    install_error_handlers(app)
    app.include_router(_orders(service))
    app.include_router(_claims(service))
    app.include_router(health(_Figures(service)))
    return app


def _orders(service: VolumeService) -> APIRouter:
    router = APIRouter(
        prefix=PREFIX, dependencies=[Depends(require_role(Role.CONTROLLER))], route_class=route_class("volumes")
    )

    @router.get("")
    async def list_volumes() -> list[Volume]:
        return list(service.list())

    @router.get("/{volume}")
    async def describe(volume: VolumeId) -> Volume:
        return service.describe(volume)

    @router.put("/{volume}")
    async def create(volume: VolumeId, order: CreateVolume) -> Volume:
        return await service.create(volume, order)

    @router.put("/{volume}/size")
    async def resize(volume: VolumeId, order: Resize) -> Volume:
        return await service.resize(volume, order.size_bytes)

    @router.delete("/{volume}", status_code=204)
    async def delete(volume: VolumeId) -> None:
        await service.delete(volume)

    @router.put("/{volume}/attachments/{node}/{epoch}")
    async def attach(volume: VolumeId, node: Name, epoch: Epoch) -> Attachment:
        return await service.attach(volume, node=node, epoch=epoch)

    @router.delete("/{volume}/attachments/{node}/{epoch}", status_code=204)
    async def detach(volume: VolumeId, node: Name, epoch: Epoch) -> None:
        await service.detach(volume, node=node, epoch=epoch)

    @router.put("/{volume}/fence", status_code=204)
    async def fence(volume: VolumeId, order: Fence) -> None:
        await service.fence(volume, epoch=order.epoch)

    return router


def _claims(service: VolumeService) -> APIRouter:
    router = APIRouter(prefix=PREFIX, route_class=route_class("volumes"))

    @router.put("/{volume}/claim")
    async def claim(
        volume: VolumeId,
        order: Claim,
        caller: Annotated[Identity, Depends(require_role(Role.AGENT, Role.CONTROLLER))],
    ) -> Attachment:
        node = order.node or caller.name
        if caller.role is Role.AGENT and caller.name != node:
            raise Forbidden(f"{caller} does not claim for node {node}", hint="an agent claims for its own node")
        return await service.claim(volume, node=node, epoch=order.epoch)

    return router


def health(figures: Collector) -> APIRouter:
    """Return the routes by which every daemon may ask how the service is, ``figures`` among its metrics."""
    router = APIRouter(dependencies=[Depends(require_role(*Role))])
    registry = CollectorRegistry()
    registry.register(figures)

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    return router


class _Figures(Collector):
    def __init__(self, service: VolumeService) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        counts = self._service.counts()
        yield GaugeMetricFamily("emp_volumes", "Volumes that exist", counts.volumes)
        yield GaugeMetricFamily("emp_volume_attachments", "Attachments that are served", counts.attachments)
        yield CounterMetricFamily("emp_volume_export_restarts", "Exports restarted after a crash", counts.restarts)
