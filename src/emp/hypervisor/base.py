"""What a node's agent needs of a hypervisor, in prose and as protocols.

A ``Machine`` is one running EVM process. It outlives the agent: an agent that starts anew gets it back with ``adopt``.
Every method that talks to the machine has a timeout. A command that was sent but not answered raises
``OutcomeUnknown``: the caller reads the state and decides, it never assumes. A dead machine raises ``MachineGone``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from emp.model.clock import GuestClock
from emp.model.errors import HypervisorError
from emp.model.evm import EvmSpec
from emp.model.volume import HostDevice, NbdEndpoint, RbdImage

QUIET_S = 2.0
"""for so long the guest must have left a disk alone before it is taken away"""
UNPLUG_TIMEOUT_S = 5.0
"""for the guest to leave it alone"""


class MachineGone(HypervisorError):
    """The machine's process has ended: nothing more can be asked of it."""

    code = "machine_gone"


class NoGuestAgent(HypervisorError):
    """Nobody in the guest answers: it has no agent, or is not that far yet. Nothing has happened to it."""

    code = "no_guest_agent"


@dataclass(frozen=True)
class ProcessId:
    """A process that cannot be mistaken for a later one: pid and start time (ticks since boot, proc(5) field 22)."""

    pid: int
    start_ticks: int


@dataclass(frozen=True)
class RelaySocket:
    """Where this node's own relay serves a volume that is still attached elsewhere: plain NBD, the default export.

    The directory holds the sockets of one machine alone; whoever has a descriptor of it may connect.
    """

    path: Path


BlockSource = NbdEndpoint | HostDevice | RbdImage | RelaySocket


@dataclass(frozen=True)
class BlockDevice:
    """A volume as this node opens it; the guest sees ``serial`` at its disk."""

    volume: str
    serial: str
    size_bytes: int
    source: BlockSource


@dataclass(frozen=True)
class LaunchPlan:
    """All that a machine is built from: the EVM's record, and what this node prepared for it."""

    spec: EvmSpec
    kernel: Path
    initrd: Path
    kernel_command_line: str
    tap_fds: tuple[int, ...]
    """one open tap descriptor (TAP, NO_PI, VNET_HDR) per ``spec.nics``, in order; the machine gets copies"""
    volumes: tuple[BlockDevice, ...]
    """in the order of ``spec.volumes``; the guest's device addresses follow from ``spec.slots``"""
    incoming: bool
    """True: wait for a migration, paused (``-incoming defer -S``). False: boot."""
    mtus_bytes: tuple[int, ...] = ()
    """what fits each of ``spec.nics``, which the guest is told; none: it takes 1,500"""


class RunState(StrEnum):
    """QEMU's RunState, as far as the project tells them apart (qapi/run-state.json)."""

    RUNNING = "running"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    PRELAUNCH = "prelaunch"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    SHUTDOWN = "shutdown"
    GUEST_PANICKED = "guest-panicked"
    IO_ERROR = "io-error"
    INTERNAL_ERROR = "internal-error"
    OTHER = "other"


class StreamStatus(StrEnum):
    """QEMU's MigrationStatus (qapi/migration.json)."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    OTHER = "other"

    @property
    def ended_badly(self) -> bool:
        return self in (StreamStatus.FAILED, StreamStatus.CANCELLED)


@dataclass(frozen=True)
class StreamInfo:
    """``query-migrate``, with units in the names. Rates are QEMU's own estimates."""

    status: StreamStatus
    error: str | None = None
    total_ms: int = 0
    downtime_ms: int | None = None
    setup_ms: int | None = None
    memory_bytes: int = 0
    remaining_bytes: int = 0
    transferred_bytes: int = 0
    dirty_bytes_per_s: int = 0
    bandwidth_bytes_per_s: float = 0.0
    passes: int = 0


@dataclass(frozen=True)
class StreamLimits:
    """What a source may use: QEMU's migration parameters of the same meaning."""

    max_bandwidth_bytes_per_s: int = 0
    """0 = no limit"""
    downtime_limit_ms: int = 30
    """never 0 (QEMU then never counts dirty pages again)"""
    multifd_channels: int = 1


