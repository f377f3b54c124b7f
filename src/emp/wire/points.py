"""Fault points of an API: ``DAEMON.ROUTE.received`` and ``DAEMON.ROUTE.answered`` round every route.

``dup`` at ``received`` delivers the order twice, ``drop`` loses it; ``drop`` at ``answered`` loses the reply of an
order that was carried out. A lost one is a connection that ends without an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from emp import faults

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class PointRoute(APIRoute):
    """A route with its points; ``route_class`` gives it the daemon's name."""


def route_class(daemon: str) -> type[PointRoute]:
    """Return what a daemon's router makes its routes of."""

    class Route(PointRoute):
        def get_route_handler(self) -> Handler:
            return with_points(f"{daemon}.{self.name}", super().get_route_handler())

    return Route


def with_points(name: str, handle: Handler) -> Handler:
    """Return ``handle`` between the points ``NAME.received`` and ``NAME.answered``."""

    async def handler(request: Request) -> Response:
        board = faults.board
        if board is None:
            return await handle(request)
        answer: Response = _Lost()
        for _ in range(await board.reach(f"{name}.received")):
            answer = await handle(request)
        return answer if await board.reach(f"{name}.answered") else _Lost()

    return handler


class _Lost(Response):
    """Begins and never ends: the server closes the connection, and the caller cannot know what came of its order."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
