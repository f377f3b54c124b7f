"""Every address of one EVM on this node: those declared, and those that its guest was heard to use.

A guest's word is not enough to use an address. What is heard is *asked* for with the heartbeat, the controller, which
knows who holds what, *allows* it or not, and only then do the taps let it through (docs/design/0015). A migration hands
over what is allowed; while the controller is away that holds, and nothing new is allowed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from ipaddress import ip_address, ip_interface
from pathlib import Path

from pydantic import ValidationError

from emp.agent.signal import Signal
from emp.model.base import Model
from emp.model.errors import EmpError
from emp.model.evm import EvmSpec
from emp.model.network import NO_TRAFFIC, LearntAddress, Traffic
from emp.network.base import Port
from emp.wire.files import write_private

log = logging.getLogger(__name__)

MOST = 128
"""heard of and not declared, of one EVM: more are not kept"""
FORGET_S = 3600.0
"""after so long without a word of it an address is forgotten; hosts ask for a neighbour in use far more often"""
ASK_S = 1.0
"""a guest that invents addresses makes its node report early at most so often"""


class Seen(Model):
    """What must outlive the agent, though not the node: the guest would not either."""

    learnt: tuple[LearntAddress, ...] = ()
    """that the EVM may use"""
    before: Traffic = NO_TRAFFIC
    """counted at the taps that it had on nodes that it came from"""


class SeenFiles:
    """Files ``<directory>/<evm>``, not synced to disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def get(self, evm: str) -> Seen:
        """Return what is kept of the EVM; what cannot be read is learnt again."""
        path = self._directory / evm
        try:
            return Seen.model_validate_json(path.read_bytes()) if path.exists() else Seen()
        except (OSError, ValidationError) as error:
            log.warning("%s: %s", path, error)
            return Seen()

    def put(self, evm: str, seen: Seen) -> None:
        """A file that cannot be written is logged: a restarted agent would have to learn again."""
        try:
            write_private(self._directory / evm, seen.model_dump_json().encode())
        except OSError as error:
            log.warning("what %s was seen to use is not kept: %s", evm, error)

    def drop(self, evm: str) -> None:
        """Idempotent."""
        (self._directory / evm).unlink(missing_ok=True)


