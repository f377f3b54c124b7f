"""Nodes: list, show, cordon, uncordon."""

from __future__ import annotations

from fastapi import APIRouter

from emp.controller.services import Services
from emp.model.api import Listing
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

    return router
