"""What every record and message has in common: immutable, and nothing unknown is swallowed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """A frozen value. An unknown field is an error: a typing mistake in a request must not pass silently."""

    model_config = ConfigDict(frozen=True, extra="forbid")
