"""Makes, finds, adopts and kills the QEMU machines of one node."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from emp.host.processes import Process, spawn
from emp.hypervisor.base import HypervisorFacts, LaunchPlan, ProcessId, RelaySocket
from emp.hypervisor.qemu import binary as qemu_binary
from emp.hypervisor.qemu import guarding
from emp.hypervisor.qemu.command_line import Descriptors, check_plan, command_line
from emp.hypervisor.qemu.guest_config import guest_config
from emp.hypervisor.qemu.machine import QemuMachine, end_process
from emp.hypervisor.qemu.opening import open_device, open_relays
from emp.hypervisor.qemu.run_directory import LAUNCH_VARIABLE, MACHINES, Record, RunDirectory, free_uid
from emp.model.errors import BadInput, Conflict, HypervisorError, MissingDependency
from emp.model.evm import EvmSpec
from emp.model.volume import HostDevice

START_TIMEOUT_S = 30.0
"""for a new QEMU to answer: it connects its volumes first"""
_KEPT_ENVIRONMENT = ("PATH", "LANG", "EMP_TEST_ID")
"""All that QEMU sees of the agent's environment; by the last one a test knows what it has started."""
_log = logging.getLogger(__name__)
T = TypeVar("T")
S = TypeVar("S")


class QemuHypervisor:
    """The QEMUs of one node; see ``emp.hypervisor.base.Hypervisor``. Needs root.

    Each QEMU has a uid and gid of its own from ``uid_base`` on, no capability, no way to get one (``no_new_privs``),
    seccomp, no core dump, a session of its own and a clean environment. It outlives this object.
    """

    def __init__(
        self,
        *,
        run_dir: Path,
        credentials_dir: Path,
        binary: Path | None = None,
        uid_base: int = 64200,
        uid_count: int = 600,
        timeout_s: float = 5.0,
    ) -> None:
        """``run_dir``: one node's; the machines get ``evm/`` in it. Should be on a tmpfs, gone with a reboot.

        ``credentials_dir``: the node's certificate and key in QEMU's ``tls-creds-x509`` layout (``Credentials.write``),
        copied for each machine when it starts and read anew for each migration. ``binary``: QEMU, else EMP_QEMU,
        else PATH. ``uid_base``, ``uid_count``: the user ids that are kept for EVMs on this host. ``timeout_s``: for
        each exchange with QEMU.
        """
        self._run_dir = run_dir / MACHINES
        self._credentials_dir = credentials_dir
        self._binary = binary
        self._uid_base = uid_base
        self._uid_count = uid_count
        self._timeout_s = timeout_s
        self._launching: set[str] = set()
        self._starting = asyncio.Lock()  # from the choice of a uid until it is on record

    async def facts(self) -> HypervisorFacts:
        """Raises ``MissingDependency`` without QEMU 10.0 or newer."""
        return await qemu_binary.probe(qemu_binary.find_binary(self._binary), qemu_binary.accelerator())

    async def launch(self, plan: LaunchPlan) -> QemuMachine:
        """See ``Hypervisor``.

        Raises ``BadInput`` for a plan that cannot be, ``Conflict`` when the EVM has a live machine here,
        ``HypervisorError`` with the end of QEMU's log when it does not come up (nothing is left of it then).
        """
        check_plan(plan)
        if os.geteuid() != 0:
            raise MissingDependency("machines can be started by root only", hint="run the agent as root")
        facts = await self.facts()
        _check_supported(plan.spec, facts)
        directory = RunDirectory.of(self._run_dir, plan.spec.name)
        record = directory.record()
        if plan.spec.name in self._launching or (record and record.process()):
            raise Conflict(f"{plan.spec.name} has a machine on this node", hint="kill or adopt it first")
        self._launching.add(plan.spec.name)
        process: Process | None = None
        try:
            async with self._starting:
                # Not on the event loop: another machine of this node may be in its blackout.
                uid = await _to_the_end(asyncio.to_thread(self._prepare, plan.spec, directory))
                record, process = self._start(plan, directory, facts, uid)
            return await self._opened(directory, record, process, timeout_s=max(START_TIMEOUT_S, self._timeout_s))
        except BaseException:
            if process is not None:
                await _to_the_end(end_process(process, plan.spec.name))
            directory.remove()
            raise
        finally:
            self._launching.discard(plan.spec.name)

    def _prepare(self, spec: EvmSpec, directory: RunDirectory) -> int:
        """Make the run directory with its files; return the uid that may read them."""
        uid = free_uid(self._run_dir, self._uid_base, self._uid_count)
        directory.make(uid)
        directory.make_log()
        directory.write_config(guest_config(spec), uid)
        directory.copy_credentials(self._credentials_dir, uid)
        return uid

    def _start(
        self, plan: LaunchPlan, directory: RunDirectory, facts: HypervisorFacts, uid: int
    ) -> tuple[Record, Process]:
        with contextlib.ExitStack() as opened:
            sockets = {name: opened.enter_context(one) for name, one in directory.listen().items()}
            fds = Descriptors(
                directory=_closing(opened, directory.open()),
                kernel=_closing(opened, _open_image(plan.kernel)),
                initrd=_closing(opened, _open_image(plan.initrd)),
                sockets={name: one.fileno() for name, one in sockets.items()},
                taps=plan.tap_fds,
                devices={slot: _closing(opened, open_device(one)) for slot, one in _sources(plan, HostDevice)},
                relays={slot: _closing(opened, open_relays(one)) for slot, one in _sources(plan, RelaySocket)},
            )
            qemu = command_line(
                plan,
                binary=qemu_binary.find_binary(self._binary),
                accelerator=facts.accelerator,
                fds=fds,
            )
            record = Record(plan.spec.name, str(plan.spec.uuid), uid, fds.directory, plan.tap_fds)
            directory.write_record(record)
            environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
            process = spawn(
                [*unprivileged(uid, facts.accelerator), *qemu],
                log=directory.log,
                pass_fds=fds.all(),
                env=environment | {LAUNCH_VARIABLE: record.launch},
            )
        record = record.with_process(process)
        directory.write_record(record)
        return record, process

    async def _opened(
        self, directory: RunDirectory, record: Record, process: Process, *, timeout_s: float
    ) -> QemuMachine:
        machine = QemuMachine(
            directory, record, process, credentials_dir=self._credentials_dir, timeout_s=self._timeout_s
        )
        await machine.open(timeout_s=timeout_s)
        return machine

    async def found(self) -> Mapping[str, ProcessId]:
        """See ``Hypervisor``. What dead machines have left is removed; the end of their log goes to ours."""
        alive: dict[str, ProcessId] = {}
        for directory in RunDirectory.all(self._run_dir):
            if directory.name in self._launching:
                continue
            record = directory.record()
            process = record.process() if record else None
            if process is not None:
                alive[directory.name] = ProcessId(process.pid, process.start_ticks)
            else:
                _log.warning("machine %s has ended unattended: %s", directory.name, directory.log_tail() or "no log")
                directory.remove()
        return alive

    async def adopt(self, spec: EvmSpec, process: ProcessId) -> QemuMachine:
        """See ``Hypervisor``. Raises ``HypervisorError``, having changed nothing, when it is not that EVM's machine."""
        directory = RunDirectory.of(self._run_dir, spec.name)
        record = directory.record()
        alive = record.process() if record else None
        if record is None or alive is None or ProcessId(alive.pid, alive.start_ticks) != process:
            raise HypervisorError(f"process {process.pid} is not the machine of {spec.name} on this node")
        if record.uuid != str(spec.uuid):
            raise HypervisorError(f"the machine of {spec.name} has the uuid {record.uuid}, not {spec.uuid}")
        if not record.pid:
            record = record.with_process(alive)
            directory.write_record(record)
        return await self._opened(directory, record, alive, timeout_s=self._timeout_s)

    async def kill_stranger(self, name: str, process: ProcessId) -> None:
        """See ``Hypervisor``. Idempotent."""
        directory = RunDirectory.of(self._run_dir, name)
        record = directory.record()
        stranger = Process(process.pid, process.start_ticks)
        is_its = record is not None and record.process() == stranger
        await end_process(stranger, name)
        await guarding.end(directory)
        if record is not None and is_its:
            directory.remove_launch(record.launch)


