"""Faults and access: kill, freeze, thaw and start again a daemon of a lab, run a command in a place, show what is."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from emp.host.processes import Process
from emp.lab import daemons, places, scan
from emp.lab.state import LabFiles, LabState
from emp.lab.topology import Place
from emp.model.errors import BadInput, Conflict, NotFound

END_S = 10.0


def _running(files: LabFiles, where: str, role: str) -> Process:
    process = daemons.find(files, where, role)
    if process is None:
        raise NotFound(
            f"{role} is not running on {where}", field="role", hint=f"emp lab status --name {files.name} shows what is"
        )
    return process


def kill(files: LabFiles, where: str, role: str) -> int:
    """SIGKILL a daemon or an EVM's QEMU and return its pid once it has ended."""
    process = _running(files, where, role)
    scan.kill([process], timeout_s=END_S)
    return process.pid


def stop(files: LabFiles, where: str, role: str) -> int:
    """Freeze a process (SIGSTOP) and return its pid."""
    return _signal(files, where, role, signal.SIGSTOP)


def cont(files: LabFiles, where: str, role: str) -> int:
    """Let a frozen process go on (SIGCONT) and return its pid."""
    return _signal(files, where, role, signal.SIGCONT)


def _signal(files: LabFiles, where: str, role: str, number: signal.Signals) -> int:
    process = _running(files, where, role)
    process.send(number)
    return process.pid


def start(files: LabFiles, where: str, role: str) -> None:
    """Start again a daemon that has died; returns before it is ready. ``Conflict`` if it runs."""
    with files.locked():
        state = files.load()
        place = state.topology.place(where)
        if role.startswith("qemu:"):
            raise BadInput("a QEMU is started by its agent", field="role", hint="emp evm start NAME")
        daemons.daemon_role(place, role)
        if daemons.started(files, place):
            raise Conflict(f"{role} runs on {where}", field="role", hint=f"emp lab kill {where} {role} ends it")
        daemons.spawn(files, state, place)


def command_in(files: LabFiles, where: str, command: Sequence[str]) -> list[str]:
    """Return the command line that runs ``command`` in a place: for subprocesses of tests, benches and the demo."""
    return [*places.enter_argv(places.init_of(files, where)), *command]


def execute(files: LabFiles, where: str, command: Sequence[str]) -> NoReturn:
    """Become ``command`` in a place; its exit status is ours."""
    if not command:
        raise BadInput("there is no command", field="command", hint="emp lab exec n1 -- ip address")
    argv = command_in(files, where, command)
    os.execvp(argv[0], argv)


@dataclass(frozen=True)
class PlaceStatus:
    """What runs in a place."""

    name: str
    address: str
    role: str
    """the daemon it is there for, or ``-``"""
    state: str
    """running, frozen, dead; ``off`` when it is switched off, ``place dead`` when its process 1 is gone otherwise"""
    pid: int | None
    evms: tuple[str, ...]
    """names of the EVMs that have a QEMU here"""


def status(files: LabFiles) -> list[PlaceStatus]:
    """Return what runs in each place; ``NotFound`` without the lab."""
    alive, state = places.inits(files), files.load()
    return [_place_status(files, state, place, place.name in alive) for place in state.topology.places]


def _place_status(files: LabFiles, lab: LabState, place: Place, alive: bool) -> PlaceStatus:
    role = str(place.role or "-")
    if not alive:
        state = "off" if place.name in lab.off else "place dead"
        return PlaceStatus(place.name, place.address, role, state, None, ())
    here = daemons.daemons(files, place)
    evms = sorted({name for found in here if (name := daemons.evm_of(found.argv))})
    if place.role is None:
        return PlaceStatus(place.name, place.address, role, "running", None, tuple(evms))
    process = daemons.find(files, place.name, role)
    state = "dead" if process is None else "frozen" if scan.frozen(process) else "running"
    return PlaceStatus(place.name, place.address, role, state, process.pid if process else None, tuple(evms))
