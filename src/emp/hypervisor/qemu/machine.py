"""One EVM's QEMU: what the agent asks of it, what it tells, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

from emp.host.processes import Process, take_descriptor
from emp.hypervisor.base import (
    BlockDevice,
    MachineEvent,
    MachineEventKind,
    MachineGone,
    ProcessId,
    Received,
    RunState,
    StreamInfo,
    StreamLimits,
)
from emp.hypervisor.qemu import guarding, guest_agent, stream
from emp.hypervisor.qemu.command_line import tls_credentials
from emp.hypervisor.qemu.disks import CREDENTIALS
from emp.hypervisor.qemu.ending import ending
from emp.hypervisor.qemu.events import Broadcast, Watcher, run_state
from emp.hypervisor.qemu.plugging import Plugging
from emp.hypervisor.qemu.qmp import QmpSession
from emp.hypervisor.qemu.ring import ReceiveRing
from emp.hypervisor.qemu.run_directory import Record, RunDirectory
from emp.model.clock import GuestClock
from emp.model.errors import EmpError, HypervisorError, OutcomeUnknown

KILL_TIMEOUT_S = 30.0
DRAIN_TIMEOUT_S = 1.0
CANCEL_S = 0.1
_STREAM_OBJECT = "stream-"


class QemuMachine:
    """A running QEMU of this node, from ``QemuHypervisor.launch`` or ``adopt``; see ``emp.hypervisor.base.Machine``.

    The agent holds two of QEMU's three monitors: ``control`` for everything, ``cancel`` so that ``yank`` gets through
    when commands on the other are stuck. The third, at ``guard_path``, is for a guard that outlives the agent.
    """

    def __init__(
        self, directory: RunDirectory, record: Record, process: Process, *, credentials_dir: Path, timeout_s: float
    ) -> None:
        self._directory = directory
        self._record = record
        self._process = process
        self._credentials_dir = credentials_dir
        self._broadcast = Broadcast()
        self._watcher = Watcher(self._broadcast)
        self._control = QmpSession(
            directory.socket_path("control"),
            timeout_s=timeout_s,
            on_event=self._watcher.on_qmp_event,
            on_connect=self._read_state,
        )
        self._cancel = QmpSession(directory.socket_path("cancel"), timeout_s=timeout_s)
        self._ended = asyncio.Event()
        self._how_it_ended: str | None = None
        self._has_loaded = False
        """has been seen out of ``inmigrate``"""
        self._watch: asyncio.Task[None] | None = None
        self._guardian: guarding.Guardian | None = None
        self._rings: dict[int, ReceiveRing] = {}
        self._plugging = Plugging(record.name, self._ask, self._load_volume_credentials)

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def process(self) -> ProcessId:
        return ProcessId(self._process.pid, self._process.start_ticks)

    @property
    def console_path(self) -> Path:
        return self._directory.socket_path("console")

    @property
    def guard_path(self) -> Path:
        """unix socket of the QMP monitor (with ``oob``) that is left to a guard process; this class never opens it"""
        return self._directory.socket_path("guard")

    async def open(self, *, timeout_s: float) -> None:
        """Connect, and check that it is the machine of the record. Raises ``HypervisorError``, ``OutcomeUnknown``."""
        self._watch = asyncio.create_task(self._await_end(), name=f"end of {self.name}")
        connecting = asyncio.create_task(self._connect(timeout_s), name=f"connect to {self.name}")
        try:
            await asyncio.wait({connecting, self._watch}, return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done() or (connecting.exception() and self._ended.is_set()):
                raise MachineGone(f"QEMU of {self.name} ended at once: {self._last_words()}")
            await connecting
        except BaseException:
            connecting.cancel()
            await asyncio.wait({connecting})
            await self.close()
            raise

    async def _connect(self, timeout_s: float) -> None:
        await self._control.open(timeout_s=timeout_s)
        await self._cancel.open(timeout_s=timeout_s)
        uuid = (await self._control.execute("query-uuid"))["UUID"]
        if UUID(uuid) != UUID(self._record.uuid):
            raise HypervisorError(f"the machine at {self._directory.path} has the uuid {uuid}, not {self._record.uuid}")

    async def _read_state(self, session: QmpSession) -> None:
        status = await session.barrier("query-status")
        migration = await session.barrier("query-migrate")
        self._watcher.on_state_read(run_state(status["status"]), stream.status(migration.get("status")))

    async def _await_end(self) -> None:
        self._how_it_ended = await ending(self._process)
        self._ended.set()
        # What QEMU had sent before its end comes first.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await self._control.idle.wait()
        self._broadcast.close(MachineEvent(MachineEventKind.GONE, time.time(), detail=self._last_words()))
        await self._control.close()
        await self._cancel.close()

    def events(self) -> AsyncIterator[MachineEvent]:
        return self._broadcast.subscribe()

    async def run_state(self) -> RunState:
        state = run_state((await self._ask("query-status"))["status"])
        self._has_loaded = self._has_loaded or state is not RunState.INMIGRATE
        return state

    async def stream_info(self) -> StreamInfo:
        return stream.stream_info(await self._ask("query-migrate"))

    async def received(self, nic: int, *, sizes: bool = True, again: bool = False) -> Received:
        ring = self._rings.setdefault(nic, ReceiveRing(self._ask, nic))
        if not sizes:
            return Received(await ring.count())
        if not again:
            await ring.count()
        return await ring.read()

    async def cont(self) -> None:
        # In inmigrate QEMU would say yes, and start the guest by itself once it has loaded. It never gets back there.
        if not self._has_loaded and await self.run_state() is RunState.INMIGRATE:
            raise HypervisorError(
                f"{self.name} is still receiving its memory and cannot run", hint="wait until it is paused", sent=False
            )
        await self._ask("cont")

    async def stop(self) -> None:
        await self._ask("stop")

    async def power_button(self) -> None:
        await self._ask("system_powerdown")

    async def listen_for_stream(self, *, host: str, source: str, multifd_channels: int = 1) -> int:
        """See ``Machine``. ``multifd_channels`` must be what the source's ``StreamLimits`` say.

        A stream that is refused leaves the machine alive, with the reason in ``stream_info().error``. While somebody
        is connected to the port without saying anything, QEMU 10.0 is deaf: open it to the source's address alone.
        """
        # QEMU's own announcements stay as they are: it queues them until `cont`. With `announce-rounds` 0 it (10.0)
        # frees a timer that virtio-net's reset then uses: the guest's next reboot would be a segmentation fault.
        creds = await self._renew_credentials("server")
        authz = _STREAM_OBJECT + secrets.token_hex(4)
        await self._ask("object-add", {"qom-type": "authz-simple", "id": authz, "identity": f"CN={source}"})
        await self._set_capabilities()
        await self._ask(
            "migrate-set-parameters",
            {
                "tls-creds": creds,
                "tls-authz": authz,
                "multifd-channels": multifd_channels,
            },
        )
        await self._ask("migrate-incoming", {**stream.channel(host, 0), "exit-on-error": False})
        port = stream.listening_port(await self._ask("query-migrate"))
        if port is None:
            raise HypervisorError(f"{self.name} does not listen on {host}: {self._last_words()}")
        return port

    async def guard_stream(self, *, pre_switchover_s: float, device_s: float) -> None:
        await self._let_guard_go()
        self._guardian = await guarding.start(
            self._directory, uid=self._record.uid, pre_switchover_s=pre_switchover_s, device_s=device_s
        )

    async def send_stream(self, *, host: str, port: int, target: str, limits: StreamLimits) -> None:
        rates = stream.rate_parameters(limits)
        creds = await self._renew_credentials("client")
        await self._set_capabilities()
        await self._ask(
            "migrate-set-parameters",
            {
                **rates,
                "multifd-channels": limits.multifd_channels,
                "tls-creds": creds,
                "tls-hostname": target,
            },
        )
        await self._ask("migrate", stream.channel(host, port))

    async def set_limits(self, limits: StreamLimits) -> None:
        """``multifd_channels`` cannot change any more once the stream has begun, and is not looked at."""
        await self._ask("migrate-set-parameters", stream.rate_parameters(limits))

    async def continue_stream(self) -> None:
        await self._ask("migrate-continue", {"state": "pre-switchover"})

    async def cancel_stream(self) -> None:
        # Not ``yank`` first: QEMU 10.0 in pre-switchover takes a cut connection for a failed migration, but goes on
        # waiting there with the guest paused, and then no cancel moves it any more. That is also what it does by itself
        # when the stream breaks there, so at the end it is let go of (refused unless the migration has failed).
        cancelling = asyncio.create_task(self._ask("migrate_cancel", session=self._cancel))
        try:
            await asyncio.wait({cancelling}, timeout=CANCEL_S)  # stuck in a write it answers nothing in band
            await self._unless_refused("yank", stream.YANK, oob=True)
            await cancelling
        finally:
            cancelling.cancel()
            await asyncio.wait({cancelling})
        await self._unless_refused("migrate-continue", stream.FAILED)

    async def _unless_refused(self, command: str, arguments: Mapping[str, Any], *, oob: bool = False) -> None:
        try:
            await self._ask(command, arguments, session=self._cancel, oob=oob)
        except HypervisorError as error:
            if not error.details.get("sent"):
                raise

    async def move_volume(self, device: BlockDevice) -> None:
        await self._plugging.move(device)

    async def plug_volume(self, device: BlockDevice, slot: int) -> None:
        await self._plugging.plug(device, slot)

    async def unplug_volume(self, serial: str, slot: int, *, in_use: bool = False) -> None:
        await self._plugging.unplug(serial, slot, in_use=in_use)

    async def resize_volume(self, device: BlockDevice) -> None:
        await self._plugging.resize(device)

    async def set_clock(self) -> GuestClock:
        if self._ended.is_set():
            raise self._gone()
        return await guest_agent.set_clock(self._directory.socket_path("qga"))

    async def tap_fds(self) -> tuple[int, ...]:
        taken: list[int] = []
        try:
            for number in self._record.tap_fds:
                taken.append(take_descriptor(self._process, number))
        except (EmpError, ProcessLookupError) as error:
            for descriptor in taken:
                os.close(descriptor)
            if isinstance(error, ProcessLookupError) or not self._process.alive:
                raise self._gone() from error
            raise
        return tuple(taken)

    async def kill(self) -> None:
        """See ``Machine``. Raises ``OutcomeUnknown`` if the kernel has not ended it after 30 s (stuck in I/O)."""
        await end_process(self._process, self.name)
        if self._watch is not None:
            await asyncio.wait({self._watch})
        await self._let_guard_go()
        await guarding.end(self._directory)
        self._directory.remove_launch(self._record.launch)

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        await self._let_guard_go()
        await self._control.close()
        await self._cancel.close()
        self._broadcast.close()

    async def _let_guard_go(self) -> None:
        if self._guardian is not None:
            guardian, self._guardian = self._guardian, None
            await guardian.close()

    async def _set_capabilities(self) -> None:
        known = [entry["capability"] for entry in await self._ask("query-migrate-capabilities")]
        await self._ask("migrate-set-capabilities", stream.capabilities(known))

    async def _renew_credentials(self, endpoint: str) -> str:
        """Make QEMU read the node's present certificate, and return the object's id; those of earlier streams go."""
        for entry in await self._ask("qom-list", {"path": "/objects"}):
            if entry["name"].startswith(_STREAM_OBJECT):
                await self._ask("object-del", {"id": entry["name"]})
        await asyncio.to_thread(self._directory.copy_credentials, self._credentials_dir, self._record.uid)
        creds = tls_credentials(_STREAM_OBJECT + secrets.token_hex(4), endpoint, self._record.directory_fd)
        await self._ask("object-add", creds)
        return str(creds["id"])

    async def _load_volume_credentials(self) -> None:
        if any(entry["name"] == CREDENTIALS for entry in await self._ask("qom-list", {"path": "/objects"})):
            return
        await asyncio.to_thread(self._directory.copy_credentials, self._credentials_dir, self._record.uid)
        await self._ask("object-add", tls_credentials(CREDENTIALS, "client", self._record.directory_fd))

    async def _ask(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        session: QmpSession | None = None,
        oob: bool = False,
        descriptor: int | None = None,
    ) -> Any:
        """Execute a command; a machine that is found to have ended raises ``MachineGone`` whatever the reply was."""
        if self._ended.is_set():
            raise self._gone()
        try:
            return await (session or self._control).execute(command, arguments, oob=oob, descriptor=descriptor)
        except EmpError as error:
            if error.details.get("connection_lost") or error.details.get("sent") is False:
                await self._is_ending()
            if self._ended.is_set():
                raise self._gone() from error
            raise

    async def _is_ending(self) -> None:
        """A process closes its sockets a moment before it is gone: give it that moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await self._ended.wait()

    def _gone(self) -> MachineGone:
        return MachineGone(f"the machine {self.name} has ended: {self._last_words()}")

    def _last_words(self) -> str:
        words = self._directory.log_tail() or "no word in its log"
        return f"{self._how_it_ended}; {words}" if self._how_it_ended else words


async def end_process(process: Process, name: str) -> None:
    """SIGKILL and wait for the end; ``OutcomeUnknown`` when it has not come after 30 s."""
    process.send(signal.SIGKILL)
    try:
        async with asyncio.timeout(KILL_TIMEOUT_S):
            await process.ended()
    except TimeoutError:
        raise OutcomeUnknown(
            f"QEMU of {name} (pid {process.pid}) was killed and has not ended in {KILL_TIMEOUT_S:g} s",
            hint="it may be stuck in the kernel: look at its state in /proc",
        ) from None