class MachineEventKind(StrEnum):
    STOPPED = "stopped"
    """vCPUs stand still (QMP STOP)"""
    RESUMED = "resumed"
    STREAM = "stream"
    """migration status changed: ``stream`` says to what"""
    PASS = "pass"
    """a pre-copy pass began: ``passes``"""
    GUEST_SHUTDOWN = "guest-shutdown"
    GUEST_RESET = "guest-reset"
    GUEST_PANICKED = "guest-panicked"
    IO_ERROR = "io-error"
    """a volume failed and the guest is being paused (STOPPED follows); ``cont`` tries the same I/O again"""
    GONE = "gone"
    """the process has ended; always the last event"""


@dataclass(frozen=True)
class MachineEvent:
    kind: MachineEventKind
    at_s: float
    """host's wall clock when QEMU emitted it (QMP timestamp), seconds since the Unix epoch"""
    stream: StreamStatus | None = None
    passes: int | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Received:
    """What a guest has received by a NIC. A frame fills one buffer or several in a row, and its header of 12 bytes
    counts (virtio 1.2, 5.1.6.4)."""

    buffers: int = 0
    """since it has the NIC, modulo 65,536"""
    sizes: tuple[int, ...] = ()
    """how much each of the newest buffers holds, oldest first; empty where the hypervisor cannot say"""


