"""Relays of this node: what a source lends to a target, and what a target borrows until it has a volume itself.

A volume that one node alone can have stays with the source of a migration until the EVM runs at the target. Meanwhile
the target's I/O goes through two processes, one on each node (``emp.volumes.relay``), which outlive the agents. A file
says of each what it is for, so that a restarted agent knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TypeVar

from emp.agent.devices import Devices
from emp.agent.signal import Signal
from emp.hypervisor.base import BlockDevice, RelaySocket
from emp.model.errors import Conflict, EmpError, NotFound
from emp.model.orders import LendOrder, Lent, VolumeGrant
from emp.model.volume import HostDevice, NbdEndpoint
from emp.volumes.base import RelayDriver, RelayState, RelayStatus
from emp.wire.files import write_private
from emp.wire.identity import Identity, Role

log = logging.getLogger(__name__)

T = TypeVar("T")

AGAIN_S = 0.5
FLUSH_S = 2.0
"""for what the guest has written to be flushed, before its machine and its relay are ended"""
LET_GO_S = 1.0
"""for what is on its way to a lender that no longer has the volume"""


class Side(StrEnum):
    LENT = "lent"
    BORROWED = "borrowed"


@dataclass(frozen=True)
class Use:
    """What a relay is for."""

    volume: str
    evm: str
    side: Side
    migration: str = ""
    """whose target the volume is lent to"""

    @property
    def name(self) -> str:
        return f"{self.volume}-{self.side}"


class Relays:
    def __init__(self, driver: RelayDriver, devices: Devices, path: Path) -> None:
        """``path``: of the file that says what each is for; on a file system that a reboot empties, as it ends them."""
        self._driver = driver
        self._devices = devices
        self._path = path
        self._uses: dict[str, Use] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled: set[str] = set()
        """borrowed volumes whose I/O may go on: at this node's own attachment, or relayed, as that could not be had"""
        self._changed = Signal()

    async def start(self) -> None:
        """Take back what an earlier agent of this node had begun; a relay of which nobody knows the use is ended."""
        if self._path.exists():
            uses = (Use(**use) for use in json.loads(self._path.read_bytes()))
            self._uses = {use.name: Use(use.volume, use.evm, Side(use.side), use.migration) for use in uses}
        await self._driver.start()
        names = await self._driver.names()
        if set(self._uses) - set(names):
            self._save({name: use for name, use in self._uses.items() if name in names})
        for name in names:
            if name not in self._uses:
                await self._driver.end(name)

    async def close(self) -> None:
        """The agent stops; the relays go on."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._driver.close()

    # -- source

    async def lend(self, order: LendOrder) -> Lent:
        """Serve the volumes to the target, writes held. The same order again gets the same answer."""
        peer = Identity(Role.AGENT, order.target).cn
        endpoints = await asyncio.gather(*(self._lend(order, grant, peer) for grant in order.volumes))
        return Lent(endpoints={grant.volume.id: at for grant, at in zip(order.volumes, endpoints, strict=True)})

    async def _lend(self, order: LendOrder, grant: VolumeGrant, peer: str) -> NbdEndpoint:
        use = Use(grant.volume.id, order.evm, Side.LENT, order.migration)
        if (older := self._uses.get(use.name, use)) != use:  # an earlier migration's, whose end has not been heard
            await self._end(older)
        source = await self._devices.source(grant)
        serve = partial(self._driver.serve, source=source, size_bytes=grant.volume.size_bytes, peer=peer)
        endpoint = await self._make(use, serve)
        if order.given:
            await self._driver.open(use.name)
        return endpoint

    @property
    def lending(self) -> tuple[str, ...]:
        """Return the migrations for which something is lent here."""
        return tuple(sorted({use.migration for use in self._uses.values() if use.side is Side.LENT}))

    def let_through(self, migration: str) -> None:
        """GIVEN is on disk: let the target's writes through, until that is done; return at once."""
        for use in self._of(Side.LENT, migration=migration):
            name = f"open {use.name} for {migration}"
            if not any(task.get_name() == name for task in self._tasks):
                task = asyncio.create_task(self._let_through(use), name=name)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _let_through(self, use: Use) -> None:
        while self._uses.get(use.name) == use:
            try:
                await self._driver.open(use.name)
            except NotFound:
                return
            except EmpError as error:
                log.error("%s: the target cannot write to %s yet: %s", use.migration, use.volume, error)
                await asyncio.sleep(AGAIN_S)
            else:
                return

    async def take_back(self, migration: str, volumes: Iterable[str] | None = None) -> None:
        """End what was lent for ``migration``: all, or ``volumes``; return when nothing of it has them open."""
        wanted = None if volumes is None else set(volumes)
        uses = [use for use in self._of(Side.LENT, migration=migration) if wanted is None or use.volume in wanted]
        await asyncio.gather(*(self._end(use) for use in uses))

    # -- target

    async def borrow(self, evm: str, grant: VolumeGrant) -> BlockDevice:
        """Return what the EVM's machine opens for a volume that its source lends."""
        assert grant.relay is not None
        volume = grant.volume
        dial = partial(self._driver.dial, machine=evm, upstream=grant.relay, size_bytes=volume.size_bytes)
        path = await self._make(Use(volume.id, evm, Side.BORROWED), dial)
        return BlockDevice(volume.id, volume.serial, volume.size_bytes, RelaySocket(path))

    def borrows(self, volume: str) -> bool:
        return f"{volume}-{Side.BORROWED}" in self._uses

    async def hold(self, volume: str, *, within_s: float) -> RelayStatus:
        """Take no more I/O from the guest, and see to its end what was taken. Raises as ``RelayDriver.hold``."""
        return await self._driver.hold(self._borrowed(volume).name, within_s=within_s)

    async def go_on(self, grant: VolumeGrant) -> RelayStatus:
        """Let a held volume's I/O go on where ``grant`` says: at this node's own attachment, or at the lender's."""
        use = self._borrowed(grant.volume.id)
        source = grant.relay or await self._devices.source(grant)
        status = await self._driver.status(use.name)
        if grant.relay is None:
            status = await self._switch(use.name, source)
        elif status.state in (RelayState.HELD, RelayState.HOLDING):
            status = await self._driver.switch(use.name, source)
        self._settled.add(use.volume)
        self._changed.notify()
        return status

    async def _switch(self, name: str, source: NbdEndpoint | HostDevice) -> RelayStatus:
        """Of a relay that nobody could hold, its lender's node being lost say: what is on its way there never ends.

        QEMU must not be asked to wait for that (``Machine.move_volume``); here it is sent again.
        """
        try:
            return await self._driver.switch(name, source)
        except Conflict:
            with contextlib.suppress(EmpError):
                await self._driver.hold(name, within_s=LET_GO_S)
            return await self._driver.switch(name, source)

    async def until_settled(self, evm: str) -> None:
        """Return once each volume that the EVM borrows is this node's own, or is to go on as it is for now."""
        while any(use.volume not in self._settled for use in self._of_evm(evm, Side.BORROWED)):
            await self._changed.beyond(self._changed.version)

    def _borrowed(self, volume: str) -> Use:
        try:
            return self._uses[f"{volume}-{Side.BORROWED}"]
        except KeyError:
            raise NotFound(f"{volume} is not relayed here", field="volume") from None

    async def give_back(self, volume: str) -> None:
        """The machine has the volume itself: end the relay."""
        with contextlib.suppress(NotFound):
            await self._end(self._borrowed(volume))

    async def flush(self, evm: str) -> None:
        """Hold and flush what the EVM borrows, as well as that goes: its guest has ended, or is about to be."""
        for use in self._of_evm(evm, Side.BORROWED):
            try:
                await self._driver.hold(use.name, within_s=FLUSH_S)
            except EmpError as error:
                log.warning("%s: the relay of %s ends, and is not flushed: %s", evm, use.volume, error)

    # -- either

    async def end_of(self, evm: str, side: Side | None = None) -> None:
        """End every relay of an EVM: its machine here is gone, or nothing of it may be lent any more."""
        await asyncio.gather(*(self._end(use) for use in self._of_evm(evm, side)))

    def _of_evm(self, evm: str, side: Side | None) -> list[Use]:
        return [use for use in self._uses.values() if use.evm == evm and side in (None, use.side)]

    async def _make(self, use: Use, make: Callable[[str], Awaitable[T]]) -> T:
        """Make a relay; one of that name that was made for something else, an earlier migration say, goes first."""
        self._note(use)
        try:
            made = await make(use.name)
        except Conflict:
            await self._driver.end(use.name)
            made = await make(use.name)
        if self._uses.get(use.name) != use:  # it was taken back meanwhile, perhaps before it was there
            await self._driver.end(use.name)
            raise Conflict(f"the relay of {use.volume} is not wanted any more", field="volume")
        return made

    def _of(self, side: Side, *, migration: str) -> list[Use]:
        return [use for use in self._uses.values() if (use.side, use.migration) == (side, migration)]

    async def _end(self, use: Use) -> None:
        await self._driver.end(use.name)
        if self._uses.get(use.name) == use:
            self._save({name: other for name, other in self._uses.items() if other != use})

    def _note(self, use: Use) -> None:
        if self._uses.get(use.name) != use:
            self._save(self._uses | {use.name: use})

    def _save(self, uses: dict[str, Use]) -> None:
        if uses:
            write_private(self._path, json.dumps([asdict(use) for use in uses.values()]).encode())
        else:
            self._path.unlink(missing_ok=True)
        self._uses = uses
        self._settled &= {use.volume for use in uses.values()}
        self._changed.notify()
