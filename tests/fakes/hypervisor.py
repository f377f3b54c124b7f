"""The protocols of ``emp.hypervisor.base`` over fake QEMUs; it passes the drivers' contract suite."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TypeVar

from emp.hypervisor.base import (
    UNPLUG_TIMEOUT_S,
    BlockDevice,
    HypervisorFacts,
    LaunchPlan,
    MachineEvent,
    MachineEventKind,
    MachineGone,
    NoGuestAgent,
    ProcessId,
    Received,
    RunState,
    StreamInfo,
    StreamLimits,
    StreamStatus,
)
from emp.hypervisor.qemu.disks import check_device, check_slot
from emp.hypervisor.qemu.stream import rate_parameters
from emp.model.clock import GuestClock
from emp.model.errors import BadInput, Conflict, HypervisorError, OutcomeUnknown
from emp.model.evm import EvmSpec
from tests.fakes.fabric import Fabric
from tests.fakes.qemu import FakeQemu

T = TypeVar("T")

LAUNCH_S = (0.05, 0.3)


def _check_serial(slot: int, there: BlockDevice, serial: str) -> None:
    if there.serial != serial:
        raise Conflict(f"the disk {there.serial} is at slot {slot}, not {serial}", field="slot")


class Subscription(AsyncIterator[MachineEvent]):
    """One listener's events, in order."""

    def __init__(self) -> None:
        self._waiting: deque[MachineEvent] = deque()
        self._news = asyncio.Event()
        self._closed = False

    def put(self, event: MachineEvent) -> None:
        self._waiting.append(event)
        self._closed = self._closed or event.kind is MachineEventKind.GONE
        self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def __anext__(self) -> MachineEvent:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()


