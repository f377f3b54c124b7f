"""Reads a daemon's configuration: one JSON file, checked before anything is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from emp.model.base import Model
from emp.model.errors import BadInput

C = TypeVar("C", bound=Model)


def read_config(kind: type[C], path: Path) -> C:
    """Raise ``BadInput`` with the field and the reason; the field is ``config`` where it is the whole file."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}", field="config") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "config"
        raise BadInput(f"{first['msg'].removeprefix('Value error, ')} (in {path})", field=where) from None
