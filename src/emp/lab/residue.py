"""What a lab might leave on this machine, looked for without trusting the lab's own record of what it made."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emp.client import context as contexts
from emp.lab.places import NAMESPACES
from emp.lab.state import base_directory
from emp.lab.topology import BRIDGE, FABRIC, Topology

MARK = "EMP_TEST_ID"
"""environment variable that everything inherits which is started from here, the QEMUs too"""
TAPS = "emp"
WATCHED = ("/run", "/tmp", "/var/tmp", "/var/lib", "/dev/shm")


@dataclass(frozen=True)
class Residue:
    """Takes stock before a lab is made; ``left`` compares afterwards. What is not of this lab does not count."""

    topology: Topology
    mark: str
    before: frozenset[str]

    @classmethod
    def watch(cls, topology: Topology) -> Residue:
        mark = os.environ.setdefault(MARK, secrets.token_hex(8))
        return cls(topology, mark, frozenset(_things(topology, mark)))

    def left(self) -> list[str]:
        """Return, in words, what is here now and was not before."""
        return sorted(set(_things(self.topology, self.mark)) - self.before)


def _things(topology: Topology, mark: str) -> Iterator[str]:
    names = frozenset(topology.namespaces)
    links = {place.name for place in topology.places} | {FABRIC, BRIDGE}
    for name in os.listdir(NAMESPACES) if NAMESPACES.is_dir() else ():  # noqa: PTH208 - names alone
        if name in names:
            yield f"network namespace {name}"
    for _, name in socket.if_nameindex():
        if name in links or name.startswith(TAPS):
            yield f"interface {name}"
    for pid in _marked(mark):
        yield f"process {pid}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4]
        if any(name in line for name in names) or Path(point).is_relative_to(base_directory()):
            yield f"mount {point}"
    yield from _files(topology)


def _files(topology: Topology) -> Iterator[str]:
    for path in (base_directory() / topology.lab, contexts.file_of(topology.lab)):
        if path.exists():
            yield f"file {path}"
    for directory in WATCHED:
        for entry in Path(directory).glob(f"emp*{topology.lab}*"):
            yield f"file {entry}"


def _marked(mark: str) -> Iterator[int]:
    """Yield the processes that carry the mark, but the caller and those that were there before it set the mark."""
    wanted = f"{MARK}={mark}".encode()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = Path(entry.path, "environ").read_bytes()
            except OSError:
                continue  # it has ended, or is a zombie
            if wanted in environment.split(b"\0"):
                yield int(entry.name)
