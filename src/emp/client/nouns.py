"""What every noun of the client has in common: an order goes out first, and its answer's model is imported meanwhile.

Importing pydantic and the models takes as long as the controller's work on many an order. So nothing here imports them
at the top, and a model is named by a function.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from emp.client.transport import TIMEOUT_S, Call, Query, Transport
from emp.model.errors import BadInput, Internal, error_from_dict

if TYPE_CHECKING:
    from pydantic import BaseModel

    from emp.client.events import Event

M = TypeVar("M", bound="BaseModel")

_PART = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""the rule of ``emp.model.names``, which imports pydantic; asked only to say what is wrong"""

ORDER_S = 120.0
"""an order that starts or stops a machine is answered within 90 s, if only with ``OutcomeUnknown``"""


class Noun:
    """One kind of thing in the pool."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def ask(
        self,
        model: Callable[[], type[M]],
        method: str,
        path: str,
        body: BaseModel | Mapping[str, Any] | None = None,
        *,
        query: Query | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> M:
        """Send an order or a question and return its answer."""
        call = self.transport.send(method, path, _json(body), query=query, timeout_s=timeout_s)
        with call, _unbroken():
            wanted = model()
        return read(call, call.answer(), wanted)


@contextlib.contextmanager
def _unbroken() -> Iterator[None]:
    """Let Ctrl-C wait: an import that it broke would be begun again, and a C library such as decimal's complains."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read(call: Call, answer: bytes, model: type[M]) -> M:
    """Return an answer as its model, or raise what it means that it has another shape."""
    try:
        return model.model_validate_json(answer)
    except ValueError as error:  # pydantic's ValidationError is one
        raise call.unreadable(error) from error


def read_event(event: Event, model: type[M]) -> M:
    """Return an event's data as its model; raise the error that an event ``error`` holds."""
    if event.event == "error":
        raise error_from_dict(json.loads(event.data))
    try:
        return model.model_validate_json(event.data)
    except ValueError as error:
        text = f"the controller sent an event that this version cannot read: {error}"
        raise Internal(text, hint="do both ends run the same version of emp?") from error


def part(name: str, *, field: str) -> str:
    """Return a name that may stand in a path. Raises ``BadInput`` naming ``field``."""
    if _PART.fullmatch(name):
        return name
    from emp.model.names import check_name

    return check_name(name, field=field)


def without_none(**given: Any) -> dict[str, Any]:
    """Return the fields that were given; the controller knows the defaults of the others."""
    return {name: value for name, value in given.items() if value is not None}


def _json(body: BaseModel | Mapping[str, Any] | None) -> bytes | None:
    if body is None:
        return None
    if isinstance(body, Mapping):
        try:
            return json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise BadInput(f"this cannot be sent: {error}") from None
    return body.model_dump_json().encode()
