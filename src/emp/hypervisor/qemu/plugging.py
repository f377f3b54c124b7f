"""Volumes of a machine that lives: moved to another source, plugged, unplugged, grown.

Nothing is remembered here. Each order first looks at what QEMU has, by the names of ``disks``, and does what is
missing; so one that was cut short is finished, or undone, by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Protocol

from emp.hypervisor.base import QUIET_S, UNPLUG_TIMEOUT_S, BlockDevice, RelaySocket, StreamStatus
from emp.hypervisor.qemu import disks, stream
from emp.hypervisor.qemu.opening import open_device, open_relays
from emp.model.errors import BadInput, Conflict, HypervisorError, NotFound
from emp.model.volume import HostDevice, NbdEndpoint

LOOK_S = 0.05
_DISK = re.compile(r"disk(\d+)")
_RELAYS = 100
"""number of the fdset of a slot's relay directory, less the slot; that of a slot's device is the slot itself"""
_MIGRATING = frozenset(
    {
        StreamStatus.SETUP,
        StreamStatus.ACTIVE,
        StreamStatus.PRE_SWITCHOVER,
        StreamStatus.DEVICE,
        StreamStatus.CANCELLING,
    }
)
_NOT_OURS = ("inmigrate", "postmigrate", "finish-migrate")
"""the guest is, or may be, somewhere else"""


class Ask(Protocol):
    """``QemuMachine``'s way to its QEMU."""

    async def __call__(
        self, command: str, arguments: dict[str, Any] | None = None, *, descriptor: int | None = None
    ) -> Any: ...


