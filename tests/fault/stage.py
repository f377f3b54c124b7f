"""A pool with its fault points on, an EVM that works in it, and witnesses: where one cell after another is played.

``Stage.playing`` begins a migration under the witnesses' eyes; a cell then holds it at a point, breaks something, and
says what it expects. ``Stage.heal`` puts everything back; the checks after it are in ``verdict``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from emp import faults
from emp.client.client import Client
from emp.faults import Hit
from emp.lab import daemons, partition, places, power, scan, verbs
from emp.lab.checkers import end_state, epochs, frames, leftovers, owners, records, resumes
from emp.lab.checkers.frames import FrameWitness
from emp.lab.checkers.vcpus import VcpuWitness
from emp.lab.down import down
from emp.lab.journal_check import check_journal
from emp.lab.partition import How
from emp.lab.power import Power
from emp.lab.ready import wait_ready
from emp.lab.region import Profile
from emp.lab.topology import CTL, VOL
from emp.lab.up import Options, up
from emp.model.errors import Conflict, EmpError, NotFound
from emp.model.migration import Migration
from emp.network.tap_driver import interface_name
from tests.fault.mount import Mount
from tests.lab.conftest import Pool
from tests.lab.pool import Subject
from tests.leaks import outliving

T = TypeVar("T")

MEMORY_BYTES = 104 << 20
REWRITTEN_BYTES = 4 << 20
REWRITE_BYTES_PER_S = 16 << 20
JOURNAL_HZ = 40
VOLUMES = ["io2:64MiB", "gp3:64MiB"]
"""one that moves before the switchover, and one that is relayed and moves after it"""
CLOUD_VOLUMES = ["io2:4GiB", "gp3:1GiB"]
"""the smallest there is; the records fill no more of it than of the other"""
CLOUD = Profile.INSTANT
"""what the labs have unless they are asked for another, or for none"""
CLOUD_POINTS = {"volumes.fence": "volumes.tag"}
"""what a cloud is asked instead: it knows no fence, and the driver writes a tag"""
CRASHES = 3
HEALED_S = 30.0
"""in which a healed pool must have one healthy EVM again"""
WAIT_S = 40.0
SLOW_BYTES_PER_S = 30_000_000
"""a brownout of some two seconds: long enough to be held in"""

_numbers = itertools.count(1)


class NotSeen(AssertionError):
    """Something that a cell waits for did not happen in time."""


def until(condition: Callable[[], T | None], what: str, *, timeout_s: float = WAIT_S) -> T:
    """Return the first result of ``condition`` that is true; raise ``NotSeen`` if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise NotSeen(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.02)
    return found


@dataclass
class Before:
    """How the EVM was before a cell broke anything."""

    boot_id: str
    uptime_s: float
    source: str
    began_s: float
    stock: leftovers.Stock