class Machine(Protocol):
    """One EVM's process on this node."""

    @property
    def name(self) -> str: ...
    @property
    def process(self) -> ProcessId: ...
    @property
    def console_path(self) -> Path:
        """unix stream socket of the guest's serial console (one client: the agent)"""
        ...

    def events(self) -> AsyncIterator[MachineEvent]:
        """Yield events from the moment of this call on, to any number of listeners; ends after ``GONE``.

        After a lost and re-made QMP connection the state is read again and differences are given as events.
        """
        ...

    async def run_state(self) -> RunState: ...
    async def stream_info(self) -> StreamInfo: ...
    async def received(self, nic: int, *, sizes: bool = True, again: bool = False) -> Received:
        """Return what the guest has received by a NIC; without ``sizes`` only how much, in less time.

        ``again``: its driver is the one of the last call, which also saves time. Raises as ``stream_info``.
        """
        ...

    async def cont(self) -> None:
        """Start the vCPUs. The caller (R1 of the protocol) has checked that it may; refused in ``inmigrate``.

        Returns when QEMU has accepted it; raises ``HypervisorError`` when QEMU refused (the guest did not run),
        ``OutcomeUnknown`` when no answer came.
        """
        ...

    async def stop(self) -> None: ...
    async def power_button(self) -> None:
        """ACPI power button: the guest shuts itself down, ``GUEST_SHUTDOWN`` follows."""
        ...

    async def kill(self) -> None:
        """SIGKILL and wait until the process is gone and its run-time files are removed. Idempotent."""
        ...

    async def listen_for_stream(self, *, host: str, source: str, multifd_channels: int = 1) -> int:
        """Target: listen for a migration from the peer certificate ``CN=<source>`` only; return the TCP port.

        ``multifd_channels`` must be the source's (``StreamLimits``): with another number QEMU waits for ever, the
        source perhaps in its blackout. Whoever connects to the port and says nothing makes QEMU deaf: let only the
        source's address reach it.
        """
        ...

    async def guard_stream(self, *, pre_switchover_s: float, device_s: float) -> None:
        """Source, before ``send_stream``: have a process that outlives this one watch the switchover (rule R12).

        If the stream stays in ``pre-switchover`` or ``device`` for longer than allowed, it cuts and cancels it, so
        that the guest runs again. Returns once it watches; raises ``HypervisorError`` if it does not get there.
        """
        ...

    async def send_stream(self, *, host: str, port: int, target: str, limits: StreamLimits) -> None:
        """Source: begin pre-copy to ``host:port``, whose certificate must be for ``target``; returns when begun."""
        ...

    async def set_limits(self, limits: StreamLimits) -> None: ...
    async def continue_stream(self) -> None:
        """Source: leave ``pre-switchover`` (``migrate-continue``)."""
        ...

    async def cancel_stream(self) -> None:
        """Source: out-of-band ``yank``, then ``migrate_cancel``; QEMU resumes the guest. Idle after ``completed``."""
        ...

    async def move_volume(self, device: BlockDevice) -> None:
        """Have the disk with ``device.serial`` use ``device.source`` from now on, under the guest's I/O.

        The guest sees nothing but a pause of that disk: QEMU waits for the I/O on its way, which must therefore be
        getting through at the old source. Idempotent, and may be repeated after ``OutcomeUnknown`` or a restart of the
        agent. Raises ``NotFound`` without that disk, ``Conflict`` while a migration is on its way, and
        ``HypervisorError`` when the new source cannot be opened or is too small; the old one is then still in use.
        """
        ...

    async def plug_volume(self, device: BlockDevice, slot: int) -> None:
        """Give the running guest one more disk, at the address that ``slot`` (0 to 23) stands for. Idempotent.

        Raises ``Conflict`` where another disk is at that slot or while a migration is on its way, ``HypervisorError``
        when the source cannot be opened; nothing of it is left then.
        """
        ...

    async def unplug_volume(self, serial: str, slot: int, *, in_use: bool = False) -> None:
        """Take the disk away from the guest, and let go of its source. Idempotent.

        A SCSI guest is told, not asked. So it is done only once the guest has left the disk alone for
        ``QUIET_S``: one that goes on using it for ``UNPLUG_TIMEOUT_S`` is a ``Conflict``, unless ``in_use`` allows for
        it. Raises ``Conflict`` also where another disk is at that slot, or while a migration is on its way.
        """
        ...

    async def resize_volume(self, device: BlockDevice) -> None:
        """Show the guest that the disk with ``device.serial`` has grown to ``device.size_bytes``. Idempotent.

        The storage must have grown already. Raises ``BadInput`` for less than it has, ``NotFound`` without that disk,
        ``Conflict`` while a migration is on its way, ``HypervisorError`` when the storage is too small.
        """
        ...

    async def set_clock(self) -> GuestClock:
        """Measure the guest's wall clock by its agent, set it where it is behind, and return how it is then.

        For a guest that runs, and is not being migrated: an order that is under way is lost or late then. A clock that
        is ahead is left, so that none goes back. Raises ``NoGuestAgent``, ``HypervisorError`` where the agent refuses.
        """
        ...

    async def tap_fds(self) -> tuple[int, ...]:
        """Copies (pidfd_getfd(2)) of the machine's tap descriptors, one per NIC; the caller closes them."""
        ...

    async def close(self) -> None:
        """Let go of the machine without touching it (the agent stops; the guest goes on)."""
        ...


@dataclass(frozen=True)
class HypervisorFacts:
    version: str
    accelerator: str
    machines: tuple[str, ...]
    default_machine: str
    cpu_models: tuple[str, ...]
    default_cpu_model: str


class Hypervisor(Protocol):
    """Makes machines on one node."""

    async def facts(self) -> HypervisorFacts: ...

    async def launch(self, plan: LaunchPlan) -> Machine:
        """Start the machine in a session of its own, unprivileged and sandboxed; return when its QMP answers."""
        ...

    async def found(self) -> Mapping[str, ProcessId]:
        """EVM name -> process, of every machine of this node that is alive (by pid, start time and UUID)."""
        ...

    async def adopt(self, spec: EvmSpec, process: ProcessId) -> Machine:
        """Take back a running machine after a restart of the agent; nothing happens to the guest."""
        ...

    async def kill_stranger(self, name: str, process: ProcessId) -> None:
        """Kill a machine that ``found`` showed and that the journal says has lost; wait for its exit."""
        ...
