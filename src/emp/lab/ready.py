"""Waits until a new pool can be used, and says why when it does not come up."""

from __future__ import annotations

import time

from emp.client import Client
from emp.client.context import Context
from emp.lab import daemons, scan
from emp.lab.places import init_of
from emp.lab.state import LabFiles, LabState
from emp.lab.topology import BMC, POWER_PORT, VOL, VOLUMES_PORT
from emp.model.errors import EmpError, HostError

READY_S = 30.0
POLL_S = 0.05
LOOK_S = 0.5
TAIL_LINES = 15


def wait_ready(files: LabFiles, state: LabState, context: Context, *, timeout_s: float = READY_S) -> None:
    """Return once the controller is healthy, every node that is on has reported, and the other daemons listen.

    Raises ``HostError`` if that does not come.
    """
    wanted = {place.name for place in state.topology.node_places} - set(files.load().off)
    deadline = time.monotonic() + timeout_s
    look_at = time.monotonic() + LOOK_S
    with Client(context) as client:
        while not (wanted <= _reported(client) and _listen(files)):
            now = time.monotonic()
            if now > look_at:
                _check_alive(files, state)
                look_at = now + LOOK_S
            if now > deadline:
                raise HostError(f"the pool {state.name} is not ready after {timeout_s:.0f} s", hint=_all_tails(files))
            time.sleep(POLL_S)


def _listen(files: LabFiles) -> bool:
    ports = {VOL.name: VOLUMES_PORT, BMC.name: POWER_PORT}
    return all(scan.listens(init_of(files, place).pid, port) for place, port in ports.items())


def _reported(client: Client) -> set[str]:
    """Return the nodes that are ready; none while the controller does not answer."""
    try:
        client.health()
        return {node.name for node in client.nodes.list().items if node.ready}
    except EmpError:
        return set()


def _check_alive(files: LabFiles, state: LabState) -> None:
    off = files.load().off
    for place in state.topology.places:
        if place.role is not None and place.name not in off and not daemons.started(files, place):
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