class Stage:
    """One lab, one EVM. ``source`` and ``target`` are the ends of the migration that is being played."""

    def __init__(self, name: str, nodes: int = 3, *, cloud: Profile | None = None) -> None:
        with outliving(f"the lab {name}"):
            self.pool = Pool(up(Options(name, nodes, faults=True, cloud=cloud)))
            self.mount = Mount(self.pool) if cloud else None
        self.files = self.pool.files
        self.client = Client(self.pool.context)
        self.evm: Subject | None = None
        self.before: Before | None = None
        self.source = self.target = ""
        self.acked: dict[str, int] = {}
        self.crashes = 0
        """of this EVM: the controller waits ever longer before it starts one again that keeps crashing"""
        self.kept_frozen: set[str] = set()
        self.fenced: list[tuple[float, str]] = []
        """when which node was proved off"""
        self.journals: dict[str, bytes] = {}
        """node -> its journal as it was before the migration"""
        self._aside: dict[Path, bytes] = {}
        self._doubted = False
        self.played = 0
        self.vcpus: VcpuWitness
        self.frames: FrameWitness
        self.migration: Migration | None = None

    def close(self) -> None:
        self.client.close()
        down(self.files)

    # -- places

    @property
    def volumes(self) -> list[str]:
        """What the EVM's volumes are asked for as."""
        return CLOUD_VOLUMES if self.pool.state.cloud else VOLUMES

    @property
    def third(self) -> str:
        return next(n.name for n in self.pool.topology.node_places if n.name not in (self.source, self.target))

    def place_of(self, party: str) -> str:
        """Return the place of a party of the matrix: C, S, T or V."""
        return {"C": CTL.name, "S": self.source, "T": self.target, "V": VOL.name}[party]

    def role_of(self, party: str) -> str:
        return {"C": "controller", "S": "agent", "T": "agent", "V": "volumes"}[party]

    # -- the EVM

    @property
    def subject(self) -> Subject:
        assert self.evm is not None
        return self.evm

    def ready(self) -> None:
        """Have an EVM that works: made anew when there is none, it crashed often, or its volume is half full."""
        is_full = sum(self.acked.values()) > (VOLUME_RECORDS // 2)
        if self.evm is not None and (is_full or self.crashes >= CRASHES):
            self.drop_evm()
        if self.evm is None:
            self._make_evm()
        guest = self.subject.guest()
        guest.wait_first_packet()
        if not guest.ask("status")["memory"]["bytes"]:
            guest.ask(f"memory {REWRITTEN_BYTES} {REWRITE_BYTES_PER_S}")
        running = {journal["serial"] for journal in guest.ask("status")["journals"] if journal["running"]}
        for volume in self.subject.volumes:
            if volume.serial not in running:
                guest.start_journal(volume.serial, JOURNAL_HZ)
        if self.mount:
            self.mount.begin(self.subject)
        self.source = self.subject.record.owner or ""
        nodes = [place.name for place in self.pool.topology.node_places]
        if not self.played:  # daemons that have done nothing yet hold less than they will
            for node in nodes[1:]:
                self.subject.migrate(node)
            self.source, self.played = nodes[-1], 1
        self.target = nodes[(nodes.index(self.source) + 1) % len(nodes)]

    def _make_evm(self) -> None:
        name = f"evm-{next(_numbers)}"
        with outliving(f"the lab {self.pool.name}"):
            efs = [self.mount.id] if self.mount else []
            made = self.client.evms.create(
                {"name": name, "memory_bytes": MEMORY_BYTES, "node": "n1", "volumes": self.volumes, "efs": efs}
            )
        self.evm = Subject(self.pool, self.client, made.spec)
        self.acked = {}
        self.crashes = 0

    def drop_evm(self) -> None:
        """Delete the EVM, and wait until it is gone."""
        if self.evm is not None:
            name, self.evm = self.evm.name, None
            with contextlib.suppress(NotFound):
                self.client.evms.delete(name, grace_s=0)

    @contextmanager
    def forged_spec(self, **fields: Any) -> Iterator[None]:
        """Change the EVM's spec in the controller's store for the length of the block; its machine stays as it is."""
        true = {name: getattr(self.subject.spec, name) for name in fields}
        self.forge(lambda record: record | {"spec": record["spec"] | fields})
        try:
            yield
        finally:
            self.forge(lambda record: record | {"spec": record["spec"] | true})

    def forge(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Change the EVM's record on the controller's disk, behind its back."""
        with contextlib.suppress(NotFound):
            self.kill("C")
        with closing(sqlite3.connect(self.files.data(CTL.name) / "controller.db")) as store, store:
            key, value = store.execute(
                "SELECT key, value FROM kv WHERE key LIKE ?", (f"%/evms/{self.subject.name}",)
            ).fetchone()
            forged = json.dumps(change(json.loads(value))).encode()
            store.execute("UPDATE kv SET value = ? WHERE key = ?", (forged, key))
        self.start("C")
        wait_ready(self.files, self.pool.state, self.pool.context)

    # -- faults

    def arm(self, party: str, point: str, action: str, *, nth: int = 1, times: int = 1) -> None:
        """Arm a point of the daemon of a party (C, S, T, V)."""
        faults.arm(self.files.faults(self.place_of(party)), self._point(point), action, nth=nth, times=times)

    def _point(self, point: str) -> str:
        """Return the point's name in the daemons of this lab."""
        order, _, moment = point.rpartition(".")
        return f"{CLOUD_POINTS[order]}.{moment}" if self.pool.state.cloud and order in CLOUD_POINTS else point

    def hits(self, place: str) -> list[Hit]:
        """Return what a place's daemon has reached since the cell began."""
        since_s = self.before.began_s if self.before else 0.0
        return [hit for hit in faults.hits(self.files.faults(place)) if hit.at_s >= since_s]

    def reached(self, party: str, point: str, action: str | None = None) -> Hit | None:
        """Return the last time that a point was reached in this cell, by the daemon that the party has."""
        name, hits = self._point(point), self.hits(self.place_of(party))
        found = [hit for hit in hits if hit.point == name and action in (None, hit.action)]
        return found[-1] if found else None

    def wait_point(self, party: str, point: str, action: str | None = None, *, timeout_s: float = WAIT_S) -> Hit:
        return until(lambda: self.reached(party, point, action), f"{party} reaches {point}", timeout_s=timeout_s)

    def freeze_at(self, party: str, point: str) -> None:
        """Arm a point so that the daemon stops itself there; ``wait_frozen`` returns when it has."""
        self.arm(party, point, "stop")

    def wait_frozen(self, party: str, point: str) -> None:
        self.wait_point(party, point, "stop")
        process = daemons.find(self.files, self.place_of(party), self.role_of(party))
        until(lambda: process is not None and scan.frozen(process), f"{party} is frozen at {point}")

    def thaw(self, party: str) -> None:
        """Let a daemon go on; one that is gone meanwhile, or whose node is off, does not."""
        with contextlib.suppress(EmpError):
            verbs.cont(self.files, self.place_of(party), self.role_of(party))

    def keep_frozen(self, party: str) -> None:
        """The end of the hold does not wake this daemon: what breaks does, when it is over."""
        self.kept_frozen.add(party)

    def set_aside(self, path: Path) -> None:
        """Keep a file's content; ``heal`` puts it back."""
        self._aside[path] = path.read_bytes()

    def kill(self, party: str) -> None:
        verbs.kill(self.files, self.place_of(party), self.role_of(party))

    def stop(self, party: str) -> None:
        verbs.stop(self.files, self.place_of(party), self.role_of(party))

    def start(self, party: str) -> None:
        """Start a dead daemon; returns before it is ready."""
        with outliving(f"the lab {self.pool.name}"), contextlib.suppress(EmpError):
            verbs.start(self.files, self.place_of(party), self.role_of(party))

    def qemu(self, node: str) -> int | None:
        with contextlib.suppress(Conflict):  # the node is off
            if found := daemons.find(self.files, node, f"qemu:{self.subject.name}"):
                return found.pid
        return None

    def kill_qemu(self, party: str) -> None:
        verbs.kill(self.files, self.place_of(party), f"qemu:{self.subject.name}")

    def stop_qemu(self, party: str) -> None:
        verbs.stop(self.files, self.place_of(party), f"qemu:{self.subject.name}")

    def cont_qemu(self, party: str) -> None:
        with contextlib.suppress(EmpError):
            verbs.cont(self.files, self.place_of(party), f"qemu:{self.subject.name}")

    def fence(self, node: str, why: str) -> None:
        self.client.nodes.fence(node, confirm=True, reason=why)
        self.fenced.append((time.monotonic(), node))

    def cut(self, one: str, other: str, how: How = How.DROP) -> None:
        partition.cut(self.files, self.place_of(one), self.place_of(other), how=how)

    def mend(self, one: str, other: str) -> None:
        partition.heal(self.files, self.place_of(one), self.place_of(other))

    # -- one cell

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Watch all nodes while a cell is played."""
        status = self.subject.guest().ask("status")
        self.before = Before(
            str(status["boot_id"]),
            float(status["uptime_s"]),
            self.source,
            time.monotonic(),
            self.stock(),
        )
        self.note_acked()
        if self.mount:
            self.mount.watch(self.subject)
        self.played += 1
        self.migration = None
        self.kept_frozen.clear()
        self.fenced.clear()
        nodes = [place.name for place in self.pool.topology.node_places]
        paths = {node: self.files.data(node) / "journal" for node in nodes}
        self.journals = {node: path.read_bytes() for node, path in paths.items() if path.exists()}
        macs = [mac for mac, _ in self.subject.spec.addresses]
        with (
            VcpuWitness(self.files, self.subject.name) as self.vcpus,
            FrameWitness(self.pool.topology, macs) as self.frames,
        ):
            yield

    def note_acked(self) -> int:
        """Write down up to which record the guest has been told that it is safe; return how many that are."""
        with contextlib.suppress(EmpError):
            journals = self.subject.guest().ask("status", timeout_s=1.0)["journals"]
            if self.mount:
                self.mount.note(journals)
            for journal in (journal for journal in journals if not journal["serial"].startswith("/")):
                serial = str(journal["serial"])
                self.acked[serial] = max(self.acked.get(serial, -1), int(journal["acked_seq"]))
        return sum(self.acked.values())

    def begin(self, **policy: Any) -> Migration:
        """Begin the migration from ``source`` to ``target``."""
        self.migration = self.subject.begin(self.target, **policy)
        return self.migration

    def runs_alone(self) -> str | None:
        """Return the node whose QEMU is the only one of the EVM, once its guest answers; needs no controller."""
        alive = [place.name for place in self.pool.topology.node_places if self.qemu(place.name)]
        if len(alive) != 1:
            return None
        with contextlib.suppress(EmpError):
            self.subject.guest().ask("status", timeout_s=0.5)
            return alive[0]
        return None

    def heal(self) -> None:
        """Disarm, thaw, mend, switch on and start everything."""
        for place in self.pool.topology.places:
            faults.disarm(self.files.faults(place.name))
        partition.heal(self.files)
        with outliving(f"the lab {self.pool.name}"):
            for place in self.pool.topology.node_places:
                power.switch(self.files, place.name, Power.ON)
        self._restore()
        for status in verbs.status(self.files):
            for evm in status.evms:
                with contextlib.suppress(NotFound):
                    verbs.cont(self.files, status.name, f"qemu:{evm}")
            if status.state == "frozen":
                verbs.cont(self.files, status.name, status.role)
            elif status.state == "dead":
                with outliving(f"the lab {self.pool.name}"):
                    verbs.start(self.files, status.name, status.role)

    def _restore(self) -> None:
        """Put back what was set aside, as a person does: with its daemon stopped. Then let the nodes count again."""
        for path, content in self._aside.items():
            with contextlib.suppress(NotFound):
                verbs.kill(self.files, path.parent.name, "agent")
            path.write_bytes(content)
            self._doubted = True
        self._aside.clear()

    def keep_logs(self, directory: Path) -> None:
        """Copy the daemons' and QEMUs' logs, and the points that were reached, for a person to read."""
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self.files.directory / "logs", directory)
        for place in self.pool.topology.places:
            if place.name in places.inits(self.files):
                init = places.init_of(self.files, place.name)
                for log in Path(f"/proc/{init.pid}/root/run/emp/evm").glob("*/*.log"):
                    shutil.copy(log, directory / f"{place.name}-qemu-{log.parent.name}.log")
            hits = self.files.faults(place.name) / "hits"
            if hits.exists():
                shutil.copy(hits, directory / f"{place.name}-points")

    # -- what came of it

    def settled(self) -> list[str]:
        """Return what is still wrong with the healed pool, none once it is whole."""
        if self._doubted:
            self._readmit()
        return end_state.check(self.files, self.client, self.subject.name)

    def _readmit(self) -> None:
        """A person has seen that the right journal is back."""
        with contextlib.suppress(EmpError):
            for node in self.client.nodes.list().items:
                if node.quarantine is not None and node.report.journal is None:
                    self.client.nodes.readmit(node.name, confirm=True)

    def outcome(self) -> str:
        """Return the matrix's letter for what the EVM has gone through. Only once the pool is whole."""
        assert self.before is not None
        self.subject.guest().wait_first_packet()  # after a cold restart it boots for a while
        status = self.subject.guest().ask("status")
        owner = self.subject.record.owner
        if status["boot_id"] != self.before.boot_id:
            self.crashes += 1
            return "K"
        if owner == self.target:
            return "C"
        return "R" if self.reached("S", "journal.given.after_fsync") else "A"

    def violations(self) -> dict[str, list[str]]:
        """Return checker -> what it found. The guest's journal and memory are looked at and go on."""
        assert self.before is not None
        nodes = {place.name: self.hits(place.name) for place in self.pool.topology.node_places}
        held = owners.tenures(self.before.source, nodes, since_s=self.before.began_s, fenced=self.fenced)
        return {
            "double run: vCPU threads": self.vcpus.violations(),
            "double run: QMP events": resumes.violations(self.before.source, nodes, self.vcpus.ended),
            "double run: journals": owners.violations(held),
            "double run: volume server": self._epochs(),
            "network": frames.violations(self.frames.seen, held),
            "disk": self._disk(),
            "efs": self._efs(),
            "memory": self._memory(),
            "end state": self._at_the_end(self.settled),
            "residue": self._at_the_end(self._residue),
            "records": records.check_ends(self.client, self.subject.name) + records.check_secrets(self.files),
        }

    def _epochs(self) -> list[str]:
        log = self.files.data(VOL.name) / "epochs.log"
        each = (epochs.violations(log, v.id, single=not v.type.multi_attach) for v in self.subject.volumes)
        return [wrong for volume in each for wrong in volume]

    def _disk(self) -> list[str]:
        wrong = []
        for volume in self.subject.volumes:
            self.note_acked()
            with contextlib.suppress(EmpError):
                journals = self.subject.guest().ask(f"journal stop {volume.serial}")
                for journal in (journal for journal in journals if journal["serial"] == volume.serial):
                    acked = int(journal["acked_seq"])
                    self.acked[volume.serial] = max(self.acked.get(volume.serial, -1), acked)
                    wrong += [f"{journal['errors']} writes of the guest failed"] if journal["errors"] else []
            found = check_journal(volume_file(self.pool, volume.id))
            missing = found.missing(self.acked.get(volume.serial, -1))
            wrong += [*found.errors, *([f"{missing} acknowledged records are missing"] if missing else [])]
            with contextlib.suppress(EmpError):
                self.subject.guest().start_journal(volume.serial, JOURNAL_HZ)
        return wrong

    def _efs(self) -> list[str]:
        assert self.before is not None
        if self.mount is None:
            return []
        with contextlib.suppress(EmpError):
            same = self.subject.boot_id == self.before.boot_id
            return self.mount.violations(self.subject, same_boot=same)
        return ["the guest does not answer"]

    def _memory(self) -> list[str]:
        assert self.before is not None
        try:
            verified, status = self.subject.guest().ask("verify"), self.subject.guest().ask("status")
        except EmpError as error:
            return [str(error)]
        wrong = [f"{verified['mismatches']} pages are not what was written"] if verified["mismatches"] else []
        if status["boot_id"] == self.before.boot_id and status["uptime_s"] < self.before.uptime_s:
            wrong.append("the guest's clock went back")
        return wrong

    def stock(self) -> leftovers.Stock:
        """Take stock of all but the EVM itself: ``end_state`` looks for every trace of it."""
        subject = self.subject
        ours = {subject.name, *subject.spec.volumes, interface_name(subject.name, 0)}
        return leftovers.take(self.files, ignore=frozenset(ours))

    def _residue(self) -> list[str]:
        assert self.before is not None
        return self.stock().left(self.before.stock)

    @staticmethod
    def _at_the_end(look: Callable[[], list[str]]) -> list[str]:
        """A pool comes to rest a while after it is healed: agents report anew, idle connections close."""
        deadline = time.monotonic() + 20.0
        while (wrong := look()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return wrong

    @property
    def ended(self) -> Migration | None:
        """The migration's record, as the controller has it."""
        with contextlib.suppress(EmpError):
            return self.client.migrations.get(self.migration.id) if self.migration else None
        return None


VOLUME_RECORDS = (64 << 20) // 4096


def volume_file(pool: Pool, volume: str) -> Path:
    """Return the file below a volume."""
    return pool.files.data(VOL.name) / "images" / f"{volume}.raw"


class Stages:
    """Hands out one stage again and again, a new one after it was found broken. ``cloud``: where its volumes are of."""

    def __init__(self, cloud: Profile | None = CLOUD) -> None:
        self._cloud = cloud
        self._made = itertools.count(1)
        self._stage: Stage | None = None

    def whole(self) -> Stage:
        """Return a stage whose EVM is ready."""
        if self._stage is not None:
            try:
                self._stage.ready()
            except (EmpError, AssertionError):
                self.discard()
        if self._stage is None:
            self._stage = Stage(f"faults-{next(self._made)}", cloud=self._cloud)
            self._stage.ready()
        return self._stage

    def discard(self) -> None:
        if self._stage is not None:
            self._stage.close()
            self._stage = None

    close = discard
