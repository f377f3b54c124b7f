"""The agent's API: HTTPS for the pool's controller alone (``emp.model.orders`` has the table), and a local socket.

The local one is for root on the node, whose socket's mode guards it: it works without any controller::

    GET  /v1/status                   -> {"node": NodeReport, "roles": [RoleStatus]}
    POST /v1/migrations/{id}/abort    AbortOrder -> RoleStatus
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Annotated

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from emp.agent.gate import Gate
from emp.agent.lending import Lending
from emp.agent.migrations import Migrations
from emp.agent.residents import Residents
from emp.agent.roles import Roles
from emp.model.errors import Unavailable
from emp.model.node import EvmReport, NodeReport
from emp.model.orders import (
    WATCH_ALIVE_S,
    AbortOrder,
    AddressMovedOrder,
    AnswerOrder,
    GoOnOrder,
    GoOrder,
    HandoverOrder,
    HoldOrder,
    LendOrder,
    Lent,
    LocalStatus,
    Prepared,
    PrepareOrder,
    Relayed,
    RetireOrder,
    RoleStatus,
    StartOrder,
    StopOrder,
    TakeBackOrder,
    VolumesOrder,
)
from emp.wire.faults import install_error_handlers
from emp.wire.guard import require_role
from emp.wire.identity import Role
from emp.wire.points import route_class
from emp.wire.sse import frame, kept_alive


def make_app(
    residents: Residents,
    roles: Roles,
    migrations: Migrations,
    lending: Lending,
    gate: Gate,
    report: Callable[[], NodeReport],
) -> FastAPI:
    app = FastAPI(title="EMP agent", docs_url=None, redoc_url=None)
    app.router.route_class = route_class("agent")
    install_error_handlers(app)
    controller = [Depends(require_role(Role.CONTROLLER))]
    orders = [*controller, Depends(gate.check)]
    adopted = [*controller, Depends(gate.check_adopted)]
    """of roles that are running: a quarantine does not disturb those, and shuts the journal behind them"""

    @app.get("/healthz")
    async def healthz() -> dict[str, str | None]:
        return {"status": "ok" if gate.closed is None else "waiting", "reason": gate.closed}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(_metrics(report()), media_type="text/plain; version=0.0.4")

    @app.get("/v1/node", dependencies=controller)
    async def node() -> NodeReport:
        return report()

    @app.post("/v1/evms/{name}/start", dependencies=orders)
    async def start(name: str, order: StartOrder) -> EvmReport:
        return await residents.start(order)

    @app.post("/v1/evms/{name}/stop", dependencies=orders)
    async def stop(name: str, order: StopOrder) -> EvmReport:
        return await residents.stop(name, order)

    @app.post("/v1/evms/{name}/retire", dependencies=[*controller, Depends(gate.check_retire)])
    async def retire(name: str, order: RetireOrder) -> EvmReport:
        return await migrations.retire(name, order)

    @app.post("/v1/evms/{name}/volumes", dependencies=orders)
    async def change_volumes(name: str, order: VolumesOrder) -> EvmReport:
        return await residents.change_volumes(name, order)

    @app.get("/v1/evms/{name}/console", dependencies=orders)
    async def console_output(name: str, backlog: Annotated[bool, Query()] = True) -> StreamingResponse:
        assembly = residents.get(name).assembly
        if assembly is None:
            raise Unavailable(f"EVM {name!r} has no machine now", field="evm")
        return StreamingResponse(assembly.console.output(backlog=backlog), media_type="application/octet-stream")

    @app.post("/v1/evms/{name}/console", dependencies=orders, status_code=204)
    async def console_input(name: str, request: Request) -> None:
        assembly = residents.get(name).assembly
        if assembly is not None:
            await assembly.console.type(await request.body())

    @app.post("/v1/migrations/{migration}/prepare", dependencies=orders)
    async def prepare(migration: str, order: PrepareOrder) -> Prepared:
        return await migrations.prepare(order)

    @app.post("/v1/migrations/{migration}/handover", dependencies=orders)
    async def hand_over(migration: str, order: HandoverOrder) -> RoleStatus:
        return await migrations.hand_over(order)

    @app.post("/v1/migrations/{migration}/abort", dependencies=adopted)
    async def abort(migration: str, order: AbortOrder) -> RoleStatus:
        return await migrations.abort(migration, order)

    @app.post("/v1/migrations/{migration}/go", dependencies=adopted)
    async def go(migration: str, order: GoOrder) -> RoleStatus:
        return await migrations.go(migration, order)

    @app.post("/v1/migrations/{migration}/answer", dependencies=adopted)
    async def answer(migration: str, order: AnswerOrder) -> RoleStatus:
        return await migrations.answer(migration, order)

    @app.post("/v1/migrations/{migration}/lend", dependencies=orders)
    async def lend(migration: str, order: LendOrder) -> Lent:
        return await lending.lend(order)

    @app.post("/v1/migrations/{migration}/take-back", dependencies=adopted, status_code=204)
    async def take_back(migration: str, order: TakeBackOrder) -> None:
        await lending.take_back(migration, order)

    @app.post("/v1/migrations/{migration}/hold", dependencies=adopted)
    async def hold(migration: str, order: HoldOrder) -> Relayed:
        return await lending.hold(migration, order)

    @app.post("/v1/migrations/{migration}/go-on", dependencies=adopted)
    async def go_on(migration: str, order: GoOnOrder) -> Relayed:
        return await lending.go_on(migration, order)

    @app.post("/v1/migrations/{migration}/address-moved", dependencies=adopted)
    async def address_moved(migration: str, order: AddressMovedOrder) -> RoleStatus:
        return migrations.address_moved(migration)

    @app.get("/v1/migrations/{migration}", dependencies=adopted)
    async def status(migration: str) -> RoleStatus:
        return roles.status(migration)

    @app.get("/v1/migrations/{migration}/watch", dependencies=adopted)
    async def watch(migration: str) -> StreamingResponse:
        roles.status(migration)  # unknown here: a 404 instead of a stream
        return StreamingResponse(watched(roles.watch(migration)), media_type="text/event-stream")

    return app


def make_local_app(roles: Roles, migrations: Migrations, gate: Gate, report: Callable[[], NodeReport]) -> FastAPI:
    app = FastAPI(title="EMP agent, local", docs_url=None, redoc_url=None)
    install_error_handlers(app)

    @app.get("/v1/status")
    async def status() -> LocalStatus:
        return LocalStatus(node=report(), roles=roles.statuses())

    @app.post("/v1/migrations/{migration}/abort", dependencies=[Depends(gate.check_adopted)])
    async def abort(migration: str, order: AbortOrder) -> RoleStatus:
        return await migrations.abort(migration, order)

    return app


def watched(snapshots: AsyncGenerator[RoleStatus]) -> AsyncGenerator[bytes]:
    """Each snapshot as an event; never silent for long, so that a node that is off is found out."""
    return kept_alive(_frames(snapshots), every_s=WATCH_ALIVE_S)


async def _frames(snapshots: AsyncGenerator[RoleStatus]) -> AsyncGenerator[bytes]:
    async with contextlib.aclosing(snapshots):
        async for snapshot in snapshots:
            yield frame(snapshot.model_dump_json(), event="status")


def _metrics(report: NodeReport) -> bytes:
    registry = CollectorRegistry()
    evms = Gauge("emp_node_evms", "EVMs on this node", ["state"], registry=registry)
    for evm in report.evms:
        evms.labels(evm.state).inc()
    Gauge("emp_node_memory_bytes", "Memory offered to EVMs", registry=registry).set(report.memory_bytes)
    Gauge("emp_node_memory_used_bytes", "Memory taken by EVMs", registry=registry).set(report.memory_used_bytes)
    return generate_latest(registry)
