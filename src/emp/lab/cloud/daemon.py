"""The simulated cloud as a daemon: the EC2 API, its data plane, and what a node's agent may ask.

=====================  ====================  ==========================================================
``POST /``             the access key        the EC2 query API
``GET /devices``       an agent              [``Device``]: what is attached to that agent's node
``GET|PUT /knobs``     the controller        ``emp.lab.cloud.knobs.Knobs``
``GET /healthz``       any daemon            ``{"status": "ok"}``
``GET /metrics``       any daemon            volumes, exports, requests
=====================  ====================  ==========================================================
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from emp.lab.cloud import efs_service
from emp.lab.cloud.cloud import Cloud
from emp.lab.cloud.config import CloudConfig
from emp.lab.cloud.dataplane import ExportPlane, OwnersLog
from emp.lab.cloud.fabric import Fabric, Port
from emp.lab.cloud.face import Face, make_app
from emp.lab.cloud.knobs import Shown
from emp.lab.cloud.memory import MemoryFile
from emp.model.errors import NotFound
from emp.volumes.devices import PATH, Device
from emp.volumes.server.app import health
from emp.volumes.server.service import VolumeService
from emp.wire.guard import require_role
from emp.wire.identity import Identity, Role
from emp.wire.pki import Credentials
from emp.wire.serve import Listener, Server
from emp.wire.sockets import listen
from emp.wire.tls import public_server

MEMORY = "cloud.json"


@asynccontextmanager
async def serving(config: CloudConfig) -> AsyncIterator[Face]:
    """Serve for the length of the block: what was attached is served again, what was under way goes on."""
    credentials = Credentials.load(config.credentials, of_pool=config.pool)
    vpc = efs_service.network(config)
    cloud = Cloud(
        efs_service.instances(config),
        clock=time.monotonic,
        began=datetime.now(UTC),
        knobs=config.knobs,
        vpc=vpc,
    )
    instances = {name: node.instance for name, node in config.nodes.items()}
    log = OwnersLog(config.state_dir, instances, cloud.shown)
    service = VolumeService(config, credentials, epochs=log)
    plane = ExportPlane(service, instances, log)
    memory = MemoryFile(config.state_dir / MEMORY)
    fabric = _fabric(config)
    face = Face(
        cloud,
        plane,
        access_keys={config.access_key},
        keep=lambda: memory.write(cloud.memory()),
        network_plane=fabric,
    )
    efs = efs_service.EfsService(config, vpc, knobs=lambda: cloud.knobs) if config.efs else None
    try:
        await service.start()
        if before := memory.read():
            cloud.recall(before)
            if efs is not None:
                efs.face.turn(cloud.knobs)
            for volume in filter(None, map(cloud.shown, cloud.volumes)):
                log.recall(volume)
        routers = [_devices(cloud, plane, instances), health(_Figures(face, service))]
        app = make_app(face, routers, [efs.face] if efs else [])
        with listen(config.address, config.port, field="port") as socket:
            async with Server(app, [Listener(socket, public_server(config.credentials))], pool=config.pool):
                yield face
    finally:
        if efs is not None:
            await efs.close()
        await service.stop()


def _fabric(config: CloudConfig) -> Fabric | None:
    if config.fabric_fd is None:
        return None
    ports = {n.instance: Port(n.segment, n.address, n.ipv6) for n in config.nodes.values() if n.segment and n.address}
    return Fabric(config.fabric_fd, ports)


def _devices(cloud: Cloud, plane: ExportPlane, instances: dict[str, str]) -> APIRouter:
    router = APIRouter()

    @router.get(PATH)
    async def devices(caller: Annotated[Identity, Depends(require_role(Role.AGENT))]) -> list[Device]:
        return list(seen_by(caller.name))

    def seen_by(node: str) -> Iterator[Device]:
        if node not in instances:
            raise NotFound(f"{node} is no instance of this cloud", field="node")
        for showing in cloud.devices_of(instances[node]):
            with contextlib.suppress(NotFound):  # its export has just been closed
                yield plane.device(showing, node, cloud.knobs.shown.get(showing.volume, Shown()))

    return router


class _Figures(Collector):
    def __init__(self, face: Face, service: VolumeService) -> None:
        self._face = face
        self._service = service

    def collect(self) -> Iterable[Metric]:
        counts = self._service.counts()
        yield GaugeMetricFamily("emp_cloud_volumes", "Volumes that exist", len(self._face.cloud.volumes))
        yield GaugeMetricFamily("emp_cloud_exports", "Attachments that are served", counts.attachments)
        yield CounterMetricFamily("emp_cloud_export_restarts", "Exports restarted after a crash", counts.restarts)
        requests = CounterMetricFamily("emp_cloud_requests", "Requests of the EC2 API", labels=["action"])
        for action, number in sorted(self._face.requests.items()):
            requests.add_metric([action], number)
        yield requests
