"""What the acceptance tests share: one test's EVM, as the API, the lab's network and the machine below see it.

No test is about speed, so every wait is for a condition, with a deadline after which something must be wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from emp.client.client import Client
from emp.host.run import run_sync
from emp.lab import daemons, partition, places, verbs
from emp.lab.guest_control import Guest
from emp.lab.topology import VOL
from emp.model.errors import EmpError, NotFound
from emp.model.evm import Evm, EvmSpec, EvmState
from emp.model.migration import Migration, Outcome, Stage
from emp.model.volume import Volume
from emp.network.tap_driver import interface_name
from tests.lab.conftest import Pool

T = TypeVar("T")

WAIT_S = 60.0
RELAY = "emp.volumes.relay"
HEARTBEATS_S = 10.0
MEMORY_BYTES = 128 << 20
SLOW_BYTES_PER_S = 4_000_000
"""at this rate the source brownout of a small EVM, of which some 80 MB are sent, takes twenty seconds"""
_numbers = itertools.count(1)


def until(condition: Callable[[], T | None], what: str, *, timeout_s: float = WAIT_S) -> T:
    """Return the first result of ``condition`` that is true; fail the test if there is none in time."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.05)
    return found


@dataclass(frozen=True)
class Subject:
    """The EVM of one test."""

    pool: Pool
    client: Client
    spec: EvmSpec

    @property
    def name(self) -> str:
        return self.spec.name

    # -- as the pool's records have it

    @property
    def record(self) -> Evm:
        return self.client.evms.get(self.name)

    @property
    def volumes(self) -> tuple[Volume, ...]:
        return tuple(self.client.volumes.get(volume) for volume in self.record.spec.volumes)

    def wait(self, state: EvmState) -> Evm:
        """Return the record once it says ``state``."""
        return until(lambda: ((found := self.record).state is state and found) or None, f"{self.name} is {state}")

    def claims(self) -> dict[str, EvmState]:
        """Return node -> state for every node whose agent reports this EVM."""
        nodes = self.client.nodes.list().items
        return {node.name: evm.state for node in nodes for evm in node.report.evms if evm.name == self.name}

    # -- as a client in the lab's network has it

    def guest(self, nic: int = 0) -> Guest:
        return Guest(self.pool.topology, self.spec.nics[nic].address)

    def pod(self, number: int = 0) -> Guest:
        return Guest(self.pool.topology, self.spec.pods[number].address)

    def start_journal(self, volume: Volume, rate_hz: int) -> None:
        """Let the guest append records to a volume."""
        self.guest().start_journal(volume.serial, rate_hz)

    @property
    def boot_id(self) -> str:
        return str(self.guest().ask("status")["boot_id"])

    def reboots(self, earlier: str) -> str:
        """Return the boot id of the boot after ``earlier``, once it answers."""

        def later() -> str | None:
            with contextlib.suppress(EmpError):
                found = str(self.guest().ask("status", timeout_s=1.0)["boot_id"])
                return found if found != earlier else None
            return None

        return until(later, f"{self.name} boots anew")

    # -- as the machine below has it

    def qemus(self) -> dict[str, int]:
        """Return node -> pid of every QEMU of this EVM; on a node that is off runs none."""
        off = self.pool.files.load().off
        found = {
            place.name: daemons.find(self.pool.files, place.name, f"qemu:{self.name}")
            for place in self.pool.topology.node_places
            if place.name not in off
        }
        return {node: process.pid for node, process in found.items() if process}

    def traces(self, node: str) -> list[str]:
        """Return in words what there is of the EVM on a node: its QEMU, taps, files, and open volumes."""
        pool, name = self.pool, self.name
        links = json.loads(run_sync("ip", "-n", pool.topology.namespace(node), "-json", "link", "show"))
        taps = {interface_name(name, number) for number in range(len(self.spec.nics))}
        root = Path(f"/proc/{places.init_of(pool.files, node).pid}/root")
        files = [root / "run/emp/evm" / name, root / "var/lib/emp/evms" / f"{name}.json"]
        exports = daemons.daemons(pool.files, pool.topology.place(VOL.name))
        opened = {f"{volume.id}.{node}." for volume in self.volumes}
        relays = [found for found in daemons.daemons(pool.files, pool.topology.place(node)) if RELAY in found.argv]
        mine = [word for relay in relays for word in relay.argv for v in self.volumes if v.id in word]
        return [
            *(f"QEMU {pid}" for where, pid in self.qemus().items() if where == node),
            *(f"tap {link['ifname']}" for link in links if link["ifname"] in taps),
            *(f"{file.relative_to(root)}" for file in files if file.exists()),
            *(f"export {word}" for served in exports for word in served.argv if word.startswith(tuple(opened))),
            *(f"relay {word}" for word in mine),
            *(f"attachment of {v.id}" for v in self.volumes for a in v.attachments if a.node == node),
        ]

    def astray(self, node: str) -> list[str]:
        """Return in words what contradicts that the EVM runs on ``node``, by every account, and nowhere else."""
        record, claims = self.record, self.claims()
        found = [] if record.owner == node else [f"the record names {record.owner}"]
        found += [] if record.state is EvmState.RUNNING else [f"the record says {record.state}: {record.reason}"]
        found += [] if record.migration is None else [f"{record.migration} is open"]
        found += [] if claims == {node: EvmState.RUNNING} else [f"agents report {claims}"]
        found += [] if node in self.qemus() else [f"no QEMU on {node}"]
        others = [place.name for place in self.pool.topology.node_places if place.name != node]
        return found + [f"{other} has {trace}" for other in others for trace in self.traces(other)]

    def check_only_on(self, node: str) -> None:
        """Fail unless the EVM runs on ``node`` alone; what heartbeats tell may come a moment later."""
        deadline = time.monotonic() + HEARTBEATS_S
        while (found := self.astray(node)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if found:
            pytest.fail(f"{self.name} is not on {node} alone: {'; '.join(found)}")

    # -- moving

    def begin(self, target: str | None = None, **policy: Any) -> Migration:
        return self.client.migrations.start(self.name, target=target, policy=policy)

    def begin_slow(self, target: str, *, bytes_per_s: int = SLOW_BYTES_PER_S) -> Migration:
        """Begin a migration that stays in its source brownout for long, and return once memory is being sent."""
        migration = self.begin(target, max_bandwidth_bytes_per_s=bytes_per_s)

        def sending() -> Migration | None:
            now = self.client.migrations.get(migration.id)
            assert now.stage in (Stage.PREPARATION, Stage.SOURCE_BROWNOUT), now
            return now if now.progress.sent_bytes else None

        return until(sending, "memory is sent")

    def end_of(self, migration: Migration) -> Migration:
        """Return the migration once it is closed."""
        return list(self.client.migrations.events(migration.id))[-1]

    def migrate(self, target: str | None = None, **policy: Any) -> Migration:
        """Migrate, and fail the test if that does not complete."""
        ended = self.end_of(self.begin(target, **policy))
        assert ended.outcome is Outcome.COMPLETED, ended.cause
        return ended

    def tell_qemu(self, node: str, command: str) -> None:
        """Send a QMP command to its QEMU on a node behind the agent's back, through the monitor of the guard."""
        init = places.init_of(self.pool.files, node)
        with socket.socket(socket.AF_UNIX) as monitor, monitor.makefile("rw") as lines:
            monitor.settimeout(WAIT_S)
            monitor.connect(f"/proc/{init.pid}/root/run/emp/evm/{self.name}/guard")
            lines.readline()
            for line in ("qmp_capabilities", command):
                lines.write(json.dumps({"execute": line}) + "\n")
                lines.flush()
                while "return" not in (answer := json.loads(lines.readline())):
                    assert "error" not in answer, answer

    # -- typing

    def shell(self) -> None:
        """Return once the console shows a prompt: what is typed earlier may be lost."""
        self.type("")
        prompt = re.compile(re.escape(f"{self.name}:".encode()) + rb"\S*# ")
        shown = b""
        with contextlib.closing(self.client.evms.console(self.name)) as output:  # type: ignore[type-var]
            for data in output:
                shown += data
                if prompt.search(shown):
                    return
        pytest.fail(f"the console ended without a prompt: {shown[-500:]!r}")

    def type(self, line: str) -> None:
        self.client.evms.type(self.name, line.encode() + b"\n")


@contextmanager
def agent_away(pool: Pool, client: Client, node: str) -> Iterator[None]:
    """Kill a node's agent for the length of the block; then start it, and return when the new one reports."""
    before = client.nodes.get(node).report.boot_id
    pool.kill(node, "agent")
    yield
    pool.start(node, "agent")
    until(lambda: client.nodes.get(node).report.boot_id != before, f"the agent of {node} is back")


@contextmanager
def subject(pool: Pool, *, boots: bool = True, **asked: Any) -> Iterator[Subject]:
    """Make an EVM (``asked``: fields of ``EvmCreate``) whose guest has answered; delete it afterwards.

    Daemons of the pool that the test killed or froze and left so are brought back first: other tests need them.
    """
    request = {"name": f"subject-{next(_numbers)}", "memory_bytes": MEMORY_BYTES, **asked}
    with contextlib.closing(Client(pool.context)) as client:
        try:
            made = Subject(pool, client, client.evms.create(request).spec)
            if boots:
                for nic in range(len(made.spec.nics)):
                    made.guest(nic).wait_first_packet()
                for number in range(len(made.spec.pods)):
                    made.pod(number).wait_first_packet()
            yield made
        finally:
            mend(pool)
            with contextlib.suppress(NotFound):
                _delete(client, str(request["name"]))


def _delete(client: Client, name: str) -> None:
    open_one = client.evms.get(name).migration
    if open_one is not None:
        with contextlib.suppress(EmpError):
            client.migrations.abort(open_one)
        until(lambda: client.migrations.get(open_one).outcome, f"{open_one} is over")
    client.evms.delete(name, grace_s=0)


def mend(pool: Pool) -> None:
    """Mend the pool's network, thaw its frozen daemons and start its dead ones."""
    partition.heal(pool.files)
    for place in verbs.status(pool.files):
        if place.state == "frozen":
            pool.cont(place.name, place.role)
        elif place.state == "dead":
            pool.start(place.name, place.role)
