"""Waits until a new pool can be used, and says why when it does not come up."""

from __future__ import annotations

import http.client
import json
import ssl
import time
from typing import Any

from emp.client.context import Context
from emp.lab import daemons
from emp.lab.state import LabFiles, LabState
from emp.model.errors import HostError

READY_S = 30.0
POLL_S = 0.05
TAIL_LINES = 15


class PoolProbe:
    """The two questions that a start asks of the controller, over one connection. None = no answer (yet)."""

    def __init__(self, context: Context, port: int) -> None:
        tls = ssl.create_default_context(cadata=context.ca_pem)
        self._connection = _Named(context.server_name, port, tls)
        self._headers = {"Authorization": f"Bearer {context.token.reveal()}"}

    def get(self, path: str) -> Any:
        try:
            self._connection.request("GET", path, headers=self._headers)
            answer = self._connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            return None
        return json.loads(body) if answer.status == http.client.OK else None

    def close(self) -> None:
        self._connection.close()


class _Named(http.client.HTTPSConnection):
    """A connection to 127.0.0.1 whose other end must show the certificate of ``server_name``."""

    def __init__(self, server_name: str, port: int, tls: ssl.SSLContext) -> None:
        super().__init__(daemons.HOST, port, context=tls, timeout=5)
        self._tls = tls
        self._server_name = server_name

    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._server_name)


def wait_ready(files: LabFiles, state: LabState, context: Context, *, timeout_s: float = READY_S) -> None:
    """Return once the controller is healthy and every agent has reported; ``HostError`` if that does not come."""
    probe = PoolProbe(context, state.port)
    wanted = {place.name for place in state.topology.node_places}
    deadline = time.monotonic() + timeout_s
    look_at = time.monotonic() + 0.5
    try:
        while not (probe.get("/healthz") and wanted <= _reported(probe.get("/v1/nodes"))):
            now = time.monotonic()
            if now > look_at:
                _check_alive(files, state)
                look_at = now + 0.5
            if now > deadline:
                raise HostError(f"the pool {state.name} is not ready after {timeout_s:.0f} s", hint=_all_tails(files))
            time.sleep(POLL_S)
    finally:
        probe.close()


def _reported(listing: Any) -> set[str]:
    return {node["report"]["name"] for node in listing["items"] if node["ready"]} if listing else set()


def _check_alive(files: LabFiles, state: LabState) -> None:
    for place in state.topology.places:
        if place.role is not None and not daemons.started(files, place):
            tail = log_tail(files, place.name, place.role)
            raise HostError(f"the {place.role} on {place.name} ended as it started:\n{tail}")


def log_tail(files: LabFiles, place: str, role: str) -> str:
    """Return the last lines of a daemon's log."""
    try:
        lines = files.log(place, role).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    return "\n".join(lines[-TAIL_LINES:]) or "(it wrote no log)"


def _all_tails(files: LabFiles) -> str:
    last = {log.stem: log.read_text(errors="replace").splitlines()[-1:] for log in files.directory.glob("logs/*.log")}
    return "; ".join(f"{name}: {lines[0] if lines else '(nothing)'}" for name, lines in sorted(last.items()))
