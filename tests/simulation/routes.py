"""Serves the daemons' real routes without HTTP: stands in for FastAPI where an app is built, and calls endpoints."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

from fastapi.params import Depends

from emp.model.base import Model
from emp.model.errors import EmpError, Internal, NotFound
from emp.wire.guard import PEER
from emp.wire.identity import Identity


@dataclass(frozen=True)
class Route:
    method: str
    pattern: re.Pattern[str]
    endpoint: Callable[..., Any]
    dependencies: tuple[Depends, ...]


@functools.cache
def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path))


class RouteTable:
    """In place of ``FastAPI`` and ``APIRouter``."""

    def __init__(self, *, prefix: str = "", dependencies: Sequence[Depends] = (), **_: Any) -> None:
        self._prefix = prefix
        self._dependencies = tuple(dependencies)
        self.routes: list[Route] = []
        self.router = SimpleNamespace()

    def _add(self, method: str, path: str, dependencies: Sequence[Depends] = (), **_: Any) -> Callable[[Any], Any]:
        def add(endpoint: Callable[..., Any]) -> Callable[..., Any]:
            needed = (*self._dependencies, *dependencies)
            self.routes.append(Route(method, _pattern(self._prefix + path), endpoint, needed))
            return endpoint

        return add

    get = functools.partialmethod(_add, "GET")
    post = functools.partialmethod(_add, "POST")
    put = functools.partialmethod(_add, "PUT")
    delete = functools.partialmethod(_add, "DELETE")

    def include_router(self, router: RouteTable, dependencies: Sequence[Depends] = (), **_: Any) -> None:
        for route in router.routes:
            self.routes.append(Route(route.method, route.pattern, route.endpoint, (*dependencies, *route.dependencies)))

    def add_exception_handler(self, *_: Any) -> None:
        pass

    async def call(self, method: str, path: str, body: Any, caller: Identity) -> Any:
        """Return what the endpoint returns, or raise the ``EmpError`` that a client would see."""
        for route in self.routes:
            if route.method == method and (match := route.pattern.fullmatch(path)):
                return await _call(route, match.groupdict(), body, caller)
        raise NotFound(f"{method} {path}: Not Found")


_by_code: dict[Any, dict[str, Any]] = {}


async def _call(route: Route, found: dict[str, str], body: Any, caller: Identity) -> Any:
    connection = SimpleNamespace(scope={PEER: caller})
    for dependency in route.dependencies:
        await _depend(dependency, connection)
    hints = _by_code.get(route.endpoint.__code__)
    if hints is None:
        hints = _by_code[route.endpoint.__code__] = get_type_hints(route.endpoint, include_extras=True)
    arguments: dict[str, Any] = {}
    for name in inspect.signature(route.endpoint).parameters:
        hint = hints[name]
        kind, extras = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is not None else (hint, ())
        depends = next((extra for extra in extras if isinstance(extra, Depends)), None)
        if depends is not None:
            arguments[name] = await _depend(depends, connection)
        elif name in found:
            arguments[name] = int(found[name]) if kind is int else found[name]
        elif isinstance(kind, type) and issubclass(kind, Model):
            arguments[name] = body
    result = route.endpoint(**arguments)
    return await result if inspect.isawaitable(result) else result


async def _depend(dependency: Depends, connection: Any) -> Any:
    call = dependency.dependency
    assert call is not None
    takes = len(inspect.signature(call).parameters)
    result = call(connection) if takes else call()
    return await result if inspect.isawaitable(result) else result


async def events_of(response: Any) -> AsyncGenerator[str]:
    """Yield the data of each server-sent event of a streaming answer."""
    async for chunk in response.body_iterator:
        if not chunk.startswith(b":"):
            yield chunk.decode().partition("data: ")[2].strip()


def as_client_sees(error: Exception) -> EmpError:
    return error if isinstance(error, EmpError) else Internal(f"an error that nobody foresaw: {error!r}")
