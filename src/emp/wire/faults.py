"""Errors as bodies: whatever goes wrong in a route, the answer has the one shape of ``EmpError.as_dict()``.

Input that does not validate is 422 with the field, the reason and what to do. An unforeseen exception is 500
``internal`` with a reference that is also in the log, and nothing of its inside is shown.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from emp.model.errors import BadInput, EmpError, Forbidden, Internal, NotFound, Unauthenticated, Unavailable

log = logging.getLogger(__name__)

LOGGED = "emp.logged"
"""set in the ASGI scope once an exception of this request is in the log"""

_BY_STATUS: dict[int, type[EmpError]] = {401: Unauthenticated, 403: Forbidden, 404: NotFound, 503: Unavailable}
_HINTS = {
    "missing": "add it",
    "extra_forbidden": "remove it, or check its spelling",
    "json_invalid": "send JSON, with Content-Type: application/json",
}


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of ``app`` an ``EmpError`` body. Call it once, when the app is built."""
    app.add_exception_handler(EmpError, _emp_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)


def error_response(error: EmpError, *, status: int | None = None) -> JSONResponse:
    """Return ``error`` as an HTTP answer."""
    headers = {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthenticated) else None
    return JSONResponse(error.as_dict(), status_code=status or error.http_status, headers=headers)


def field_name(location: Sequence[int | str]) -> str | None:
    """Return a place in a request as people write it: ``("body", "volumes", 0, "size")`` is ``volumes[0].size``."""
    text = ""
    for part in location[1:]:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or None


def validation_error(problems: Sequence[Mapping[str, Any]]) -> BadInput:
    """Return pydantic's list of problems as one error: the first in full, all of them in ``details["problems"]``."""
    listed = []
    for problem in problems:
        is_syntax = problem["type"] == "json_invalid"
        field = None if is_syntax else field_name(problem["loc"])
        reason = str(problem["msg"]).removeprefix("Value error, ")
        if is_syntax:
            reason = f"the body is not JSON: {problem.get('ctx', {}).get('error', reason)}"
        listed.append({"field": field, "reason": reason, "hint": _HINTS.get(problem["type"])})
    first = listed[0]
    return BadInput(str(first["reason"]), field=first["field"], hint=first["hint"], problems=listed)


async def _emp_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, EmpError)
    return error_response(error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors()))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer what the framework itself refuses: an unknown path, a wrong method, an unreadable body."""
    assert isinstance(error, HTTPException)
    kind = _BY_STATUS.get(error.status_code, BadInput if error.status_code < 500 else Internal)
    message = f"{request.method} {request.url.path}: {error.detail}"
    answer = error_response(kind(message), status=error.status_code)
    answer.headers.update(error.headers or {})
    return answer


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    reference = secrets.token_hex(4)
    log.error("%s %s failed, reference %s", request.method, request.url.path, reference, exc_info=error)
    request.scope[LOGGED] = True
    hint = f"look for {reference} in the log of the daemon that answered"
    return error_response(Internal("an error that nobody foresaw", hint=hint, reference=reference))
