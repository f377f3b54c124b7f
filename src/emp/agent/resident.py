"""One EVM as its node knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from emp.agent.assembly import Assembly
from emp.agent.shelf import Entry
from emp.agent.source import SourceRole
from emp.model.clock import GuestClock
from emp.model.evm import EvmState


@dataclass
class Resident:
    """One EVM whose authority is here, or whose end is still to be told."""

    entry: Entry
    assembly: Assembly | None
    state: EvmState
    reason: str | None = None
    waits_for_storage: bool = False
    """it is paused, as QEMU stops a guest instead of failing its I/O"""
    role: SourceRole | None = None
    """while it is being migrated away"""
    follower: asyncio.Task[None] | None = None
    clock: GuestClock | None = None
    """as it was found since the guest last began to run here"""
    clock_setter: asyncio.Task[None] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """orders about this EVM, one at a time (rule R1)"""

    @property
    def name(self) -> str:
        return self.entry.spec.name

    @property
    def is_migrating(self) -> bool:
        return self.role is not None and not self.role.phase.final

    def become(self, state: EvmState, reason: str | None = None, *, waits_for_storage: bool = False) -> None:
        self.state, self.reason, self.waits_for_storage = state, reason, waits_for_storage
