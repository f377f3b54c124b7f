"""Every part that this node has in a migration: what runs, what has ended, what was called off before it came.

A role stays here after its end, so that late questions get its last word; after a restart the journal gives it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from emp.agent.gate import Gate
from emp.agent.journal import Journal
from emp.agent.source import SourceRole
from emp.agent.target import TargetRole
from emp.migration import admission
from emp.migration.records import RecordKind
from emp.model.errors import Conflict, NotFound, StaleEpoch
from emp.model.migration import Stage
from emp.model.node import OpenRole
from emp.model.orders import RoleStatus

_REMEMBERED = 256


class Roles:
    def __init__(self, journal: Journal, gate: Gate) -> None:
        self._journal = journal
        self._gate = gate
        self._roles: dict[str, SourceRole | TargetRole] = {}
        self._called_off: dict[str, None] = {}
        """migrations that were to be aborted here before their first order came: that comes too late now"""

    def get(self, migration: str) -> SourceRole | TargetRole | None:
        return self._roles.get(migration)

    def unfinished(self, evm: str | None = None) -> tuple[SourceRole | TargetRole, ...]:
        """Return what is not over here, of one EVM or of all; the newest last."""
        roles = self._roles.values()
        return tuple(role for role in roles if evm in (None, role.state.evm) and not role.phase.final)

    def remember(self, role: SourceRole | TargetRole) -> None:
        self._roles[role.state.migration] = role
        over = [m for m, r in self._roles.items() if r.phase.final]
        for migration in over[:-_REMEMBERED]:
            del self._roles[migration]

    def forget(self, role: SourceRole | TargetRole) -> None:
        """It has never begun."""
        del self._roles[role.state.migration]
        role.drop()

    async def close(self) -> None:
        """The agent stops: roles are left as the journal has them."""
        for role in self._roles.values():
            await role.close()

    # -- what was called off

    def call_off(self, migration: str) -> None:
        self._called_off[migration] = None
        for old in tuple(self._called_off)[:-_REMEMBERED]:
            del self._called_off[old]

    def check_not_called_off(self, migration: str) -> None:
        """Raise ``StaleEpoch``."""
        if migration in self._called_off:
            raise StaleEpoch(f"migration {migration} was called off before this order came", field="migration")

    # -- what is known

    def status(self, migration: str) -> RoleStatus:
        """Return the role's snapshot, or what the journal says. Raises ``NotFound``; ``Unavailable`` in quarantine."""
        if role := self._roles.get(migration):
            return role.status
        self._gate.check_journal()
        for evm in self._journal.evms:
            if standing := admission.standing_of(self._journal.ledger(evm), migration):
                name, phase, end = standing
                return RoleStatus(
                    migration=migration,
                    evm=evm,
                    role=name,
                    phase=phase,
                    stage=Stage.CLOSED,
                    committed=end.kind in (RecordKind.GIVEN, RecordKind.DONE, RecordKind.ACTIVATED),
                    nonce=end.nonce,
                )
        raise NotFound(f"this node knows nothing of migration {migration!r}", field="migration")

    def statuses(self) -> tuple[RoleStatus, ...]:
        """Every role that this agent remembers, the newest last."""
        return tuple(role.status for role in self._roles.values())

    def open(self) -> tuple[OpenRole, ...]:
        """Every part in a migration that is not over here, as the controller is told of it."""
        return tuple(
            OpenRole(
                migration=role.state.migration,
                evm=role.state.evm,
                role=role.name,
                phase=role.phase,
                epoch=role.state.epoch,
            )
            for role in self.unfinished()
        )

    async def watch(self, migration: str) -> AsyncGenerator[RoleStatus]:
        if role := self._roles.get(migration):
            async with contextlib.aclosing(role.watch()) as statuses:
                async for status in statuses:
                    yield status
        else:
            yield self.status(migration)


def as_target(role: SourceRole | TargetRole) -> TargetRole:
    """Raise ``Conflict``."""
    if not isinstance(role, TargetRole):
        raise Conflict(f"this node is the source of {role.state.migration}", field="target")
    return role


def as_source(role: SourceRole | TargetRole) -> SourceRole:
    """Raise ``Conflict``."""
    if not isinstance(role, SourceRole):
        raise Conflict(f"this node is the target of {role.state.migration}", field="source")
    return role
