"""What a name, a size and an address may look like; every edge of the project validates through here.

Names reach command lines, paths and interface lists, so the rule is narrow: RFC 1123 labels.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from emp.model.errors import BadInput

NAME_RULE = "1 to 63 characters of a-z, 0-9 and '-', beginning and ending with a letter or digit"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SIZE = re.compile(r"(\d+)\s*(B|KiB|MiB|GiB|TiB|K|M|G|T)?", re.IGNORECASE)
_UNIT_BYTES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_MAC = re.compile(r"([0-9a-f]{2}:){5}[0-9a-f]{2}")


def check_name(value: str, *, field: str = "name") -> str:
    """Return ``value`` if it is a valid name (RFC 1123 label); raise ``BadInput`` naming ``field`` otherwise."""
    if not _NAME.fullmatch(value):
        shown = value if len(value) <= 40 else value[:37] + "..."
        raise BadInput(f"{shown!r} is not a valid name", field=field, hint=NAME_RULE)
    return value


def parse_size(value: str | int, *, field: str = "size") -> int:
    """Return a size in bytes from ``512MiB``, ``2G`` or a plain number of bytes. Units are powers of 1024."""
    if isinstance(value, int):
        size_bytes = value
    else:
        match = _SIZE.fullmatch(value.strip())
        if not match:
            raise BadInput(
                f"{value[:40]!r} is not a size", field=field, hint="write it like 512MiB, 2GiB or 1073741824"
            )
        size_bytes = int(match[1]) * _UNIT_BYTES[(match[2] or "")[:1].lower()]
    if not 0 < size_bytes < 1 << 50:
        raise BadInput(f"{value} is out of range", field=field, hint="more than 0 and less than 1 PiB")
    return size_bytes


def format_size(size_bytes: float) -> str:
    """Return a size for people: 512 MiB, 1.5 GiB, 0 B."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.4g} {unit}"
    return f"{size_bytes:.0f} B"


def check_mac(value: str) -> str:
    """Return a unicast MAC address in lower case; raise ``BadInput`` otherwise."""
    mac = value.lower()
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1:
        raise BadInput(
            f"{value[:40]!r} is not a unicast MAC address", field="mac", hint="six pairs like 52:54:00:12:34:56"
        )
    return mac


def check_ip(value: str, *, field: str = "address") -> str:
    """Return an IPv4 or IPv6 host address in canonical form; raise ``BadInput`` otherwise."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        hint = f"written like {'2001:db8::5' if ':' in value else '10.77.1.5'}, without a prefix length"
        raise BadInput(f"{value[:60]!r} is not an IP address", field=field, hint=hint) from None


def _size(value: object) -> int:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError("a size is a text such as 512MiB, or a whole number of bytes")
    try:
        return parse_size(value)
    except BadInput as error:
        raise ValueError(str(error.message)) from None


def _as_value_error(check: object) -> AfterValidator:
    def run(value: str) -> str:
        try:
            return check(value)  # type: ignore[operator, no-any-return]
        except BadInput as error:
            raise ValueError(f"{error.message}; {error.hint}") from None

    return AfterValidator(run)


Name = Annotated[str, _as_value_error(check_name)]
Mac = Annotated[str, _as_value_error(check_mac)]
Ip = Annotated[str, _as_value_error(check_ip)]
SizeBytes = Annotated[int, BeforeValidator(_size)]