class Plugging:
    """The volumes of one QEMU; ``emp.hypervisor.base.Machine`` has what the methods promise."""

    def __init__(self, name: str, ask: Ask, load_credentials: Callable[[], Awaitable[None]]) -> None:
        """``load_credentials`` sees to it that QEMU can show its certificate to a volume server."""
        self._name = name
        self._ask = ask
        self._load_credentials = load_credentials
        self._lock = asyncio.Lock()

    async def move(self, device: BlockDevice) -> None:
        async with self._lock:
            await self._check_no_migration()
            slot = await self._slot_of(device.serial)
            if await self._file(slot) != disks.source_name(slot, device):
                await self._open(slot, device)
                await self._ask("blockdev-reopen", {"options": [disks.raw_node(slot, device)]})
            await self._forget_sources(slot, but=disks.source_name(slot, device))

    async def plug(self, device: BlockDevice, slot: int) -> None:
        disks.check_slot(slot)
        disks.check_device(device)
        async with self._lock:
            await self._check_no_migration()
            if (there := (await self._disks()).get(slot)) is not None:
                self._check_serial(slot, there, device.serial)
                return
            await self._clear(slot)
            try:
                await self._open(slot, device)
                await self._ask("blockdev-add", disks.raw_node(slot, device))
                await self._ask("device_add", disks.disk(slot, device))
            except HypervisorError:
                with contextlib.suppress(HypervisorError):
                    await self._clear(slot)
                raise

    async def unplug(self, serial: str, slot: int, *, in_use: bool) -> None:
        disks.check_slot(slot)
        async with self._lock:
            await self._check_no_migration()
            if (there := (await self._disks()).get(slot)) is not None:
                self._check_serial(slot, there, serial)
                if not in_use:
                    await self._until_quiet(slot)
                await self._ask("device_del", {"id": disks.disk_name(slot)})
            await self._clear(slot)

    async def resize(self, device: BlockDevice) -> None:
        async with self._lock:
            await self._check_no_migration()
            slot = await self._slot_of(device.serial)
            size_bytes = await self._size_bytes(slot)
            if device.size_bytes < size_bytes:
                raise BadInput(
                    f"the disk has {size_bytes} bytes and cannot shrink to {device.size_bytes}",
                    field="size_bytes",
                    hint="volumes only grow",
                )
            raw = disks.raw_node(slot, device)
            if await self._file(slot) != disks.source_name(slot, device):
                await self._open(slot, device)
                # As big as what is below it, or QEMU would refuse to change it: it does not tell the disk of a reopen.
                whole = {option: value for option, value in raw.items() if option != "size"}
                await self._ask("blockdev-reopen", {"options": [whole]})
            if device.size_bytes > size_bytes:
                await self._ask("block_resize", {"node-name": disks.raw_name(slot), "size": device.size_bytes})
            await self._ask("blockdev-reopen", {"options": [raw]})
            await self._forget_sources(slot, but=disks.source_name(slot, device))

    # -- what QEMU has

    async def _check_no_migration(self) -> None:
        status = stream.status((await self._ask("query-migrate")).get("status"))
        state = (await self._ask("query-status"))["status"]
        if status in _MIGRATING or state in _NOT_OURS:
            raise Conflict(
                f"{self._name} is being migrated", field="evm", hint="its volumes can change when that is over"
            )

    async def _disks(self) -> dict[int, str]:
        """Return slot -> serial."""
        found = {}
        for entry in await self._ask("qom-list", {"path": "/machine/peripheral"}):
            if match := _DISK.fullmatch(entry["name"]):
                path = {"path": f"/machine/peripheral/{entry['name']}", "property": "serial"}
                found[int(match[1])] = str(await self._ask("qom-get", path))
        return found

    async def _slot_of(self, serial: str) -> int:
        for slot, there in (await self._disks()).items():
            if there == serial:
                return slot
        raise NotFound(f"{self._name} has no disk with the serial {serial}", field="volume")

    @staticmethod
    def _check_serial(slot: int, there: str, serial: str) -> None:
        if there != serial:
            raise Conflict(f"the disk {there} is at slot {slot}, not {serial}", field="slot", hint="use another slot")

    async def _stats(self, slot: int) -> dict[str, Any] | None:
        """Return ``query-blockstats`` of the disk; None once QEMU is rid of it."""
        for entry in await self._ask("query-blockstats"):
            if entry.get("node-name") == disks.raw_name(slot):
                return dict(entry)
        return None

    async def _file(self, slot: int) -> str | None:
        return disks.file_of(await self._stats(slot) or {})

    async def _nodes(self) -> dict[str, dict[str, Any]]:
        return {node["node-name"]: node for node in await self._ask("query-named-block-nodes", {"flat": True})}

    async def _size_bytes(self, slot: int) -> int:
        return int((await self._nodes())[disks.raw_name(slot)]["image"]["virtual-size"])

    # -- sources

    async def _open(self, slot: int, device: BlockDevice) -> None:
        """Add the node of the source. One that an order that was cut short has left may be of an earlier attachment."""
        name = disks.source_name(slot, device)
        if name in await self._nodes():
            await self._ask("blockdev-del", {"node-name": name})
        handles = disks.Handles()
        match device.source:
            case HostDevice() as source:
                with _opened(open_device(source)) as descriptor:
                    await self._give(slot, descriptor)
                handles = disks.Handles(fdset=slot)
            case RelaySocket() as source:
                with _opened(open_relays(source)) as descriptor:
                    handles = disks.Handles(directory=await self._give(_RELAYS + slot, descriptor))
            case NbdEndpoint():
                await self._load_credentials()
        try:
            await self._ask("blockdev-add", disks.source_node(slot, device, handles))
        finally:
            if isinstance(device.source, HostDevice):  # its node has a copy; a device that is let go of must be closed
                await self._take_back(slot)

    async def _give(self, fdset: int, descriptor: int) -> int:
        """Put a descriptor into an otherwise empty fdset, and return QEMU's own number of it."""
        await self._take_back(fdset)
        return int((await self._ask("add-fd", {"fdset-id": fdset}, descriptor=descriptor))["fd"])

    async def _take_back(self, fdset: int) -> None:
        for one in await self._ask("query-fdsets"):
            if one["fdset-id"] == fdset and one["fds"]:
                await self._ask("remove-fd", {"fdset-id": fdset})

    async def _forget_sources(self, slot: int, *, but: str | None = None) -> None:
        prefix, nodes = disks.source_prefix(slot), await self._nodes()
        for name in nodes:
            if name.startswith(prefix) and name != but:
                await self._ask("blockdev-del", {"node-name": name})
        if but is None or nodes[but]["drv"] != "nbd":
            await self._take_back(_RELAYS + slot)
        await self._take_back(slot)

    async def _clear(self, slot: int) -> None:
        """Remove what is there of a slot that has no disk."""
        await self._until_unplugged(slot)
        if disks.raw_name(slot) in await self._nodes():
            await self._ask("blockdev-del", {"node-name": disks.raw_name(slot)})
        await self._forget_sources(slot)

    # -- a disk's end

    async def _until_quiet(self, slot: int) -> None:
        """Nothing tells of the guest's last I/O but QEMU's count of the time since."""
        try:
            async with asyncio.timeout(UNPLUG_TIMEOUT_S):
                while True:
                    stats = await self._stats(slot)
                    idle_ns = stats["stats"].get("idle_time_ns") if stats else None
                    if idle_ns is None or idle_ns >= QUIET_S * 1e9:
                        return
                    await asyncio.sleep(QUIET_S - idle_ns / 1e9 + LOOK_S)
        except TimeoutError:
            raise Conflict(
                f"the guest of {self._name} is using the volume",
                field="volume",
                hint="unmount it in the guest; or, if it may get I/O errors, insist",
            ) from None

    async def _until_unplugged(self, slot: int) -> None:
        """A disk that is out of QEMU's tree is still held for a moment (RCU)."""
        try:
            async with asyncio.timeout(UNPLUG_TIMEOUT_S):
                while slot in await self._disks() or await self._stats(slot):  # noqa: ASYNC110 - no event
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise Conflict(
                f"the disk at slot {slot} of {self._name} is not let go of",
                field="volume",
                hint="try again: the order stands",
            ) from None


@contextlib.contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
