"""Nodes: list, show, cordon, uncordon, fence, readmit."""

from __future__ import annotations

from fastapi import APIRouter

from emp.controller.services import Services
from emp.model.api import FenceRequest, Listing, ReadmitRequest
from emp.model.node import Node


def router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/nodes", tags=["nodes"])

    @router.get("")
    async def list_nodes() -> Listing[Node]:
        return Listing[Node](items=tuple(services.nodes.all()), revision=services.book.revision)

    @router.get("/{name}")
    async def show_node(name: str) -> Node:
        return services.nodes.get(name)

    @router.post("/{name}/cordon")
    async def cordon_node(name: str) -> Node:
        """The node takes no new EVM, by placement or by request. What runs there goes on."""
        return await services.nodes.cordon(name, cordoned=True)

    @router.post("/{name}/uncordon")
    async def uncordon_node(name: str) -> Node:
        return await services.nodes.cordon(name, cordoned=False)

    @router.post("/{name}/fence")
    async def fence_node(name: str, request: FenceRequest | None = None) -> Node:
        """Proves the node off, so that its EVMs may be started elsewhere; lifted by itself once the node is back and
        has given them up. Without ``confirm`` it says what it would do."""
        asked = request or FenceRequest()
        return await services.fences.fence(name, confirm=asked.confirm, reason=asked.reason)

    @router.post("/{name}/readmit")
    async def readmit_node(name: str, request: ReadmitRequest | None = None) -> Node:
        """Takes the journal that a quarantined node has now for its own; without ``confirm`` says what that means."""
        return await services.fences.readmit(name, confirm=(request or ReadmitRequest()).confirm)

    return router
