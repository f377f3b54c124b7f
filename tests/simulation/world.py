"""One simulated pool: its ground, its daemons, what has been seen of them, and where its migration stands.

``moment`` is called wherever something passes between two parties, or between a daemon and its host: there faults
strike. ``column`` follows the present migration through the columns of the fault matrix (switchover, section 2.6).
"""

from __future__ import annotations

import contextlib
import json
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emp.hypervisor.base import BlockDevice, BlockSource, RelaySocket, StreamStatus
from emp.migration.records import RecordKind
from emp.model.volume import NbdEndpoint
from tests.fakes.fabric import Fabric
from tests.fakes.qemu import FakeQemu
from tests.simulation.daemons import AgentDaemon, ControllerDaemon, Daemon, SimAgents, VolumesDaemon
from tests.simulation.disk import Disk
from tests.simulation.errors import Violation
from tests.simulation.hosts import SimExport
from tests.simulation.loop import VirtualLoop, here
from tests.simulation.net import Net
from tests.simulation.patches import GROUND
from tests.simulation.store import StoreDisk

if TYPE_CHECKING:
    from tests.simulation.faults import Planned

COLUMNS = "BPDHMT"


@dataclass
class Track:
    """The migration that is under way, as an outside observer sees it."""

    evm: str
    source: str
    target: str
    column: str = "B"

    def node(self, role: str) -> str:
        return self.source if role == "source" else self.target


