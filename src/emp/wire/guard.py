"""Who may call a route: FastAPI dependencies on the peer's certificate and on the bearer token.

The identity comes from the verified certificate alone, never from a header or a body.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection

from emp.model.errors import Forbidden, Unauthenticated
from emp.wire.identity import Identity, Role
from emp.wire.secret import Secret

PEER = "emp.peer"
"""key of the peer's ``Identity`` (or None) in the ASGI scope"""

_bearer = HTTPBearer(auto_error=False, description="the token that the controller wrote for people")


def peer(connection: HTTPConnection) -> Identity | None:
    """Return the identity of the caller's certificate; None when it showed none."""
    identity = connection.scope.get(PEER)
    return identity if isinstance(identity, Identity) else None


def require_role(*roles: Role) -> Callable[[HTTPConnection], Identity]:
    """Return a dependency that yields the caller's ``Identity``: 401 without a certificate, 403 with another role."""

    def check(connection: HTTPConnection) -> Identity:
        caller = peer(connection)
        if caller is None:
            raise Unauthenticated("this needs a certificate of the pool", hint=f"one of the role {' or '.join(roles)}")
        if caller.role not in roles:
            raise Forbidden(f"{caller} may not do this", hint=f"only the role {' or '.join(roles)} may")
        return caller

    return check


Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def require_token(token: Secret) -> Callable[[HTTPAuthorizationCredentials | None], None]:
    """Return a dependency that lets through who knows ``token`` (``Authorization: Bearer ...``), 401 otherwise."""

    def check(given: Bearer) -> None:
        if given is None:
            raise Unauthenticated("a bearer token is needed", hint="send the header: Authorization: Bearer TOKEN")
        if not token.matches(given.credentials):
            raise Unauthenticated("the bearer token is wrong", hint="take the one that belongs to this pool's context")

    return check
