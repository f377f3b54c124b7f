"""The volume service's settings: one JSON file."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from emp.model.base import Model
from emp.model.names import Ip, Name


class Config(Model):
    address: Ip
    """where the API and the exports listen, and where the nodes reach them"""
    port: int = Field(ge=1, le=65535)
    nbd_ports: tuple[int, int]
    """first and last port for exports; one per attachment"""
    credentials: Path
    """directory with this daemon's certificate (role ``volumes``) and the pool's CA"""
    state_dir: Path
    """records and the volumes' data"""
    images_dir: Path | None = None
    """``NAME.raw`` for each image that a volume can be made from; None: there are none"""
    pool: Name

    @model_validator(mode="after")
    def _ports(self) -> Config:
        first, last = self.nbd_ports
        if not 1 <= first <= last <= 65535:
            raise ValueError("nbd_ports must be a first and a last port, 1 to 65535")
        if first <= self.port <= last:
            raise ValueError("port must lie outside of nbd_ports")
        return self
