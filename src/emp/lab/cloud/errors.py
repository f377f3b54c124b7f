"""An error as the EC2 API words it: a code that programs read, a message, an HTTP status. EFS adds details.

Codes: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

THROTTLED, DENIED, UNAUTHENTICATED, DRY_RUN, BROKEN = 503, 403, 401, 412, 500


class CloudError(Exception):
    """What the caller is told instead of an answer. Nothing has been changed."""

    def __init__(self, code: str, message: str, *, status: int = 400, **details: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.status = status
        self.details = details


def check_simulated(request: Mapping[str, Any], unknown: Iterable[str]) -> None:
    """Raise UnsupportedOperation for a parameter that AWS has and the simulated cloud has not."""
    for name in unknown:
        if name in request:
            raise CloudError("UnsupportedOperation", f"The simulated cloud does not know {name}")
