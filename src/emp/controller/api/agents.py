"""What agents may ask: to be heard. Served on their own listener, behind mutual TLS."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from emp.controller import trust
from emp.controller.services import Services
from emp.model.errors import BadInput, Forbidden
from emp.model.node import NodeReport
from emp.model.orders import HeartbeatReply
from emp.wire.guard import require_role
from emp.wire.identity import Identity, Role
from emp.wire.points import route_class


def router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/agents", tags=["agents"], route_class=route_class("controller"))

    @router.post("/{node}/heartbeat")
    async def heartbeat(
        node: str, report: NodeReport, caller: Annotated[Identity, Depends(require_role(Role.AGENT))]
    ) -> HeartbeatReply:
        """Only the node's own certificate speaks for it."""
        if caller.name != node:
            raise Forbidden(f"{caller} does not speak for node {node[:63]}", hint="an agent reports for its own node")
        if report.name != node:
            raise BadInput(f"the report is of {report.name}, not of {node}", field="name")
        await services.nodes.heartbeat(report)
        known = services.nodes.find(node)
        return HeartbeatReply(
            interval_s=services.heartbeat_s,
            quarantine=trust.closed(known) if known else None,
            allowed=services.learnt.allowed(known) if known else {},
            elsewhere=services.nodes.elsewhere(known) if known else None,
        )

    return router
