"""Faults and access: kill, freeze, thaw and start again a daemon of a lab, run a command in a place, show what is."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from emp.host.processes import Process
from emp.lab import daemons, keeper, places, scan
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


def kill(files: LabFiles, where: str, role: str, *, restart: bool = False) -> int:
    """SIGKILL a daemon or an EVM's QEMU and return its pid once it has ended.

    A daemon then stays dead until ``start``, also in a lab that keeps its daemons; with ``restart`` it is left to its
    keeper, and ``Conflict`` is raised if it has none.
    """
    if restart:
        process = _running(files, where, role)
        _check_kept(files, where, role)
    else:
        dismissed = _dismiss_keeper(files, where, role)
        process = daemons.find(files, where, role) or dismissed or _running(files, where, role)
    scan.kill([process], timeout_s=END_S)
    return process.pid


def _check_kept(files: LabFiles, where: str, role: str) -> None:
    if role.startswith("qemu:"):
        raise BadInput("a QEMU has no keeper", field="restart", hint="kill it without --restart")
    if daemons.find_keeper(files, files.load().topology.place(where)) is None:
        hint = "a lab that keeps its daemons is made with: emp lab up --keep"
        raise Conflict(f"{role} on {where} has no keeper to start it again", field="restart", hint=hint)


def _dismiss_keeper(files: LabFiles, where: str, role: str) -> Process | None:
    """End the keeper of a daemon, if it has one, before the daemon itself; return what has ended."""
    place = files.load().topology.place(where)
    if role.startswith("qemu:"):
        return None
    daemons.daemon_role(place, role)
    ended = None
    while kept := daemons.find_keeper(files, place):
        scan.kill([kept.process], timeout_s=END_S)
        ended = kept.process
    return ended


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
    """Start again a daemon that has died; returns before it is ready. ``Conflict`` if it runs, or its keeper does."""
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
    """running, frozen, dead, ``restarting`` when its keeper will start it again; ``off`` when it is switched off,
    ``place dead`` when its process 1 is gone otherwise"""
    pid: int | None = None
    restarts: int | None = None
    """how often its keeper has started the daemon again; None without a keeper"""
    evms: tuple[str, ...] = ()
    """names of the EVMs that have a QEMU here"""


def status(files: LabFiles) -> list[PlaceStatus]:
    """Return what runs in each place; ``NotFound`` without the lab."""
    alive, state = places.inits(files), files.load()
    return [_place_status(files, state, place, place.name in alive) for place in state.topology.places]


def _place_status(files: LabFiles, lab: LabState, place: Place, alive: bool) -> PlaceStatus:
    named = place.name, place.address, str(place.role or "-")
    if not alive:
        return PlaceStatus(*named, "off" if place.name in lab.off else "place dead")
    if place.role is None:
        return PlaceStatus(*named, "running")
    evms = sorted({name for found in daemons.daemons(files, place) if (name := daemons.evm_of(found.argv))})
    kept = daemons.find_keeper(files, place)
    process = daemons.find(files, place.name, place.role)
    restarts = keeper.restarts_of(kept.argv) if kept else None
    if process is None:
        return PlaceStatus(*named, "restarting" if kept else "dead", None, restarts, tuple(evms))
    return PlaceStatus(*named, "frozen" if scan.frozen(process) else "running", process.pid, restarts, tuple(evms))
