"""EFS's protocol in both directions (REST with JSON), driven by botocore's own model of the service.

Members of a request are in the path, in the query or in the body, as the model says. What the model does not have is
BadRequest on the way in and a defect of the simulator on the way out, as is an error that an action does not have.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any
from urllib.parse import unquote

from botocore.loaders import Loader
from botocore.model import ServiceModel

from emp.lab.cloud.errors import CloudError

PREFIX = "/2015-02-01"
COMMON = {"AccessDeniedException": 403, "ThrottlingException": 429, "UnrecognizedClientException": 403}
"""of every service, so not in the model of each: https://docs.aws.amazon.com/efs/latest/ug/CommonErrors.html"""
_WHOLE = {"integer": int, "long": int, "double": int | float, "float": int | float, "string": str, "boolean": bool}


@dataclass(frozen=True)
class Asked:
    action: str
    parameters: dict[str, Any]


def bad(message: str) -> CloudError:
    return CloudError("BadRequest", message)


class EfsModel:
    """Reads requests and writes answers."""

    def __init__(self, actions: Sequence[str]) -> None:
        self._model: Any = ServiceModel(Loader().load_service_model("efs", "service-2"), "efs")
        self._routes = [(self._model.operation_model(action), _route(self._model, action)) for action in actions]

    def action_of(self, method: str, path: str) -> str:
        """Return which action a request is of; UnsupportedOperation if of none that is known."""
        for operation, pattern in self._routes:
            if operation.http["method"] == method and pattern.fullmatch(path):
                return str(operation.name)
        raise CloudError("UnsupportedOperation", f"{method} {path} is no action of this service", status=404)

    def parse(self, action: str, path: str, query: Sequence[tuple[str, str]], body: bytes) -> dict[str, Any]:
        """Return a request's members under the model's names. Raises BadRequest."""
        operation, pattern = next(found for found in self._routes if found[0].name == action)
        shape, found = operation.input_shape, pattern.fullmatch(path)
        given: dict[str, Any] = {name: unquote(value) for name, value in found.groupdict().items()} if found else {}
        names = {kind.serialization["name"] for kind in shape.members.values() if _place(kind) == "querystring"}
        for name, value in query:
            if name not in names or name in given:
                raise bad(f"The parameter {name[:40]} is not recognized")
            given[name] = _number(value) if shape.members[name].type_name == "integer" else value
        given |= self._body(shape, body)
        return _structure(shape, given, action)

    def _body(self, shape: Any, body: bytes) -> dict[str, Any]:
        try:
            content = json.loads(body) if body else {}
        except ValueError as error:
            raise bad(f"The body is not JSON: {error}") from None
        allowed = {name for name, kind in shape.members.items() if _place(kind) is None}
        if not isinstance(content, dict) or not content.keys() <= allowed:
            raise bad("The body has members that the action does not know")
        return content

    def render(self, action: str, answer: Mapping[str, Any] | None) -> tuple[int, bytes]:
        """Return status and body of an answer."""
        operation: Any = self._model.operation_model(action)
        status = operation.http.get("responseCode", 200)
        if operation.output_shape is None:
            return status, b""
        return status, json.dumps(_written(operation.output_shape, answer or {})).encode()

    def error(self, action: str | None, error: CloudError) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of an error, whose status is the model's."""
        known = {each.name: each for each in self._model.operation_model(action).error_shapes} if action else {}
        if error.code in known:
            status = known[error.code].metadata["error"]["httpStatusCode"]
        elif error.code in COMMON or action is None:
            status = COMMON.get(error.code, error.status)
        else:
            raise TypeError(f"{action} does not have the error {error.code}") from error
        body = {"ErrorCode": error.code, "Message": error.message} | error.details
        return status, {"x-amzn-ErrorType": error.code}, json.dumps(body).encode()


def _route(model: Any, action: str) -> re.Pattern[str]:
    template = model.operation_model(action).http["requestUri"]
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template)))


def _place(kind: Any) -> str | None:
    place = kind.serialization.get("location")
    return None if place is None else str(place)


def _number(text: str) -> Any:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


# ------------------------------------------------------------------ in


def _structure(shape: Any, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in given:
        if name not in shape.members:
            raise bad(f"{where} has no member {name[:40]}")
    for name in shape.required_members:
        if given.get(name) is None:
            raise bad(f"{where} needs {name}")
    return {name: _value(shape.members[name], value, name) for name, value in given.items() if value is not None}


def _value(kind: Any, value: Any, name: str) -> Any:
    match kind.type_name:
        case "structure" if isinstance(value, dict):
            return _structure(kind, value, name)
        case "list" if isinstance(value, list):
            _check_range(kind, len(value), name)
            return [_value(kind.member, item, name) for item in value]
        case type_name if type_name in _WHOLE and isinstance(value, _WHOLE[type_name]):
            if isinstance(value, bool) is (type_name == "boolean"):
                _check_scalar(kind, value, name)
                return value
    raise bad(f"The value of {name} is not a {kind.type_name}")


def _check_scalar(kind: Any, value: Any, name: str) -> None:
    if isinstance(value, bool):
        return
    _check_range(kind, len(value) if isinstance(value, str) else value, name)
    if isinstance(value, str):
        pattern, allowed = kind.metadata.get("pattern"), getattr(kind, "enum", None)
        if (pattern and not _pattern(pattern).fullmatch(value)) or (allowed and value not in allowed):
            raise bad(f"The value {value[:80]!r} of {name} is invalid")


@cache
def _pattern(text: str) -> re.Pattern[str]:
    """The model's patterns are Java's; of what Python does not know, tags use classes of letters, digits and blanks."""
    for java, python in ((r"\p{L}", r"\w"), (r"\p{N}", r"\d"), (r"\p{Z}", r"\s")):
        text = text.replace(java, python)
    return re.compile(text)


def _check_range(kind: Any, size: float, name: str) -> None:
    if not kind.metadata.get("min", size) <= size <= kind.metadata.get("max", size):
        raise bad(f"{name} is too small or too large")


# ------------------------------------------------------------------ out


def _written(kind: Any, value: Any) -> Any:
    match kind.type_name, value:
        case "structure", Mapping():
            missing = [name for name in kind.required_members if value.get(name) is None]
            if missing:
                raise TypeError(f"{kind.name} needs {missing[0]}")
            return {name: _written(kind.members[name], inner) for name, inner in value.items() if inner is not None}
        case "list", list():
            return [_written(kind.member, item) for item in value]
        case "timestamp", datetime():
            return value.timestamp()
        case ("integer" | "long" | "double", int() | float()) | ("boolean", bool()) | ("string", str()):
            return value
    raise TypeError(f"{kind.name} is a {kind.type_name} in the service's model, not {value!r}")
