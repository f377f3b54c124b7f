"""Durations and rates as people write them."""

from __future__ import annotations

import re

from emp.model.errors import BadInput

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h)?")
_UNIT_S = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}


def parse_duration_s(text: str, *, field: str, bare: str = "s") -> float:
    """Return seconds from ``30ms``, ``1.5s``, ``15min`` or ``2h``; ``bare`` is the unit of a plain number."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise BadInput(f"{text[:40]!r} is not a duration", field=field, hint="write it like 30ms, 90s or 15min")
    return float(match[1]) * _UNIT_S[match[2] or bare]


def parse_rate_bytes_per_s(text: str, *, field: str) -> int:
    """Return bytes per second from ``100MiB/s`` or ``100MiB``; ``0`` is no cap."""
    from emp.model.names import parse_size

    amount = text.strip().removesuffix("/s")
    return 0 if amount == "0" else parse_size(amount, field=field)