class FakeMachine:
    """An agent's hold on a fake QEMU."""

    def __init__(self, host: FakeHypervisor, qemu: FakeQemu) -> None:
        self._host = host
        self._fabric = host.fabric
        self.qemu = qemu
        self._subscriptions: list[Subscription] = []
        self._closed = False

    @property
    def name(self) -> str:
        return self.qemu.spec.name

    @property
    def process(self) -> ProcessId:
        return self.qemu.process

    @property
    def console_path(self) -> Path:
        return Path(f"/nonexistent/{self.name}")

    def events(self) -> AsyncIterator[MachineEvent]:
        subscription = Subscription()
        if not self.qemu.alive:
            gone = MachineEvent(MachineEventKind.GONE, self._fabric.wall_clock(self.qemu.node), detail="killed")
            subscription.put(gone)
        elif self._closed:
            subscription.close()
        else:
            self.qemu.subscribe(subscription.put)
            self._subscriptions.append(subscription)
        return subscription

    async def run_state(self) -> RunState:
        return await self._ask("query-status", lambda: self.qemu.run_state)

    async def received(self, nic: int, *, sizes: bool = True, again: bool = False) -> Received:
        return Received()

    async def stream_info(self) -> StreamInfo:
        return await self._ask("query-migrate", self.qemu.query_migrate)

    async def cont(self) -> None:
        if await self.run_state() is RunState.INMIGRATE:
            raise HypervisorError(f"{self.name} is still receiving its memory and cannot run", sent=False)
        await self._ask("cont", self.qemu.cont)

    async def stop(self) -> None:
        await self._ask("stop", self.qemu.stop)

    async def power_button(self) -> None:
        await self._ask("system_powerdown", self.qemu.press_power_button)

    async def listen_for_stream(self, *, host: str, source: str, multifd_channels: int = 1) -> int:
        return await self._ask("migrate-incoming", lambda: self.qemu.migrate_incoming(source, multifd_channels))

    async def guard_stream(self, *, pre_switchover_s: float, device_s: float) -> None:
        def guard() -> None:
            self.qemu.guard_s = {StreamStatus.PRE_SWITCHOVER: pre_switchover_s, StreamStatus.DEVICE: device_s}

        await self._ask("guard", guard)

    async def send_stream(self, *, host: str, port: int, target: str, limits: StreamLimits) -> None:
        rate_parameters(limits)
        me = self._host.identity
        await self._ask("migrate", lambda: self.qemu.migrate(port, me, target, limits))

    async def set_limits(self, limits: StreamLimits) -> None:
        rate_parameters(limits)

        def change() -> None:
            if self.qemu.stream is not None:
                self.qemu.stream.limits = limits

        await self._ask("migrate-set-parameters", change)

    async def continue_stream(self) -> None:
        await self._ask("migrate-continue", self.qemu.migrate_continue)

    async def cancel_stream(self) -> None:
        await self._ask("yank", self.qemu.yank_and_cancel, oob=True)

    async def move_volume(self, device: BlockDevice) -> None:
        await self._ask("query-migrate", self.qemu.check_no_migration)
        slot = await self._ask("qom-list", lambda: self.qemu.slot_of(device.serial))
        if self.qemu.disks[slot] != device:
            await self._ask("blockdev-add", lambda: self.qemu.check_source(device))
            await self._drain()
            await self._ask("blockdev-reopen", lambda: self.qemu.change({**self.qemu.disks, slot: device}))

    async def plug_volume(self, device: BlockDevice, slot: int) -> None:
        check_slot(slot)
        check_device(device)
        await self._ask("query-migrate", self.qemu.check_no_migration)
        if (there := self.qemu.disks.get(slot)) is not None:
            _check_serial(slot, there, device.serial)
            return
        await self._ask("blockdev-add", lambda: self.qemu.check_source(device))
        await self._ask("device_add", lambda: self.qemu.change({**self.qemu.disks, slot: device}))

    async def unplug_volume(self, serial: str, slot: int, *, in_use: bool = False) -> None:
        check_slot(slot)
        await self._ask("query-migrate", self.qemu.check_no_migration)
        if (there := self.qemu.disks.get(slot)) is None:
            return
        _check_serial(slot, there, serial)
        if self.qemu.executing and self.qemu.guest and self.qemu.guest.uses_volumes and not in_use:
            await asyncio.sleep(UNPLUG_TIMEOUT_S)
            raise Conflict(f"the guest of {self.name} is using the volume", field="volume", hint="unmount it")
        kept = {where: device for where, device in self.qemu.disks.items() if where != slot}
        await self._ask("device_del", lambda: self.qemu.change(kept))

    async def resize_volume(self, device: BlockDevice) -> None:
        await self._ask("query-migrate", self.qemu.check_no_migration)
        slot = await self._ask("qom-list", lambda: self.qemu.slot_of(device.serial))
        if device.size_bytes < self.qemu.disks[slot].size_bytes:
            raise BadInput("a disk cannot shrink", field="size_bytes", hint="volumes only grow")
        await self.move_volume(device)

    async def _drain(self) -> None:
        """I/O of the guest that is on its way to the old source is waited for, with QEMU deaf meanwhile."""
        while self.qemu.executing and not self.qemu.storage_is_up():
            self.qemu.deaf = True
            await self._fabric.look()
        self.qemu.deaf = False

    async def set_clock(self) -> GuestClock:
        """Takes no time, and is no moment of a seed's run: nothing depends on it."""
        if not self.qemu.alive:
            raise self._gone()
        self._fabric.watch_clock(self.qemu)
        found_ms = self.qemu.clock_ms
        if found_ms is None or not self.qemu.executing:
            raise NoGuestAgent("no agent in the guest answers")
        self.qemu.clock_ms = max(0.0, found_ms)
        return GuestClock(found_ms=found_ms, now_ms=self.qemu.clock_ms, error_ms=0.0, is_set=found_ms < 0)

    async def tap_fds(self) -> tuple[int, ...]:
        if not self.qemu.alive:
            raise self._gone()
        return self._host.copies(self.qemu.plan.tap_fds)

    async def kill(self) -> None:
        await self._fabric.moment("kill", self.qemu.node)
        await self._fabric.breath()
        self.qemu.die()
        await self._fabric.moment("killed", self.qemu.node)

    async def close(self) -> None:
        self._closed = True
        for subscription in self._subscriptions:
            self.qemu.unsubscribe(subscription.put)
            subscription.close()

    async def _ask(self, command: str, action: Callable[[], T], *, oob: bool = False) -> T:
        """Execute a command as over QMP: it takes a moment, and a hung QEMU may still execute it when it wakes."""
        qemu, verdict = self.qemu, await self._fabric.moment(f"qmp {command}", self.qemu.node)
        await self._fabric.breath()
        if self._is_deaf(oob):
            qemu.left_in_socket.append(action)
            await self._until_heard(command, oob)
            if action in qemu.left_in_socket:
                qemu.left_in_socket.remove(action)
        if not qemu.alive:
            raise self._gone()
        result = action()
        if verdict == "lose":
            await asyncio.sleep(self._host.timeout_s)
            raise self._unanswered(command)
        await self._fabric.breath()
        await self._fabric.moment(f"qmp {command} answered", qemu.node)
        return result

    async def _until_heard(self, command: str, oob: bool) -> None:
        try:
            async with asyncio.timeout(self._host.timeout_s):
                while self._is_deaf(oob):
                    await self._fabric.look()
        except TimeoutError:
            raise self._unanswered(command) from None

    def _is_deaf(self, oob: bool) -> bool:
        return self.qemu.alive and (self.qemu.hung or (self.qemu.deaf and not oob))

    def _unanswered(self, command: str) -> OutcomeUnknown:
        return OutcomeUnknown(f"QEMU of {self.name} did not answer {command} within {self._host.timeout_s:g} s")

    def _gone(self) -> MachineGone:
        return MachineGone(f"the machine {self.name} has ended: killed")


