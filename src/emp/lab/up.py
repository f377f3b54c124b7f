"""Brings a lab up: places, credentials, daemons; returns when the pool can be used."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from emp.client import context as contexts
from emp.client.context import Context
from emp.lab import bytecode, daemons, places, preflight
from emp.lab.debian import NAME as DEBIAN
from emp.lab.debian import ensure_debian
from emp.lab.down import clear
from emp.lab.images import Image, ensure_image
from emp.lab.nfs_program import NfsProgram, ensure_nfs_program
from emp.lab.ready import wait_ready
from emp.lab.region import Profile, check_zones
from emp.lab.state import LabFiles, LabState
from emp.lab.topology import Network, Topology
from emp.model.errors import AlreadyExists, BadInput, MissingDependency, NotFound
from emp.wire.secret import Secret

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What a user may choose of a lab."""

    name: str
    nodes: int = 2
    port: int | None = None
    memory_bytes: int = 4 << 30
    vcpus: int = 8
    faults: bool = False
    """give every daemon its fault points (``emp.faults``)"""
    keep: bool = False
    """start a daemon that ends again, as systemd would"""
    cloud: Profile | None = None
    """take volumes from a simulated cloud, with these latencies"""
    network: Network = Network.L2
    """``vpc`` needs a cloud, and has one that takes no time if none is named"""
    remap_s: float = 0.0
    """what that cloud takes to send an address to another interface"""
    zones: Mapping[str, str] = field(default_factory=dict)
    """node -> letter of its zone in the cloud; ``a`` if left out"""
    images: tuple[str, ...] = ()
    """guest images beside `micro`"""


def up(options: Options, say: Say = lambda line: None) -> LabState:
    """Make a lab and return when its pool is ready: the controller answers and every agent has reported.

    What is left of a broken lab of that name is cleared first. Raises ``AlreadyExists`` when a whole one is there,
    ``Conflict`` when a port or a namespace is taken, ``MissingDependency``, ``BadInput``, ``HostError``; after an error
    nothing is left.
    """
    network = Network(options.network)
    if network is Network.VPC and options.cloud is None:
        options = replace(options, cloud=Profile.INSTANT)
    topology = Topology(options.name, options.nodes, network)
    zones = check_zones(options.zones, [place.name for place in topology.node_places])
    preflight.check_programs()
    qemu, version = preflight.check_qemu()
    files = LabFiles(options.name)
    with files.locked(create=True) as lock:
        _refuse_whole(files, say)
        try:
            clear(files)  # what a command that was killed has left
            places.check_free(topology)
            _check_context(options.name)
            images = _images(options.images, say)
            nfs = _nfs_program(say) if options.cloud else None
            with daemons.people_socket(options.port) as people:
                state = LabState(
                    name=options.name,
                    nodes=options.nodes,
                    port=people.getsockname()[1],
                    memory_bytes=options.memory_bytes,
                    vcpus=options.vcpus,
                    qemu=qemu,
                    context=str(contexts.file_of(options.name)),
                    made=[str(path) for path in contexts.missing_directories()],
                    created_at=time.time(),
                    faults=options.faults,
                    keep=options.keep,
                    cloud=options.cloud,
                    network=network,
                    remap_s=options.remap_s,
                    efs=nfs is not None,
                    zones=zones,
                )
                files.save(state)
                volumes = "a simulated cloud" if options.cloud else "a volume server"
                say(f"making {counted(options.nodes, 'node')}, a controller, {volumes} (QEMU {version})")
                context = _make(files, state, images, nfs, people, lock)
            say("waiting for the agents to report")
            wait_ready(files, state, context)
            state = replace(state, complete=True)
            files.save(state)
        except BaseException:
            say("clearing what was made of it")
            clear(files)
            raise
    return state


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _images(names: Sequence[str], say: Say) -> list[Image]:
    """Return `micro`, and those that were asked for. Raises ``BadInput`` for one that there is not."""
    for name in set(names) - {"micro", DEBIAN}:
        raise BadInput(
            f"there is no image {name[:40]!r}", field="image", hint=f"micro, which is always there, or {DEBIAN}"
        )
    images = [ensure_image(cache=_cache(), notice=say)]
    return [*images, ensure_debian(_cache(), notice=say)] if DEBIAN in names else images


def _nfs_program(say: Say) -> NfsProgram | None:
    """Return the NFS server of the cloud's EFS. A lab where it cannot be had does without."""
    try:
        return ensure_nfs_program(_cache(), notice=say)
    except MissingDependency as error:
        say(f"the cloud has no EFS: {error}")
        return None


def _cache() -> Path | None:
    """Return the cache of the user who works here: root has none of its own under sudo. None: ``EMP_CACHE``."""
    return None if "EMP_CACHE" in os.environ else Path(contexts.invoking_user().pw_dir) / ".cache" / "emp"


def _refuse_whole(files: LabFiles, say: Say) -> None:
    """Raise ``AlreadyExists`` if the lab is there and whole; say what is dead in it otherwise."""
    try:
        state = files.load()
    except NotFound:
        return
    missing = broken_parts(files, state)
    if not missing:
        raise AlreadyExists(
            f"the lab {files.name} is up",
            field="name",
            hint=f"emp lab down --name {files.name} removes it; or choose another --name",
        )
    say(f"the lab {files.name} is there but broken (dead: {', '.join(missing)}): clearing it first")


def _check_context(name: str) -> None:
    path = contexts.file_of(name)
    if path.exists():
        raise AlreadyExists(
            f"there is a context {name!r} already, of another pool",
            field="name",
            hint=f"it is {path}; choose another name",
        )


def broken_parts(files: LabFiles, state: LabState) -> list[str]:
    """Return which places or daemons of a lab are not running, empty for a whole lab."""
    alive = places.inits(files)
    missing = [] if state.complete else ["the command that made it"]
    for place in state.topology.places:
        if place.name in state.off:
            continue
        if place.name not in alive:
            missing.append(place.name)
        elif place.role is not None and not daemons.started(files, place):
            missing.append(f"{place.role} on {place.name}")
    return missing


def _make(
    files: LabFiles,
    state: LabState,
    images: Sequence[Image],
    nfs: NfsProgram | None,
    people: socket.socket,
    lock: int,
) -> Context:
    with ThreadPoolExecutor(4) as pool:
        credentials = pool.submit(daemons.prepare, files, state, images, nfs)
        compiled = pool.submit(bytecode.ensure)
        contexts.make_directory()  # so that the places can hide it
        places.wire(state.topology)
        places.furnish(files, state.topology.places, hide=[str(contexts.directory())], lock=lock)
        ca_pem = credentials.result()
        compiled.result()
        staffed = [place for place in state.topology.places if place.role is not None]
        for started in [pool.submit(daemons.spawn, files, state, place, people) for place in staffed]:
            started.result()
    context = Context(
        name=state.name,
        url=f"https://{daemons.HOST}:{state.port}",
        server_name="controller-main",
        ca_pem=ca_pem.decode(),
        token=Secret(daemons.token(files)),
    )
    contexts.save_context(context)
    return context
