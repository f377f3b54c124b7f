"""The migrations that this node has a part in: orders from the controller, links from peers, ends.

A role stays here after its end, so that late questions get its last word; after a restart the journal gives it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable

from emp.agent.assembly import Assembly
from emp.agent.journal import Journal
from emp.agent.links import answer_from_journal
from emp.agent.residents import Residents
from emp.agent.shelf import Entry
from emp.agent.source import SourceRole
from emp.agent.target import TargetRole
from emp.migration import admission, events
from emp.migration.records import RecordKind
from emp.migration.states import Source, Target
from emp.model.errors import Conflict, NotFound, Refused
from emp.model.evm import EvmState
from emp.model.migration import Stage
from emp.model.orders import (
    AbortOrder,
    HandoverOrder,
    Peer,
    Prepared,
    PrepareOrder,
    RolePhase,
    RoleStatus,
)
from emp.wire.identity import Identity
from emp.wire.identity import Role as WireRole
from emp.wire.link import Link

log = logging.getLogger(__name__)

_REMEMBERED = 256

Dial = Callable[[Peer, str], Awaitable[Link]]
"""(peer, migration) -> a link on which ``hello`` has been said; raises ``Unreachable``"""


class Migrations:
    def __init__(self, journal: Journal, residents: Residents, dial: Dial, *, stream_host: str) -> None:
        self._journal = journal
        self._residents = residents
        self._dial = dial
        self._stream_host = stream_host
        self._roles: dict[str, SourceRole | TargetRole] = {}
        self._links: set[asyncio.Task[None]] = set()

    # -- orders from the controller

    async def prepare(self, order: PrepareOrder) -> Prepared:
        """Make the target ready; the same order again gets the same answer."""
        role = self._roles.get(order.migration)
        if role is None:
            role = await self._new_target(order)
        if not isinstance(role, TargetRole):
            raise Conflict(f"this node is the source of {order.migration}", field="target")
        return await role.prepared()

    async def _new_target(self, order: PrepareOrder) -> TargetRole:
        name = order.spec.name
        ledger = self._journal.ledger(name)
        admission.check_prepare(ledger, order.epoch)
        await self._withdraw_older(name)
        self._residents.reserve(name, order.spec.memory_bytes)
        entry = Entry(spec=order.spec, volumes=order.volumes)
        self._residents.shelf.put(entry)
        state = Target(name, order.migration, order.source.node, secrets.token_hex(8), order.epoch)
        role = self._target_role(state, entry, multifd_channels=order.multifd_channels)
        self._remember(role)
        role.start()
        return role

    async def _withdraw_older(self, evm: str) -> None:
        """Rule R3: a new PREPARE first kills and withdraws every older one."""
        for role in tuple(self._roles.values()):
            if isinstance(role, TargetRole) and role.state.evm == evm and not role.phase.final:
                role.feed(events.AbortAsked("a newer migration has been ordered"))
                admission.check_replaces(role.state)
                await role.until_final()

    async def hand_over(self, order: HandoverOrder) -> RoleStatus:
        """Begin the migration at its source; the same order again gets the role's present state."""
        role = self._roles.get(order.migration)
        if role is not None:
            if isinstance(role, TargetRole):
                raise Conflict(f"this node is the target of {order.migration}", field="source")
            return role.status
        resident = self._residents.get(order.evm)
        async with resident.lock:
            self._check_handover(order)
            last = self._journal.last(order.evm)
            assert last is not None
            state = Source(
                order.evm,
                order.migration,
                order.target.node,
                order.prepared.nonce,
                last.epoch,
                order.epoch_target,
                order.epoch_source,
            )
            self._residents.shelf.put(resident.entry.model_copy(update={"peer": order.target}))
            role = self._source_role(state, order, order.target)
            await role.start()
            resident.role = role
            self._remember(role)
        self._residents.changed.notify()
        return role.status

    def _check_handover(self, order: HandoverOrder) -> None:
        resident = self._residents.get(order.evm)
        ledger = self._journal.ledger(order.evm)
        if resident.role is not None and not resident.role.phase.final:
            raise Conflict(f"EVM {order.evm!r} is already migrating ({resident.role.state.migration})", field="evm")
        admission.check_hand_over(ledger, order.epoch_target)
        if resident.assembly is None or resident.state is not EvmState.RUNNING:
            raise Refused(f"EVM {order.evm!r} is {resident.state}, not running", field="evm", hint="start it first")

    async def withdraw(self, evm: str) -> None:
        """The EVM is being retired: a target that waits for it withdraws, even one that has loaded everything (R3)."""
        for role in tuple(self._roles.values()):
            if isinstance(role, TargetRole) and role.state.evm == evm and not role.state.committed:
                role.feed(events.SourceAborted())
                await role.until_final()

    def abort(self, migration: str, order: AbortOrder) -> RoleStatus:
        """Ask for the way back; answered at once with where it stands. ``committed`` says that it only goes forward."""
        role = self._roles.get(migration)
        if role is None:
            return self.status(migration)
        if order.source_is_back and isinstance(role, TargetRole):
            role.feed(events.SourceAborted())
        else:
            role.feed(events.AbortAsked(order.reason))
        return role.status

    # -- what is known

    def status(self, migration: str) -> RoleStatus:
        """Return the role's snapshot, or what the journal says of it; raise ``NotFound``."""
        if role := self._roles.get(migration):
            return role.status
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

    async def watch(self, migration: str) -> AsyncIterator[RoleStatus]:
        if role := self._roles.get(migration):
            async for status in role.watch():
                yield status
        else:
            yield self.status(migration)

    # -- links from peers

    def take_link(self, link: Link) -> None:
        """Serve a link that a source has opened, until it ends."""
        task = asyncio.create_task(self._serve_link(link), name=f"link from {link.peer}")
        self._links.add(task)
        task.add_done_callback(self._links.discard)

    async def _serve_link(self, link: Link) -> None:
        """``hello`` says for which migration it is."""
        async for message in link:
            match message:
                case {"type": "hello", "migration": str(migration)}:
                    await self._route(link, migration)
                    return
        await link.close()

    async def _route(self, link: Link, migration: str) -> None:
        role = self._roles.get(migration)
        if isinstance(role, TargetRole) and not role.phase.final:
            if link.peer != Identity(WireRole.AGENT, role.state.source):
                log.warning("%s: %s is not its source", migration, link.peer)
                await link.close()
                return
            await role.serve(link)
        async for message in link:  # over here: the journal has the last word
            if answer := answer_from_journal(self._journal, migration, message):
                await link.send(answer)

    # -- roles

    def _target_role(
        self, state: Target, entry: Entry, assembly: Assembly | None = None, multifd_channels: int = 2
    ) -> TargetRole:
        return TargetRole(
            state,
            entry,
            journal=self._journal,
            assembler=self._residents.assembler,
            stream_host=self._stream_host,
            qemu_name=qemu_name,
            on_end=self._target_ended,
            assembly=assembly,
            multifd_channels=multifd_channels,
        )

    def _source_role(self, state: Source, order: HandoverOrder | None, peer: Peer) -> SourceRole:
        return SourceRole(
            state,
            order,
            journal=self._journal,
            assembly=self._residents.get(state.evm).assembly,
            dial=lambda: self._dial(peer, state.migration),
            qemu_name=qemu_name,
            on_end=self._source_ended,
        )

    async def _source_ended(self, role: SourceRole) -> None:
        evm = role.state.evm
        match role.phase:
            case RolePhase.DONE:
                await self._residents.depart(evm)
            case RolePhase.ABORTED:
                await self._residents.see_whether_it_lives(evm)
            case RolePhase.LOST:
                await self._residents.crashed(self._residents.get(evm), role.state.cause or "lost in a migration")
        self._residents.changed.notify()

    async def _target_ended(self, role: TargetRole) -> None:
        evm = role.state.evm
        self._residents.unreserve(evm)
        match role.phase:
            case RolePhase.RUNNING:
                assert role.assembly is not None
                self._residents.settle(role.entry, role.assembly)
            case RolePhase.LOST:
                lost = self._residents.note(role.entry, EvmState.CRASHED, role.state.cause)
                lost.assembly = role.assembly
                await self._residents.crashed(lost, role.state.cause or "lost in a migration")
            case _:
                self._residents.shelf.drop(evm)

    def _remember(self, role: SourceRole | TargetRole) -> None:
        self._roles[role.state.migration] = role
        over = [m for m, r in self._roles.items() if r.phase.final]
        for migration in over[:-_REMEMBERED]:
            del self._roles[migration]

    # -- after a restart of the agent

    def resume_source(self, state: Source, peer: Peer, event: events.Event) -> None:
        """HANDOVER or GIVEN was the last record: go on from there."""
        role = self._source_role(state, None, peer)
        self._residents.get(state.evm).role = role
        self._remember(role)
        role.resume(event)

    def resume_target(self, state: Target, entry: Entry, assembly: Assembly | None, event: events.Event) -> None:
        """PREPARED was the last record: the machine waits, has everything, or is gone."""
        if assembly is not None:
            self._residents.reserve(state.evm, entry.spec.memory_bytes)
        role = self._target_role(state, entry, assembly)
        self._remember(role)
        role.resume(event)

    async def close(self) -> None:
        """The agent stops: roles are left as the journal has them."""
        for role in self._roles.values():
            await role.close()
        for task in self._links:
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)


def qemu_name(node: str) -> str:
    """Common name of the certificate of a node's QEMU processes."""
    return Identity(WireRole.QEMU, node).cn