async def _to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, to its end also when cancelled meanwhile: nothing is made behind the back of who clears up."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen, and of less weight than the cancellation
        raise
    return task.result()


def unprivileged(uid: int, accelerator: str) -> list[str]:
    """Return the argv prefix (util-linux) that drops every privilege for good, and core dumps of the guest's memory."""
    groups = ["--clear-groups"]
    if accelerator == "kvm":
        groups = ["--groups", str(Path("/dev/kvm").stat().st_gid)]
    drop = ["--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all"]
    return ["prlimit", "--core=0:0", "setpriv", "--reuid", str(uid), "--regid", str(uid), *groups, *drop, "--"]


def _check_supported(spec: EvmSpec, facts: HypervisorFacts) -> None:
    if spec.machine not in facts.machines:
        raise BadInput(
            f"QEMU {facts.version} of this node has no {spec.machine}",
            field="machine",
            hint=f"it has {facts.machines[0]} to {facts.machines[-1]}",
        )
    if spec.cpu_model not in facts.cpu_models:
        raise BadInput(
            f"{spec.cpu_model} does not run here with all its features under {facts.accelerator}",
            field="cpu_model",
            hint=f"for example {facts.default_cpu_model}",
        )


def _sources(plan: LaunchPlan, kind: type[S]) -> list[tuple[int, S]]:
    """Return (slot, source) of the volumes that are opened from that kind of source."""
    of = zip(plan.spec.slots, (device.source for device in plan.volumes), strict=True)
    return [(slot, source) for slot, source in of if isinstance(source, kind)]


def _closing(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _open_image(path: Path) -> int:
    """Open a guest image for QEMU, which opens it again as another user: others must be able to read it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HypervisorError(f"cannot open the guest image {path}: {error.strerror}") from error
    if not os.fstat(descriptor).st_mode & stat.S_IROTH:
        os.close(descriptor)
        raise HypervisorError(f"the guest image {path} is not readable for others", hint=f"chmod o+r {path}")
    return descriptor
