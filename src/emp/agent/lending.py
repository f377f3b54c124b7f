"""Orders about volumes that one node alone can have: a source lends them, a target lands what it has borrowed.

What carries them out is ``emp.agent.relays``; here is told whether an order may still be heeded. It may come late, when
a newer migration has relays of the same volumes.
"""

from __future__ import annotations

from emp.agent.claims import Claims
from emp.agent.gate import Gate
from emp.agent.journal import Journal
from emp.agent.relays import Relays
from emp.agent.residents import Residents
from emp.agent.roles import Roles
from emp.migration.records import RUNNABLE
from emp.model.errors import NotFound, StaleEpoch, Unavailable
from emp.model.orders import GoOnOrder, HoldOrder, LendOrder, Lent, Relayed, TakeBackOrder
from emp.volumes.base import RelayStatus

_LANDS_S = 5.0
"""how long the answer to a landing waits for a guest that was to run only then"""


class Lending:
    def __init__(
        self, journal: Journal, residents: Residents, roles: Roles, claims: Claims, gate: Gate, relays: Relays
    ) -> None:
        self._journal = journal
        self._residents = residents
        self._roles = roles
        self._claims = claims
        self._gate = gate
        self._relays = relays

    # -- source

    async def lend(self, order: LendOrder) -> Lent:
        """Relay the volumes to the target, its writes held until GIVEN is on disk here."""
        self._check_may_lend(order)
        lent = await self._relays.lend(order)
        try:
            self._roles.check_not_called_off(order.migration)
        except StaleEpoch:  # while it was being done
            await self._relays.take_back(order.migration)
            raise
        return lent

    def _check_may_lend(self, order: LendOrder) -> None:
        """An order that comes late must not put a relay beside the guest, or in the place of a newer migration's."""
        self._roles.check_not_called_off(order.migration)
        ledger = self._journal.ledger(order.evm)
        if not order.given:
            self._residents.get(order.evm)
            is_late = ledger.end_of(order.migration) is not None
        else:
            last = ledger.last
            is_late = last is None or last.kind in RUNNABLE or last.migration not in (None, order.migration)
        if is_late:
            raise StaleEpoch(f"{order.migration} is beyond that here", field="migration")

    async def take_back(self, migration: str, order: TakeBackOrder) -> None:
        """End relays; return when nothing of them has the volumes open. Idempotent."""
        if order.volumes is None:
            self._roles.call_off(migration)
        await self._relays.take_back(migration, order.volumes)

    # -- target

    async def hold(self, migration: str, order: HoldOrder) -> Relayed:
        """Hold the volume's I/O and see what is on its way to its end. Raises as ``RelayDriver.hold``."""
        self._check_is_here(migration, order.evm)
        return _relayed(order.volume, await self._relays.hold(order.volume, within_s=order.within_s))

    async def go_on(self, migration: str, order: GoOnOrder) -> Relayed:
        """Let a held volume's I/O go on. At its own attachment the machine then uses that, and the relay ends.

        Idempotent, from every step again.
        """
        self._check_is_here(migration, order.evm, epoch=order.epoch)
        volume, grant = order.grant.volume.id, order.grant
        status = None
        if self._relays.borrows(volume):
            status = await self._relays.go_on(grant)
        if grant.relay is None:
            role = self._roles.get(migration)
            if role is not None and not await role.until(lambda: role.phase.final, timeout_s=_LANDS_S):
                # The classic order lets the guest run only now; or a hung machine has not said that it runs.
                raise Unavailable(f"{order.evm} does not run here yet", field="evm", hint="ask again")
            await self._residents.land(order.evm, grant)
            self._claims.begin((grant,), epoch=order.epoch)
        return _relayed(volume, status, is_local=grant.relay is None)

    def _check_is_here(self, migration: str, evm: str, *, epoch: int | None = None) -> None:
        """Raise ``NotFound`` unless what is here of the EVM came by this migration: a relay is named by its volume.

        ``Unavailable`` where the journal is not believed and so the EVM, if it is here, was not adopted.
        """
        last = self._journal.last(evm)
        if last is None and self._gate.distrust:
            raise Unavailable(self._gate.distrust, hint="see: emp node show, docs/journal.md")
        if last is None:
            return
        came_by_another = last.migration not in (None, migration)
        if came_by_another or (last.migration is None and epoch not in (None, last.epoch)):
            raise NotFound(f"EVM {evm!r} is not here by {migration}", field="migration")


def _relayed(volume: str, status: RelayStatus | None, *, is_local: bool = False) -> Relayed:
    if status is None:  # it had ended before
        return Relayed(volume=volume, is_local=is_local)
    trips = status.round_trip
    return Relayed(
        volume=volume,
        is_local=is_local,
        is_flushed=status.is_flushed,
        held_since_s=status.held_since_s,
        read_bytes=status.read_bytes,
        written_bytes=status.write_bytes,
        round_trips=trips.count,
        mean_ms=trips.mean_ms if trips.count else None,
        max_ms=trips.max_ms if trips.count else None,
    )
