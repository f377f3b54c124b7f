"""Puts the simulated ground under the daemons' modules, for the life of a worker process: each seam in one line.

Everything that differs from one run to the next by itself (clock, chance, identifiers) is taken from the run's seed.
"""

from __future__ import annotations

import itertools
import logging
import random
import secrets
import time
import uuid
from collections.abc import Callable
from typing import Any

import emp.agent.addresses
import emp.agent.api
import emp.agent.journal
import emp.agent.relays
import emp.agent.shelf
import emp.controller.api.agents
import emp.controller.app
import emp.controller.wiring
import emp.host.conntrack
import emp.volumes.nbd
import emp.volumes.server.app
import emp.volumes.server.service
import emp.volumes.server.state
from emp.model.errors import NotFound
from tests.simulation.disk import DiskPath, FakeOs, File
from tests.simulation.loop import EPOCH_S, current, here
from tests.simulation.routes import RouteTable


def _unset(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no run is in progress")


class Ground:
    """What the patched modules ask: the run in progress."""

    def __init__(self) -> None:
        self.rng = random.Random(0)
        self.now: Callable[[], float] = lambda: 0.0
        self.skews_s: dict[str, float] = {}
        self.ids = itertools.count(1)
        self.exports: Callable[[Any], Any] = _unset
        """makes the volume service's exports"""
        self.end_exports: Callable[..., None] = _unset
        """ends those that the volume service does not know"""
        self.agents: Callable[[], Any] = _unset
        """makes the controller's clients of agents"""

    def wall_clock(self) -> float:
        process = current.get()
        return EPOCH_S + self.now() + (self.skews_s.get(process.host, 0.0) if process else 0.0)

    def token_hex(self, nbytes: int | None = None) -> str:
        return f"{self.rng.getrandbits(8 * (nbytes or 8)):0{2 * (nbytes or 8)}x}"


GROUND = Ground()


def install() -> None:
    """Once in a process that runs nothing else."""
    fake_os: Any = FakeOs()
    _patch(time, "time", GROUND.wall_clock)
    _patch(time, "monotonic", lambda: GROUND.now())
    _patch(secrets, "token_hex", GROUND.token_hex)
    _patch(uuid, "uuid4", lambda: uuid.UUID(int=next(GROUND.ids)))
    _patch(emp.agent.journal, "os", fake_os)
    _patch(emp.agent.shelf, "os", fake_os)
    for module in (emp.agent.api, emp.controller.app, emp.volumes.server.app):
        _patch(module, "FastAPI", RouteTable)
        _patch(module, "install_error_handlers", lambda _: None)
    for module in (emp.controller.api.agents, emp.volumes.server.app):
        _patch(module, "APIRouter", RouteTable)
    _patch(emp.volumes.nbd, "WireClient", lambda url, *, tls, server: tls)  # the agent's claims get theirs as ``tls``
    _patch(emp.controller.wiring, "mutual_client", lambda _: None)
    _patch(emp.controller.wiring, "Agents", lambda _: GROUND.agents())
    _patch(emp.controller.wiring, "_token", lambda _: None)
    service = emp.volumes.server.service
    _patch(service, "Export", lambda spec: GROUND.exports(spec))
    _patch(service, "end_strays", _end_strays)
    for name in ("write_tls_directory", "make_private_dir", "make_sparse"):
        _patch(service, name, lambda *_: None)
    _patch(service, "EpochLog", lambda _: _NoLog())
    _patch(service, "_lock", lambda _: None)
    _patch(service, "_is_free", lambda *_: True)
    _patch(emp.volumes.server.state, "read_private", _read)
    _patch(emp.volumes.server.state, "write_private", _write)
    _patch(emp.agent.relays, "write_private", _write)
    _patch(emp.agent.addresses, "write_private", _write)
    _patch(emp.host.conntrack, "read", lambda _: [])
    logging.raiseExceptions = True


class _NoLog:
    def note(self, *_: Any, **__: Any) -> None:
        pass


def _patch(module: Any, name: str, value: Any) -> None:
    getattr(module, name)  # a seam that has moved must be noticed
    setattr(module, name, value)


async def _end_strays(_: DiskPath, wanted: set[DiskPath]) -> None:
    here()
    GROUND.end_exports(but={path.name.rpartition("/")[2].removesuffix(".pid") for path in wanted})


def _read(path: DiskPath) -> bytes:
    if not path.exists():
        raise NotFound(f"{path} is not there")
    return path.read_bytes()


def _write(path: DiskPath, data: bytes) -> None:
    here()
    path.disk.files[path.name] = File(bytearray(data), len(data))