class Addresses:
    def __init__(
        self,
        spec: EvmSpec,
        ports: Sequence[Port],
        files: SeenFiles,
        *,
        seen: Seen | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``seen``: what is kept of taps that are adopted; None: they are new, with what is declared in force."""
        self._spec = spec
        self._evm = spec.name
        self._ports = ports
        self._files = files
        self._clock = clock
        self._declared = {address: mac for mac, address in spec.addresses}
        self._macs = {mac for mac, _ in spec.addresses}
        self._subnets = [ip_interface(f"{nic.address}/{nic.prefix_length}").network for nic in spec.nics]
        self._known = {one.address: one for one in seen.learnt} if seen else {}
        self._heard_at = dict.fromkeys(self._known, clock())
        self._allowed: set[str] = set(self._known)
        self._applied: frozenset[str] | None = None if seen else frozenset(self._declared)
        self._asked_at = -ASK_S
        self._before = seen.before if seen else NO_TRAFFIC
        self._lock = asyncio.Lock()
        self.changed = Signal()
        """what may be used"""
        self.tell: Callable[[], None] = lambda: None
        """called when there is something to ask the controller for"""

    # -- what the guest says

    def listen(self) -> None:
        """Begin to hear the guest. Raises ``HostError`` where a tap is not there."""
        for nic, port in enumerate(self._ports):
            port.listen(lambda mac, ip, nic=nic: self.hear(nic, mac, ip))  # type: ignore[misc]

    def hear(self, nic: int, mac: str, address: str) -> None:
        """Take the guest's word that it uses an address, for what it is worth."""
        if mac not in self._macs or address in self._declared or not self._is_of_a_subnet(address):
            return
        self._forget()
        known, heard = self._known.get(address), LearntAddress(mac=mac, address=address, nic=nic)
        if known is None and len(self._known) >= MOST and not self._make_room():
            return
        self._known[address], self._heard_at[address] = heard, self._clock()
        if known != heard:
            self._tell()

    def _is_of_a_subnet(self, address: str) -> bool:
        """IPv4: of a subnet that a NIC is in. Which IPv6 networks there are is the controller's to know."""
        ip = ip_address(address)
        if ip.version == 6:
            return True
        return any(ip in net and ip not in (net[0], net[-1]) for net in self._subnets)

    def _forget(self) -> None:
        before_s = self._clock() - FORGET_S
        for address in [address for address, at_s in self._heard_at.items() if at_s < before_s]:
            del self._known[address], self._heard_at[address]

    def _make_room(self) -> bool:
        """What may be used stays; of the others the one goes that was heard of longest ago."""
        idle = min(self.asked, key=lambda one: self._heard_at[one.address], default=None)
        if idle is not None:
            del self._known[idle.address], self._heard_at[idle.address]
        return idle is not None

    def _tell(self) -> None:
        if self._clock() - self._asked_at >= ASK_S:  # else the next heartbeat tells anyway
            self._asked_at = self._clock()
            self.tell()

    # -- what it may use

    @property
    def learnt(self) -> tuple[LearntAddress, ...]:
        """Those that it uses and may use."""
        self._forget()
        return tuple(one for one in self._known.values() if one.address in self._allowed)

    @property
    def asked(self) -> tuple[LearntAddress, ...]:
        """Those that it was heard to use and may not."""
        self._forget()
        return tuple(one for one in self._known.values() if one.address not in self._allowed)

    async def allow(self, addresses: Collection[str]) -> None:
        """The controller's word: of what was heard, these and no others.

        If one is new, all are announced in the guest's name, as its own announcement was dropped.
        """
        if await self._set(addresses):
            try:
                await self.announce()
            except EmpError as error:
                log.error("%s: %s", self._evm, error)

    async def take(self, learnt: Sequence[LearntAddress]) -> None:
        """The word of a migration's source: what the EVM learnt there may be used here, and nothing else."""
        mine = [one for one in learnt[:MOST] if one.mac in self._macs and one.nic < len(self._ports)]
        self._known = {one.address: one for one in mine if one.address not in self._declared}
        self._heard_at = dict.fromkeys(self._known, self._clock())
        await self._set(self._known)

    async def _set(self, addresses: Collection[str]) -> bool:
        """Put in force what may be used; return whether anything is new. What fails is logged, and tried with the next
        word."""
        async with self._lock:
            self._allowed = set(addresses)
            usable = self.usable
            before = self._applied
            if usable == before:
                return False
            try:
                for port in self._ports:
                    await port.allow(usable)
            except EmpError as error:
                log.error("%s: which addresses it may use is not in force: %s", self._evm, error)
                self._applied = None
                return False
            self._applied = usable
            self._keep()
        self.changed.notify()
        return before is not None and not usable <= before

    def _keep(self) -> None:
        self._files.put(self._evm, Seen(learnt=self.learnt, before=self._before))

    @property
    def usable(self) -> frozenset[str]:
        """Every address that the EVM may use now."""
        return frozenset((*self._declared, *(one.address for one in self.learnt)))

    def behind(self, nic: int) -> list[tuple[str, str]]:
        """Return every usable (MAC, IP) that is reached through a NIC: its own first, then pods', then learnt ones."""
        return [*self._spec.behind(nic), *((one.mac, one.address) for one in self.learnt if one.nic == nic)]

    def macs(self, nic: int) -> list[str]:
        """Return what is behind a NIC, its own first."""
        return list(dict.fromkeys(mac for mac, _ in self.behind(nic)))

    async def announce(self) -> None:
        """Tell the segment where every address of the EVM is, each from the port that it is behind. Raises
        ``HostError``."""
        for nic, port in enumerate(self._ports):
            await port.announce(self.behind(nic))

    # -- how much it says

    @property
    def traffic(self) -> Traffic:
        """Since the EVM was started. Raises ``HostError`` where a tap is gone."""
        return sum((port.traffic() for port in self._ports), self._before)

    def came_with(self, before: Traffic) -> None:
        """What was counted at the taps that the EVM had on the nodes that it came from."""
        self._before = before
        self._keep()

    # -- the end

    def forget(self) -> None:
        """The machine is gone. Idempotent."""
        self._files.drop(self._evm)
