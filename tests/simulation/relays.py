"""A node's relays: ``emp.volumes.base.RelayDriver`` without a byte. They outlive the agent, and end with their host."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emp.model.errors import Conflict, NotFound, Refused, Unreachable
from emp.model.volume import HostDevice, NbdEndpoint
from emp.volumes.base import RelayState, RelayStatus, RoundTrip
from tests.simulation.loop import here

if TYPE_CHECKING:
    from tests.simulation.world import World

Source = HostDevice | NbdEndpoint


@dataclass
class Relay:
    """``peer``: to whom it serves, of a lent one; ``path``: where QEMU finds it, of a borrowed one."""

    upstream: Source
    peer: str | None = None
    path: Path | None = None
    writes_open: bool = False
    held: bool = False


class SimRelays:
    def __init__(self, world: World, node: str) -> None:
        self.world = world
        self.node = node
        self.relays: dict[str, Relay] = {}

    # -- what the ground asks

    def serves(self, path: Path, *, writes: bool) -> bool:
        """Whether QEMU's I/O at ``path`` gets through now."""
        relay = next((relay for relay in self.relays.values() if relay.path == path), None)
        return relay is not None and not relay.held and self.world.reads(self.node, relay.upstream, writes=writes)

    def lends(self, export: str, *, writes: bool) -> bool:
        relay = self.relays.get(export)
        if relay is None or relay.peer is None or (writes and not relay.writes_open):
            return False
        return self.world.reads(self.node, relay.upstream, writes=writes)

    def open_for(self, volumes: Sequence[str]) -> list[str]:
        """Return the relays that let another node write to ``volumes``."""
        names = [name for name, relay in self.relays.items() if relay.peer and relay.writes_open]
        return [name for name in names if name.startswith(tuple(volumes))] if volumes else []

    # -- what the agent orders

    async def start(self) -> None:
        here()

    async def close(self) -> None:
        here()

    async def names(self) -> tuple[str, ...]:
        here()
        return tuple(self.relays)

    async def serve(self, name: str, *, source: Source, size_bytes: int, peer: str) -> NbdEndpoint:
        await self._acts(f"relay {name}")
        relay = self.relays.get(name)
        if relay is None:
            relay = self._made(name, Relay(source, peer=peer))
        if (relay.upstream, relay.peer) != (source, peer):
            raise Conflict(f"the relay {name} is there for something else", field="name")
        if not self.world.reads(self.node, source, writes=False):
            raise Unreachable(f"{name}: the volume does not answer")
        return NbdEndpoint(host=self.node, port=1, export=name, tls_hostname=f"agent-{self.node}")

    async def open(self, name: str) -> RelayStatus:
        await self._acts(f"open relay {name}")
        with self.world.disturbance():
            self._of(name).writes_open = True
        return self._status(name)

    async def dial(self, name: str, *, machine: str, upstream: NbdEndpoint, size_bytes: int) -> Path:
        await self._acts(f"dial {name}")
        relay = self.relays.get(name)
        if relay is None:
            relay = self._made(name, Relay(upstream, path=Path(machine, name)))
        if relay.upstream != upstream:
            raise Conflict(f"the relay {name} is there for something else", field="name")
        if not self.world.reads(self.node, upstream, writes=False):
            raise Unreachable(f"{name}: the source's relay does not answer")
        assert relay.path is not None
        return relay.path

    async def hold(self, name: str, *, within_s: float) -> RelayStatus:
        await self._acts(f"hold {name}")
        relay = self._of(name)
        flushed = self.world.reads(self.node, relay.upstream, writes=True)
        with self.world.disturbance():
            relay.held = True
        if not flushed:
            await asyncio.sleep(within_s)
            raise Unreachable(f"{name}: what is on its way is not answered")
        return self._status(name)

    async def switch(self, name: str, source: Source) -> RelayStatus:
        await self._acts(f"switch {name}")
        relay = self._of(name)
        if not relay.held and relay.upstream == source:
            return self._status(name)
        if not relay.held:
            raise Conflict(f"{name} is not held", field="name")
        if not self.world.reads(self.node, source, writes=False):
            raise Unreachable(f"{name}: the volume does not answer")
        with self.world.disturbance():
            relay.upstream, relay.held = source, False
        return self._status(name)

    async def status(self, name: str) -> RelayStatus:
        here()
        return self._status(name)

    async def end(self, name: str) -> None:
        await self._acts(f"end relay {name}")
        with self.world.disturbance():
            self.relays.pop(name, None)

    async def _acts(self, what: str) -> None:
        await self.world.moment(what, self.node)
        await asyncio.sleep(self.world.rng.uniform(0.0001, 0.005))
        here()

    def _made(self, name: str, relay: Relay) -> Relay:
        with self.world.disturbance():
            self.relays[name] = relay
        return relay

    def _of(self, name: str) -> Relay:
        try:
            return self.relays[name]
        except KeyError:
            raise NotFound(f"there is no relay {name}", field="name") from None

    def _status(self, name: str) -> RelayStatus:
        relay = self._of(name)
        if isinstance(relay.upstream, HostDevice):
            raise Refused("there are no devices here")
        return RelayStatus(
            state=RelayState.HELD if relay.held else RelayState.RUNNING,
            writes_open=relay.writes_open,
            clients=1,
            outstanding=0,
            waiting=0,
            is_flushed=relay.held,
            held_since_s=None,
            problem=None,
            port=1,
            read_ops=0,
            read_bytes=0,
            write_ops=0,
            write_bytes=0,
            flushes=0,
            errors=0,
            reconnects=0,
            round_trip=RoundTrip(0, 0.0, 0.0),
        )