class FakeHypervisor:
    """The machines of one node; they outlive the agent that has made them, as this object does."""

    def __init__(self, fabric: Fabric, node: str, *, role: str = "qemu", timeout_s: float = 5.0) -> None:
        self.fabric = fabric
        self.node = node
        self.identity = f"{role}-{node}"
        self.timeout_s = timeout_s
        self._launching: set[str] = set()
        self._copies = itertools.count(100)

    def copies(self, taps: tuple[int, ...]) -> tuple[int, ...]:
        """Descriptors of fake taps: numbers alone."""
        return taps

    async def facts(self) -> HypervisorFacts:
        machines, models = ("pc-i440fx-9.2", "pc-i440fx-10.0"), ("Nehalem-v1", "Westmere-v1", "qemu64-v1")
        return HypervisorFacts("10.0.2", "tcg", machines, "pc-i440fx-10.0", models, "Westmere-v1")

    async def launch(self, plan: LaunchPlan) -> FakeMachine:
        if len(plan.tap_fds) != len(plan.spec.nics):
            raise BadInput("one descriptor per NIC", field="tap_fds")
        name = plan.spec.name
        if name in self._launching or self.alive(name):
            raise Conflict(f"{name} has a machine on this node", hint="kill or adopt it first")
        self._launching.add(name)
        try:
            await self.fabric.moment("launch", self.node)
            await self.fabric.breath(*LAUNCH_S)
            for device in plan.volumes:
                if not self.fabric.opens(self.node, device):
                    raise HypervisorError(f"blockdev {device.volume}: Connection refused")
            machine = FakeMachine(self, FakeQemu(self.fabric, self.node, plan))
        finally:
            self._launching.discard(name)
        await self.fabric.moment("launched", self.node)
        return machine

    def alive(self, name: str) -> FakeQemu | None:
        here = (q for q in self.fabric.qemus if q.node == self.node and q.spec.name == name and q.alive)
        return next(here, None)

    async def found(self) -> Mapping[str, ProcessId]:
        return {q.spec.name: q.process for q in self.fabric.qemus if q.node == self.node and q.alive}

    async def adopt(self, spec: EvmSpec, process: ProcessId) -> FakeMachine:
        qemu = self.alive(spec.name)
        if qemu is None or qemu.process != process or qemu.spec.uuid != spec.uuid:
            raise HypervisorError(f"process {process.pid} is not the machine of {spec.name} on this node")
        machine = FakeMachine(self, qemu)
        await machine.run_state()
        return machine

    async def kill_stranger(self, name: str, process: ProcessId) -> None:
        qemu = self.alive(name)
        with contextlib.suppress(MachineGone):
            if qemu is not None and qemu.process == process:
                await FakeMachine(self, qemu).kill()
