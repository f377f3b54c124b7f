"""The EC2 query protocol in both directions, driven by botocore's own model of the service.

Requests are form-encoded (``VolumeId.1=...``, ``TagSpecification.1.Tag.2.Key=...``), answers XML:
https://docs.aws.amazon.com/AWSEC2/latest/APIReference/Query-Requests.html. A name or a type that the model does not
have is an error on the way in (UnknownParameter) and on the way out (a defect of the simulator).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from xml.etree import ElementTree

from botocore.loaders import Loader
from botocore.model import ServiceModel

from emp.lab.cloud.errors import CloudError

_COMMON = re.compile(r"Action|Version|AWSAccessKeyId|Signature|SignatureMethod|SignatureVersion|Timestamp|X-Amz-.*")
"""https://docs.aws.amazon.com/AWSEC2/latest/APIReference/CommonParameters.html"""


class Ec2Model:
    """Reads requests and writes answers. Loading it takes a few tenths of a second."""

    def __init__(self) -> None:
        self._model: Any = ServiceModel(Loader().load_service_model("ec2", "service-2"), "ec2")
        self.version: str = self._model.api_version

    def parse(self, action: str, parameters: Mapping[str, str]) -> dict[str, Any]:
        """Return the request's members under the model's names.

        Raises UnknownParameter, MissingParameter or InvalidParameterValue.
        """
        given = {name: value for name, value in parameters.items() if not _COMMON.fullmatch(name)}
        seen: set[str] = set()
        shape = self._model.operation_model(action).input_shape
        found = _structure(shape, "", given, seen)
        for name in given:
            if name not in seen:
                raise CloudError("UnknownParameter", f"The parameter {name} is not recognized")
        return found

    def render(self, action: str, answer: Mapping[str, Any] | None) -> bytes:
        """Return the XML of an answer; None is the answer of an action that has nothing to tell."""
        root = ElementTree.Element(f"{action}Response", xmlns=f"http://ec2.amazonaws.com/doc/{self.version}/")
        ElementTree.SubElement(root, "requestId").text = _request_id()
        shape = self._model.operation_model(action).output_shape
        if shape is None:
            ElementTree.SubElement(root, "return").text = "true"
        else:
            _write_structure(root, shape, answer or {})
        return _document(root)


def render_error(error: CloudError) -> bytes:
    """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html#api-error-response"""
    root = ElementTree.Element("Response")
    told = ElementTree.SubElement(ElementTree.SubElement(root, "Errors"), "Error")
    ElementTree.SubElement(told, "Code").text = error.code
    ElementTree.SubElement(told, "Message").text = error.message
    ElementTree.SubElement(root, "RequestID").text = _request_id()
    return _document(root)


def _request_id() -> str:
    return secrets.token_hex(16)


def _document(root: ElementTree.Element) -> bytes:
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root)


# ------------------------------------------------------------------ in


def _structure(shape: Any, prefix: str, given: Mapping[str, str], seen: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for member, kind in shape.members.items():
        key = prefix + _name_in(kind, member)
        value = _value(kind, key, given, seen)
        if value is not None:
            found[member] = value
        elif member in shape.required_members:
            raise CloudError("MissingParameter", f"The request must contain the parameter {_shown(key)}")
    return found


def _name_in(kind: Any, member: str) -> str:
    """As botocore writes it: the query name, else the XML name with a capital, else the member's."""
    name = kind.serialization.get("queryName") or kind.serialization.get("name") or member
    return str(name[0].upper() + name[1:])


def _value(kind: Any, key: str, given: Mapping[str, str], seen: set[str]) -> Any:
    match kind.type_name:
        case "list":
            items = [_value(kind.member, f"{key}.{n}", given, seen) for n in _indices(key, given)]
            return items or None
        case "structure":
            is_there = any(name.startswith(f"{key}.") for name in given)
            return _structure(kind, f"{key}.", given, seen) if is_there else None
        case _:
            if key not in given:
                return None
            seen.add(key)
            return _scalar(kind, key, given[key])


def _indices(key: str, given: Mapping[str, str]) -> list[int]:
    pattern = re.compile(re.escape(key) + r"\.([1-9][0-9]{0,4})(\.|$)")
    return sorted({int(match[1]) for name in given if (match := pattern.match(name))})


def _scalar(kind: Any, key: str, text: str) -> Any:
    match kind.type_name:
        case "boolean" if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case "integer" | "long" if re.fullmatch(r"-?[0-9]{1,18}", text):
            return int(text)
        case "string" if not getattr(kind, "enum", None) or text in kind.enum:
            return text
    raise CloudError("InvalidParameterValue", f"Value ({text[:80]}) for parameter {_shown(key)} is invalid.")


def _shown(key: str) -> str:
    """AWS names parameters in its messages with a small letter."""
    return key[0].lower() + key[1:]


# ------------------------------------------------------------------ out


def _write_structure(parent: ElementTree.Element, shape: Any, value: Mapping[str, Any]) -> None:
    for member, inner in value.items():
        kind = shape.members[member]
        if inner is not None:
            _write(ElementTree.SubElement(parent, kind.serialization.get("name", member)), kind, inner)


def _write(element: ElementTree.Element, kind: Any, value: Any) -> None:
    match kind.type_name, value:
        case "structure", Mapping():
            _write_structure(element, kind, value)
        case "list", list():
            for item in value:
                _write(
                    ElementTree.SubElement(element, kind.member.serialization.get("name", "member")), kind.member, item
                )
        case "boolean", bool():
            element.text = "true" if value else "false"
        case "timestamp", datetime():
            element.text = value.strftime("%Y-%m-%dT%H:%M:%S.") + f"{value.microsecond // 1000:03}Z"
        case "integer" | "long", int():
            element.text = str(value)
        case "string", str():
            element.text = value
        case name, _:
            raise TypeError(f"{kind.name} is a {name} in the service's model, not {value!r}")
