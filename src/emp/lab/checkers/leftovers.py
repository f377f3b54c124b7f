"""Residue: what a pool at rest holds on each of its machines, to be compared before and after.

Processes by what they are, interfaces, addresses, mounts, firewall tables, files of running machines, and the
descriptors and connections of each daemon. The kernel is asked, not EMP.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emp.host.run import run_sync
from emp.lab import daemons, places, scan
from emp.lab.state import LabFiles
from emp.lab.topology import Place

NFS_SERVER = "ganesha.nfsd"
SPARE_DESCRIPTORS = 6
"""a daemon's connections come and go: idle ones to its peers, a watch that is being renewed"""
EVM_DESCRIPTORS = 5
"""an agent's, for the EVM that has come to it"""


@dataclass(frozen=True)
class Stock:
    """What was there at one moment: the things, by place; and each daemon's figures."""

    things: frozenset[str]
    descriptors: Mapping[str, int]
    """but for connections: idle ones to peers are closed only after half a minute, and there are now more, now less"""
    connections: Mapping[str, int]
    """established TCP connections"""
    rss_bytes: Mapping[str, int]

    def left(self, before: Stock) -> list[str]:
        """Return, in words, what is here now and was not before, or the other way round."""
        more = [f"{thing} is left" for thing in sorted(self.things - before.things)]
        less = [f"{thing} is missing" for thing in sorted(before.things - self.things)]
        leaks = [
            f"{daemon} has {number} descriptors, {number - before.open_files(daemon)} more than before"
            for daemon in self.descriptors
            if (number := self.open_files(daemon)) > (before.open_files(daemon) or number) + _spare(daemon)
        ]
        return more + less + leaks

    def open_files(self, daemon: str) -> int:
        """Return how many descriptors a daemon has in all; 0: it is not there."""
        return self.descriptors.get(daemon, 0) + self.connections.get(daemon, 0)


def take(files: LabFiles, *, ignore: frozenset[str] = frozenset()) -> Stock:
    """Take stock of a lab. ``ignore``: words; a thing that has one of them belongs to somebody who knows of it."""
    things: set[str] = set()
    descriptors, connections, rss_bytes = {}, {}, {}
    for place in files.load().topology.places:
        here = daemons.daemons(files, place)
        things |= {f"{place.name}: {thing}" for thing in _things(files, place, here)}
        process = daemons.find(files, place.name, place.role) if place.role else None
        if process is not None:
            name = f"{place.role} of {place.name}"
            opened, connected = _descriptors(process.pid), _connected(process.pid)
            connections[name] = sum(target in connected for target in opened)
            descriptors[name] = len(opened) - connections[name]
            rss_bytes[name] = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    kept = {thing for thing in things if not any(word in thing for word in ignore)}
    return Stock(frozenset(kept), descriptors, connections, rss_bytes)


def _descriptors(pid: int) -> list[str]:
    """Return what each descriptor of a process is, as proc(5) names it."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return found


def _connected(pid: int) -> set[str]:
    """Return the same names of every established TCP connection in the process's network (proc_net_tcp: state 01)."""
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
    ]
    return {f"socket:[{fields[9]}]" for fields in lines if fields[3] == "01"}


def _things(files: LabFiles, place: Place, here: list[scan.Running]) -> set[str]:
    """Name what is in a place so that the same thing has the same name after a restart; equal ones are counted."""
    init = places.init_of(files, place.name)
    namespace = files.load().topology.namespace(place.name)
    links = json.loads(run_sync("ip", "-n", namespace, "-json", "address", "show"))
    tables = run_sync("ip", "netns", "exec", namespace, "nft", "list", "tables")
    mounts = Path(f"/proc/{init.pid}/mountinfo").read_text().splitlines()
    root = Path(f"/proc/{init.pid}/root")
    names = [
        *(f"process {_what(running.argv)}" for running in here),
        *(f"interface {link['ifname']}" for link in links),
        *(f"address {found['local']}" for link in links for found in link["addr_info"] if found["family"] == "inet"),
        *(f"firewall {line}" for line in tables.splitlines()),
        *(f"mount {line.split()[4]}" for line in mounts),
        *(f"file {path.relative_to(root)}" for path in (root / "run/emp").rglob("*") if not path.is_dir()),
    ]
    return {f"{name} ({count})" if count > 1 else name for name, count in Counter(names).items()}


def _what(argv: tuple[str, ...]) -> str:
    """Return a process's program and, where it has one, the EVM, volume or module that it is for."""
    program = Path(argv[0]).name
    if evm := daemons.evm_of(argv):
        return f"{program} of {evm}"
    if "-m" in argv:
        return argv[argv.index("-m") + 1]
    if "--export-name" in argv:
        return f"{program} of {argv[argv.index('--export-name') + 1].split('.')[0]}"
    if program == NFS_SERVER and "-f" in argv:
        return f"{program} of {Path(argv[argv.index('-f') + 1]).stem}"
    return program


def _spare(daemon: str) -> int:
    return SPARE_DESCRIPTORS + (EVM_DESCRIPTORS if daemon.startswith("agent ") else 0)
