"""Proves that the places of a lab share nothing but the network: reads it off the kernel, whoever made the places.

Looked at are the namespaces; every directory that one place can write and another can see; every pipe, socket and
written file that processes of two places hold open; and the interfaces, of which a place has one to the outside.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from itertools import combinations, permutations
from pathlib import Path

from emp.host.processes import Process
from emp.host.run import run_sync
from emp.lab import places, scan
from emp.lab.init import below
from emp.lab.kernel import Mount, mounts
from emp.lab.state import LabFiles
from emp.lab.topology import BRIDGE, UPLINK, Topology

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts")
THIS_MACHINE = "this machine"


def violations(files: LabFiles) -> list[str]:
    """Return, in words, everything that places of a lab share beside the network; empty for a sound lab."""
    inits = dict(sorted(places.inits(files).items()))
    topology = files.load().topology
    return [
        *_shared_namespaces(inits),
        *_shared_directories({name: mounts(f"/proc/{init.pid}/mountinfo") for name, init in inits.items()}),
        *_shared_descriptors({name: _descriptors(init) for name, init in inits.items()}),
        *(problem for place in topology.places for problem in _extra_links(topology, place.name)),
    ]


def _shared_namespaces(inits: dict[str, Process]) -> Iterator[str]:
    pids = {name: str(process.pid) for name, process in inits.items()} | {THIS_MACHINE: "self"}
    for kind in NAMESPACES:
        inodes = {name: scan.namespace_inode(f"/proc/{pid}/ns/{kind}") for name, pid in pids.items()}
        for one, other in combinations(inodes, 2):
            if inodes[one] == inodes[other]:
                yield f"{one} and {other} have one {kind} namespace"


def _shared_directories(tables: dict[str, list[Mount]]) -> Iterator[str]:
    """Yield each directory that one place can write and another can see, even if read-only: a file is a message."""
    for writer, reader in permutations(tables, 2):
        for written in filter(lambda mount: mount.writable, tables[writer]):
            for path in visible_at(tables[reader], written):
                yield f"{reader} sees at {path} what {writer} writes at {written.point}"


def visible_at(table: list[Mount], wanted: Mount) -> Iterator[str]:
    """Yield the paths at which a mount table shows the directory tree of ``wanted``, or a part of it."""
    for mount in table:
        if mount.device != wanted.device:
            continue
        if below(wanted.root, mount.root):  # the mount shows at least all of it
            inner = wanted.root[len(mount.root.rstrip("/")) :]
            path = mount.point.rstrip("/") + inner or "/"
        elif below(mount.root, wanted.root):
            path = mount.point
        else:
            continue
        if covering(table, path) is mount:
            yield path


def covering(table: list[Mount], path: str) -> Mount:
    """Return the mount that a look-up of ``path`` ends in: what lies under other mounts is not seen."""
    numbers = {mount.number for mount in table}
    current = next(mount for mount in table if mount.parent not in numbers)
    reached = "/"
    while True:
        steps = [
            mount
            for mount in table
            if mount.parent == current.number and below(path, mount.point) and below(mount.point, reached)
        ]
        if not steps:
            return current
        current = min(steps, key=lambda mount: len(mount.point))
        reached = current.point


def _descriptors(init: Process) -> dict[tuple[int, int], str]:
    """Return (device, inode) -> description of what a place's processes hold open and could pass a message through."""
    inode = scan.namespace_inode(f"/proc/{init.pid}/ns/pid")
    found = {}
    for process in scan.in_pid_namespace(inode) if inode is not None else ():
        for descriptor in _listed(f"/proc/{process.pid}/fd"):
            try:
                status = os.stat(descriptor)  # noqa: PTH116 - of what it points to
                name = os.readlink(descriptor)  # noqa: PTH115 - such as pipe:[4711], no path
                flags = Path(descriptor.replace("/fd/", "/fdinfo/")).read_text()
            except OSError:
                continue  # closed meanwhile
            if _carries(status.st_mode, flags):
                found[status.st_dev, status.st_ino] = f"{name} (in {Path(process.argv[0]).name}, pid {process.pid})"
    return found


def _listed(directory: str) -> Iterable[str]:
    try:
        return [entry.path for entry in os.scandir(directory)]
    except OSError:
        return ()


def _carries(mode: int, fdinfo: str) -> bool:
    if stat.S_ISREG(mode):
        flags = next(line.split()[1] for line in fdinfo.splitlines() if line.startswith("flags:"))
        return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _shared_descriptors(held: dict[str, dict[tuple[int, int], str]]) -> Iterator[str]:
    for one, other in combinations(held, 2):
        for key in held[one].keys() & held[other].keys():
            yield f"{one} and {other} both hold {held[one][key]}"


def _extra_links(topology: Topology, place: str) -> Iterator[str]:
    described = json.loads(run_sync("ip", "-n", topology.namespace(place), "-json", "-details", "link", "show"))
    for link in described:
        kind = link.get("linkinfo", {}).get("info_kind")
        if link["ifname"] not in ("lo", UPLINK, BRIDGE) and kind != "tun":
            yield f"{place} has an interface {link['ifname']} ({kind or 'no kind'}) beside {UPLINK}"
