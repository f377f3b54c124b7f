"""What is on disk of a lab, written before anything is made, so that whatever kills us leaves a trail to clear.

::

    /var/lib/emp-lab/NAME/       ($EMP_LAB_DIR instead of /var/lib/emp-lab)
      lab.json                   ``LabState``; the last thing that ``down`` removes
      ca/                        the pool's certificate authority; never visible in any place
      logs/PLACE-ROLE.log
      places/PLACE.json          what process 1 of the place is made from
      places/PLACE/              the place's /var/lib/emp

The lab's directory is also its lock: whoever changes the lab holds a ``flock`` on it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from emp.lab.topology import Network, Topology
from emp.model.errors import BadInput, Conflict, NotFound
from emp.model.names import check_name

DEFAULT_BASE = Path("/var/lib/emp-lab")
LOCK_WAIT_S = 60.0


def base_directory() -> Path:
    """Return where labs are kept: ``$EMP_LAB_DIR``, else ``/var/lib/emp-lab``."""
    return Path(os.environ.get("EMP_LAB_DIR") or DEFAULT_BASE).absolute()


@dataclass(frozen=True)
class LabState:
    """The choices that a lab was made with."""

    name: str
    nodes: int
    port: int
    """of the controller, on the machine's 127.0.0.1"""
    memory_bytes: int
    """that each node offers"""
    vcpus: int
    qemu: str | None
    context: str
    """file of the context that this lab writes"""
    made: list[str]
    """directories that are made for it"""
    created_at: float
    """seconds since the Unix epoch, for people only"""
    faults: bool = False
    """the daemons have their fault points on"""
    keep: bool = False
    """a daemon that ends is started again (``emp.lab.keeper``)"""
    cloud: str | None = None
    """volumes come from a simulated cloud with this latency profile (``emp.lab.region``); None: from a volume server"""
    network: str = Network.L2.value
    remap_s: float = 0.0
    """see ``Options``; the cloud's knob at its first start"""
    efs: bool = False
    """the cloud has EFS"""
    zones: dict[str, str] = field(default_factory=dict)
    """node -> letter of its zone, where it is not the one of the others"""
    off: tuple[str, ...] = ()
    """nodes that somebody has switched off: their absence is no defect"""
    complete: bool = False
    """false until ``up`` has seen the pool ready: without that word it was killed"""

    @property
    def topology(self) -> Topology:
        return Topology(self.name, self.nodes, Network(self.network))


_FIELDS = {each.name for each in fields(LabState)}


class LabFiles:
    """The directory of one lab. ``name`` is checked: it becomes part of paths."""

    def __init__(self, name: str) -> None:
        self.name = check_name(name)
        self.base = base_directory()
        self.directory = self.base / name

    @property
    def state_file(self) -> Path:
        return self.directory / "lab.json"

    @property
    def ca(self) -> Path:
        return self.directory / "ca"

    def data(self, place: str) -> Path:
        return self.directory / "places" / place

    def spec(self, place: str) -> Path:
        return self.directory / "places" / f"{place}.json"

    def faults(self, place: str) -> Path:
        """Where the fault points of a place's daemon are armed and counted, if the lab has them on."""
        return self.data(place) / "faults"

    def log(self, place: str, role: str) -> Path:
        return self.directory / "logs" / f"{place}-{role}.log"

    def load(self) -> LabState:
        """Return the lab's state; ``NotFound`` says which labs there are."""
        try:
            stored = json.loads(self.state_file.read_text())
            # A lab that another version made must still be cleared.
            known = {key: value for key, value in stored.items() if key in _FIELDS}
            return LabState(**{"made": [], **known, "off": tuple(known.get("off", ()))})
        except (FileNotFoundError, NotADirectoryError):
            there = ", ".join(lab_names()) or "none"
            raise NotFound(
                f"there is no lab {self.name!r}",
                field="name",
                hint=f"labs on this machine: {there}; emp lab up makes one",
            ) from None

    def save(self, state: LabState) -> None:
        """Write the state durably, with the directories of the lab."""
        for directory in (self.directory / "places", self.directory / "logs"):
            directory.mkdir(exist_ok=True)
        draft = self.state_file.with_suffix(".new")
        with draft.open("w") as file:
            json.dump(asdict(state), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.state_file)

    def empty(self) -> None:
        """Remove the lab's files, the state last."""
        if self.directory.exists():
            for entry in self.directory.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry != self.state_file:
                    entry.unlink()
            self.state_file.unlink(missing_ok=True)

    @contextmanager
    def locked(self, *, create: bool = False, wait_s: float = LOCK_WAIT_S) -> Iterator[int]:
        """Hold the lab for a change; yields the lock's descriptor. ``NotFound`` without the lab, unless ``create``.

        A child that inherits the descriptor keeps the lock until it lets go. Raises ``Conflict`` after ``wait_s``.
        A directory that is empty at the end is removed, and the one above with the last lab.
        """
        deadline = time.monotonic() + wait_s
        while True:
            if create:
                self.base.mkdir(mode=0o755, parents=True, exist_ok=True)
                self.directory.mkdir(mode=0o700, exist_ok=True)
            try:
                descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                if not create:
                    self.load()
                continue  # a `down` removed it in between
            try:
                _wait_for_lock(descriptor, self.name, deadline)
                if self._is_current(descriptor):
                    try:
                        yield descriptor
                    finally:
                        self._remove_if_empty()
                    return
            finally:
                os.close(descriptor)

    def _remove_if_empty(self) -> None:
        with suppress(OSError):  # a lab is in it, or other labs are beside it
            self.directory.rmdir()
            self.base.rmdir()

    def _is_current(self, descriptor: int) -> bool:
        """Whether the locked directory still has its name: a ``down`` may have removed it while we waited."""
        try:
            return (
                os.path.sameopenfile(descriptor, descriptor)
                and self.directory.stat().st_ino == os.fstat(descriptor).st_ino
            )
        except FileNotFoundError:
            return False


def _wait_for_lock(descriptor: int, name: str, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Conflict(
                    f"the lab {name} is being changed by another command", hint="wait for it to end, then try again"
                ) from None
            time.sleep(0.05)  # flock has no deadline of its own


def lab_names() -> list[str]:
    """Return the names of the labs on this machine, also of those that are only half there."""
    base = base_directory()
    return sorted(path.name for path in base.iterdir() if path.is_dir()) if base.is_dir() else []


def chosen(name: str | None) -> LabFiles:
    """Return the lab that is meant: by name, else by ``EMP_CONTEXT`` if that is a lab, else the only one there is.

    Raises ``NotFound`` when there is none, ``BadInput`` when there are several.
    """
    if name is not None:
        return LabFiles(name)
    names = lab_names()
    if os.environ.get("EMP_CONTEXT") in names:
        return LabFiles(os.environ["EMP_CONTEXT"])
    if not names:
        raise NotFound("there is no lab on this machine", hint="emp lab up makes one")
    if len(names) > 1:
        raise BadInput(f"there are several labs: {', '.join(names)}", field="name", hint="say which one with --name")
    return LabFiles(names[0])