class World:
    def __init__(self, loop: VirtualLoop, rng: random.Random, *, nodes: int, keep_trace: bool) -> None:
        self.loop = loop
        self.rng = rng
        self.trace: deque[str] = deque(maxlen=None if keep_trace else 1)
        self.keep_trace = keep_trace
        self.digest = 0
        self.moments = 0
        self.net = Net(loop, self)
        self.store = StoreDisk()
        self.exports: dict[str, None] = {}
        self.disks: dict[str, Disk] = {}
        self.heads: dict[str, tuple[int, float]] = {}
        """EVM -> (boot, ticks) of the newest memory that has run"""
        self.acknowledged: dict[str, tuple[int, float]] = {}
        """volume -> (boot, ticks) of the last write"""
        self.track: Track | None = None
        self.armed: list[Planned] = []
        self.fired: list[str] = []
        self.slow = 1.0
        self.wants_abort = False
        self.heals = 0
        self.fabric = SimFabric(self)
        GROUND.now = loop.time
        GROUND.exports = lambda spec: SimExport(self, spec)
        GROUND.end_exports = self._end_exports
        GROUND.agents = lambda: SimAgents(self)
        self.controller = ControllerDaemon(self)
        self.volumes = VolumesDaemon(self)
        self.agents = {f"n{n}": AgentDaemon(self, f"n{n}") for n in range(1, nodes + 1)}

    @property
    def daemons(self) -> list[Daemon]:
        return [self.controller, self.volumes, *self.agents.values()]

    def new_disk(self, host: str) -> Disk:
        disk = Disk(host, self.rng)
        disk.on_sync = lambda name: self._synced(disk, name)
        self.disks[host] = disk
        return disk

    def _end_exports(self, *, but: set[str]) -> None:
        with self.disturbance():
            self.exports = {name: None for name in self.exports if name in but}

    # -- what is seen

    def note(self, text: str) -> None:
        self.digest = hash((self.digest, round(self.loop.now * 1e6), text))
        if self.keep_trace:
            self.trace.append(f"{self.loop.now:10.4f}  {text}")

    def violated(self, text: str) -> None:
        self.note(f"VIOLATION: {text}")
        self.loop.fatal = self.loop.fatal or Violation(text)
        raise self.loop.fatal

    def crashed(self, daemon: str, error: Exception) -> None:
        self.note(f"{daemon} ended with {error!r}")

    def announced(self, evm: str, node: str) -> None:
        if not any(q.node == node for q in self.copies(evm)):
            self.note(f"{evm} announced from {node}, where it is not")

    def copies(self, evm: str) -> list[FakeQemu]:
        return [q for q in self.fabric.qemus if q.spec.name == evm and q.alive]

    def executing(self, evm: str) -> list[FakeQemu]:
        return [q for q in self.copies(evm) if q.executing]

    def last_record(self, node: str, evm: str) -> dict[str, object] | None:
        """The last record of ``evm`` in the node's journal, as the file has it."""
        found = None
        for line in self.lines(node):
            if line.get("evm") == evm:
                found = line
        return found

    def lines(self, node: str) -> list[dict[str, object]]:
        file = self.disks[node].files.get(f"{node}/journal")
        text = bytes(file.data) if file else b""
        return [json.loads(line.rpartition(b" ")[0]) for line in text.splitlines()]

    def _synced(self, disk: Disk, name: str) -> None:
        if name.endswith("/journal"):
            lines = bytes(disk.files[name].data).splitlines()
            record = json.loads(lines[-1].rpartition(b" ")[0])
            kind = record.get("kind")
            self.note(f"journal {disk.host}: {kind} {record.get('evm')} epoch {record.get('epoch')}")
            track = self.track
            if track and record.get("evm") == track.evm and kind == RecordKind.GIVEN and disk.host == track.source:
                self.enters("M")
            self.touch(f"journal {kind}", disk.host)

    # -- the columns

    def begins(self, evm: str, source: str, target: str) -> None:
        self.track = Track(evm, source, target)
        self.enters("B")

    def enters(self, column: str) -> None:
        if self.track is not None:
            self.track.column = column
            self.note(f"-- column {column}")

    # -- where faults strike

    def touch(self, what: str, host: str) -> None:
        self.moments += 1
        if self.keep_trace:
            self.note(f"{host}: {what}")
        if self.track is None or not self.armed:
            return
        for planned in tuple(self.armed):
            if planned.column == self.track.column:
                planned.countdown -= 1
                if planned.countdown < 0:
                    self.armed.remove(planned)
                    planned.strike(self)

    async def moment(self, what: str, host: str) -> str | None:
        here()
        self.touch(what, host)
        here()
        if what == "qmp cont" and self.fabric.lose_answers > 0:
            self.fabric.lose_answers -= 1
            return "lose"
        return None

    @contextlib.contextmanager
    def disturbance(self) -> Iterator[None]:
        """What changes the ways to volumes, or what serves them, happens inside."""
        for qemu in tuple(self.fabric.qemus):
            qemu.advance()
        yield
        for qemu in tuple(self.fabric.qemus):
            qemu.look_at_storage()

    def reads(self, node: str, source: BlockSource, *, writes: bool) -> bool:
        """Whether ``node`` reaches what is at ``source``, and may write there."""
        if not isinstance(source, NbdEndpoint):
            return False
        if lender := self.agents.get(source.host):
            return self.net.reaches(node, lender.host) and lender.relays.lends(source.export, writes=writes)
        return source.export in self.exports and self.net.reaches(node, "vol")

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Do so, unless everything has been healed before."""
        heals = self.heals
        self.fabric.later(delay_s, lambda: call() if self.heals == heals else None)


class SimFabric(Fabric):
    """The ground of the fake QEMUs, with the checks that need no patience: a violation is seen as it happens."""

    bandwidth_bytes_per_s = 2.5e8

    def __init__(self, world: World) -> None:
        super().__init__(world.rng)
        self.world = world
        self.lose_answers = 0

    def now(self) -> float:
        return self.world.loop.now

    def wall_clock(self, node: str) -> float:
        return GROUND.wall_clock() if node is None else self.now() + GROUND.skews_s.get(node, 0.0)

    def reaches(self, one: str, other: str) -> bool:
        return self.world.net.reaches(one, other)

    def rate(self, one: str, other: str) -> float:
        return self.bandwidth_bytes_per_s * self.world.slow

    def opens(self, node: str, device: BlockDevice) -> bool:
        if isinstance(device.source, RelaySocket):
            return self.world.agents[node].relays.serves(device.source.path, writes=False)
        return self.served(node, device)

    def served(self, node: str, device: BlockDevice) -> bool:
        if isinstance(device.source, RelaySocket):
            return self.world.agents[node].relays.serves(device.source.path, writes=True)
        return self.world.reads(node, device.source, writes=True)

    async def lag(self) -> None:
        await self.breath(0.0001, 0.002)

    async def moment(self, what: str, node: str) -> str | None:
        return await self.world.moment(what, node)

    def watch_run(self, qemu: FakeQemu) -> None:
        world, evm, guest = self.world, qemu.spec.name, qemu.guest
        assert guest is not None
        world.note(f"{evm} runs on {qemu.node}: boot {guest.boot}, tick {guest.ticks:.0f}")
        if others := [q.node for q in world.executing(evm) if q is not qemu]:
            world.violated(f"two copies of {evm} run: on {qemu.node} and on {', '.join(others)}")
        if lent := world.agents[qemu.node].relays.open_for([device.volume for device in qemu.plan.volumes]):
            world.violated(f"{evm} runs on {qemu.node} beside {', '.join(lent)}, through which its target writes")
        head = world.heads.get(evm, (0, 0.0))
        if (guest.boot, guest.ticks) < (head[0], head[1] - 1e-3):
            known = f"{head[1]:.0f} of boot {head[0]}"
            world.violated(
                f"a stale copy of {evm} runs on {qemu.node}: tick {guest.ticks:.0f} of boot {guest.boot} after {known}"
            )
        world.heads[evm] = (guest.boot, guest.ticks)
        track = world.track
        if track and track.evm == evm and qemu.node == track.target and track.column in "HM":
            world.enters("T")

    def watch_advance(self, qemu: FakeQemu) -> None:
        assert qemu.guest is not None
        self.world.heads[qemu.spec.name] = (qemu.guest.boot, qemu.guest.ticks)

    def watch_write(self, qemu: FakeQemu, volume: str) -> None:
        assert qemu.guest is not None
        new, old = (qemu.guest.boot, qemu.guest.ticks), self.world.acknowledged.get(volume, (0, 0.0))
        if new < (old[0], old[1] - 1e-3):
            self.world.violated(f"{qemu.node} overwrites acknowledged writes of {volume}: {old} by {new}")
        self.world.acknowledged[volume] = new

    def watch_clock(self, qemu: FakeQemu) -> None:
        if qemu.status in (StreamStatus.SETUP, StreamStatus.ACTIVE, StreamStatus.PRE_SWITCHOVER, StreamStatus.DEVICE):
            self.world.violated(f"the clock of {qemu.spec.name} was to be set while it leaves {qemu.node}")

    def watch_stream(self, qemu: FakeQemu) -> None:
        world, track = self.world, self.world.track
        world.note(f"stream of {qemu.spec.name} at {qemu.node}: {qemu.status}")
        if track and qemu.spec.name == track.evm and qemu.node == track.source:
            column = {StreamStatus.PRE_SWITCHOVER: "P", StreamStatus.DEVICE: "D", StreamStatus.COMPLETED: "H"}
            if qemu.status in column:
                world.enters(column[qemu.status])
        world.touch(f"stream {qemu.status}", qemu.node)
