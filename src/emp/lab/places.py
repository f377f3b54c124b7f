"""Makes the places of a lab, enters them and takes them away. Only what is named after the lab is ever touched."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import emp
from emp.host.processes import Process
from emp.host.run import run_sync
from emp.lab import init, scan
from emp.lab.kernel import (
    CLONE_NEWNET,
    MNT_DETACH,
    MS_BIND,
    MS_REC,
    MS_SHARED,
    join_namespace,
    mount,
    unmount,
    unshare,
)
from emp.lab.preflight import QEMU
from emp.lab.state import LabFiles
from emp.lab.topology import FABRIC, Place, Topology, plug_command
from emp.model.errors import CommandFailed, Conflict, HostError

NAMESPACES = Path("/run/netns")


def check_free(topology: Topology) -> None:
    """Raise ``Conflict`` if a network namespace of one of our names is there already."""
    taken = [name for name in topology.namespaces if (NAMESPACES / name).exists()]
    if taken:
        raise Conflict(
            f"the network namespace {taken[0]} is already taken, and not by a lab of {LabFiles(topology.lab).base}",
            field="name",
            hint=f"choose another name for the lab, or remove it with: ip netns delete {taken[0]}",
        )


def wire(topology: Topology) -> None:
    """Make the network namespaces, cables, switch and addresses. Raises ``HostError``."""
    _prepare_names()
    _make_namespaces(topology.namespaces)
    _ip(topology.namespace(FABRIC), topology.fabric_commands())
    _set(topology.namespace(FABRIC), topology.fabric_settings())
    for place in topology.places:
        _ip(topology.namespace(place.name), topology.place_commands(place))


def rewire(topology: Topology, place: Place) -> None:
    """Give a place a network as new, not plugged in: addresses, filters and queues of the old one are gone."""
    name = topology.namespace(place.name)
    _remove_namespace(name)
    _make_namespaces([name])
    fabric = topology.namespace(FABRIC)
    try:
        _ip(fabric, [f"link delete {place.name}"])
    except CommandFailed:  # the kernel clears the old namespace at its leisure, and the cable with it
        links = json.loads(run_sync("ip", "-n", fabric, "-json", "link", "show"))
        if any(link["ifname"] == place.name for link in links):
            raise
    _ip(fabric, topology.cable_commands(place))
    _ip(name, topology.place_commands(place))


def plug(topology: Topology, place: Place, *, plugged: bool = True) -> None:
    """Connect a place to the switch, or take its cable out. Raises ``HostError``."""
    _ip(topology.namespace(FABRIC), [plug_command(place, "up" if plugged else "down")])


def _prepare_names() -> None:
    """Make the directory of names a shared mount, as ip-netns(8) does before it makes the first one.

    Left to it, the first ``ip netns add`` of anybody would mount the directory over the names that we made before, each
    of them then there twice and not to be removed. Like it we hold a lock on the directory meanwhile.
    """
    NAMESPACES.mkdir(parents=True, exist_ok=True)
    directory = os.open(NAMESPACES, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        try:
            _share_names()
        except OSError as error:
            if error.errno != errno.EINVAL:  # it is no mount yet
                raise
            mount(str(NAMESPACES), str(NAMESPACES), flags=MS_BIND | MS_REC)
            _share_names()
    except OSError as error:
        raise HostError(f"cannot prepare {NAMESPACES} for network namespaces: {error}") from error
    finally:
        os.close(directory)


def _share_names() -> None:
    mount("none", str(NAMESPACES), flags=MS_SHARED | MS_REC)


def _make_namespaces(names: Iterable[str]) -> None:
    problems: list[OSError] = []
    # Network namespaces belong to threads: this one leaves ours for each new one, and ends in the last.
    maker = threading.Thread(target=_visit_new_namespaces, args=(names, problems))
    maker.start()
    maker.join()
    if problems:
        raise HostError(f"cannot make a network namespace: {problems[0]}")


def _visit_new_namespaces(names: Iterable[str], problems: list[OSError]) -> None:
    try:
        for name in names:
            (NAMESPACES / name).touch(mode=0o444, exist_ok=False)
            unshare(CLONE_NEWNET)
            mount("/proc/thread-self/ns/net", str(NAMESPACES / name), flags=MS_BIND)
    except OSError as error:
        problems.append(error)


def _set(namespace: str, settings: Mapping[str, str]) -> None:
    """Write settings below /proc/sys/net, which shows those of the network namespace of who opens it."""
    problems: list[OSError] = []
    setter = threading.Thread(target=_visit_to_set, args=(namespace, settings, problems))
    setter.start()
    setter.join()
    if problems:
        raise HostError(f"cannot set up the network namespace {namespace}: {problems[0]}")


def _visit_to_set(namespace: str, settings: Mapping[str, str], problems: list[OSError]) -> None:
    try:
        join_namespace(str(NAMESPACES / namespace), CLONE_NEWNET)
        for name, value in settings.items():
            Path("/proc/sys/net", name).write_text(value)
    except OSError as error:
        problems.append(error)


def _ip(namespace: str, commands: Iterable[str]) -> None:
    run_sync("ip", "-n", namespace, "-batch", "-", stdin="\n".join(commands) + "\n")


def unwire(topology: Topology) -> None:
    """Remove the network namespaces, however much of them was made. Their interfaces go with them.

    The directory stays, as after ``ip netns delete``: to remove it would detach what is mounted on it in other mount
    namespaces of this machine (rmdir(2) does that), and their network namespaces would be nowhere to be found.
    """
    for name in topology.namespaces:
        _remove_namespace(name)


def _remove_namespace(name: str) -> None:
    path = NAMESPACES / name
    if path.exists():
        with contextlib.suppress(OSError):  # a plain file: we were killed before it was mounted
            unmount(str(path), MNT_DETACH)
        path.unlink()


def furnish(files: LabFiles, places: Iterable[Place], *, hide: Sequence[str], lock: int) -> None:
    """Start process 1 of each place, all at once; returns when all are ready. Raises ``HostError``.

    The new processes inherit ``lock`` while they are in the making, so that a ``down`` after our death waits for them.
    """
    state = files.load()
    readable = readable_directories(state.qemu)
    for place in places:
        files.data(place.name).mkdir(exist_ok=True)
        spec: init.Spec = {
            "place": place.name,
            "network": str(NAMESPACES / state.topology.namespace(place.name)),
            "data": str(files.data(place.name)),
            "keep": readable,
            "hide": [str(files.base), *hide],
        }
        files.spec(place.name).write_text(json.dumps(spec))
    boot(files, places, lock=lock)


def boot(files: LabFiles, places: Iterable[Place], *, lock: int) -> None:
    """``furnish`` with what was written down when the places were made first."""
    starting = [
        subprocess.Popen(
            [sys.executable, "-S", "-m", init.MODULE, str(files.spec(place.name))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(source_directory())},
            pass_fds=(lock,),
            start_new_session=True,
        )
        for place in places
    ]
    problems = [said for child in starting if (said := child.communicate()[1]) or child.returncode]
    if problems:
        raise HostError("cannot make the places: " + (problems[0].strip() or "process 1 ended at once"))


def source_directory() -> Path:
    """Return the directory that holds the package ``emp``."""
    return Path(emp.__file__).resolve().parents[1]


def readable_directories(qemu: str | None) -> list[str]:
    """Return what must stay readable in a place though it lies in a directory that each place has of its own.

    The checkout, the Python that runs us and the QEMU; usually none of them lies there.
    """
    source = source_directory()
    checkout = source.parent if (source.parent / "pyproject.toml").exists() else source
    needed = [checkout, Path(sys.prefix), Path(sys.base_prefix), Path(os.path.realpath(sys.executable)).parent.parent]
    if binary := qemu or shutil.which(QEMU):
        home = Path(binary).resolve().parent
        needed.append(home.parent if home.name == "bin" else home)
    paths = {str(path.absolute()) for path in needed}
    inner = [path for path in paths if any(init.below(path, private) and path != private for private in init.PRIVATE)]
    return sorted(path for path in inner if not any(other != path and init.below(path, other) for other in inner))


def inits(files: LabFiles) -> dict[str, Process]:
    """Return place -> its live process 1. Nothing is looked up in a file: its title says whose it is."""
    found = {}
    for candidate in scan.running(_may_be_init):
        match candidate.argv:
            case [first, "infinity"] if first.startswith(init.title(f"{files.directory}/places/")):
                found[Path(first).stem] = candidate.process
    return found


def _may_be_init(path: str) -> bool:
    try:
        return init.MODULE.encode() in Path(path, "cmdline").read_bytes()
    except OSError:
        return False


def init_of(files: LabFiles, place: str) -> Process:
    """Return process 1 of a place of this lab; ``NotFound`` if there is no such place, ``HostError`` if it is dead,
    ``Conflict`` if it is switched off."""
    state = files.load()
    state.topology.place(place)
    process = inits(files).get(place)
    if process is None and place in state.off:
        hint = f"emp lab power --name {files.name} {place} on"
        raise Conflict(f"{place} of the lab {files.name} is switched off", field="where", hint=hint)
    if process is None:
        raise HostError(
            f"the place {place} of the lab {files.name} is dead",
            hint=f"clear the lab: emp lab down --name {files.name}",
        )
    return process


def enter_argv(process: Process) -> list[str]:
    """Return the command prefix that runs a program inside the place of this process 1."""
    return ["nsenter", "--target", str(process.pid), "--mount", "--pid", "--net", "--ipc", "--uts", "--"]
