"""The controller's orders about migrations: what makes a role of this node's, what it hears, and what its end leaves.

What a role is and does is in ``emp.agent.role``; orders about volumes that are lent are in ``emp.agent.lending``.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from functools import partial

from emp.agent.assembly import Assembly
from emp.agent.claims import Claims
from emp.agent.devices import MakeProbe
from emp.agent.gate import Gate
from emp.agent.journal import Journal, Standing
from emp.agent.relays import Relays
from emp.agent.residents import Residents
from emp.agent.roles import Roles, as_source, as_target
from emp.agent.shelf import Entry
from emp.agent.source import SourceRole
from emp.agent.target import TargetRole
from emp.migration import admission
from emp.migration.events import AbortAsked, Event, GoArrived, Retired, SourceAborted, TargetAnswered, Word
from emp.migration.states import Source, Target
from emp.model.errors import BadInput, Conflict, HostError, NotFound, Refused, StaleEpoch, Unreachable
from emp.model.evm import EvmState
from emp.model.node import EvmReport
from emp.model.orders import (
    AbortOrder,
    AnswerOrder,
    GoOrder,
    HandoverOrder,
    Peer,
    Prepared,
    PrepareOrder,
    RetireOrder,
    RolePhase,
    RoleStatus,
)
from emp.wire.identity import Identity
from emp.wire.identity import Role as WireRole
from emp.wire.link import Link

_DECIDES_S = 2.0
"""how long the answer to a courier waits for what his message leads to"""

Dial = Callable[[Peer, str], Awaitable[tuple[Link, Standing]]]
"""(peer, migration) -> a link on which both have said ``hello``, and the peer's journal; raises ``Unreachable``"""
DialFrames = Callable[[Peer, str], Awaitable[Link]]
"""(peer, migration) -> a link for frames; raises ``Unreachable``"""


class Migrations:
    def __init__(
        self,
        journal: Journal,
        residents: Residents,
        roles: Roles,
        dial: Dial,
        claims: Claims,
        gate: Gate,
        relays: Relays,
        *,
        stream_host: str,
        dial_frames: DialFrames | None = None,
        probe: MakeProbe | None = None,
    ) -> None:
        """``dial_frames``: None: no frames are forwarded. ``probe`` says how a target reads its volumes while
        memory comes in; None: it does not."""
        self._journal = journal
        self._residents = residents
        self._roles = roles
        self._dial = dial
        self._claims = claims
        self._gate = gate
        self._relays = relays
        self._stream_host = stream_host
        self._dial_frames = dial_frames
        self._probe = probe

    # -- orders from the controller

    async def prepare(self, order: PrepareOrder) -> Prepared:
        """Make the target ready; the same order again gets the same answer."""
        role = self._roles.get(order.migration)
        if role is None:
            role = await self._new_target(order)
        return await as_target(role).prepared()

    async def _new_target(self, order: PrepareOrder) -> TargetRole:
        name = order.spec.name
        ledger = self._journal.ledger(name)
        admission.check_prepare(ledger, order.epoch)
        await self._withdraw_older(name)
        if role := self._roles.get(order.migration):
            return as_target(role)
        self._roles.check_not_called_off(order.migration)
        self._residents.reserve(name, order.spec.memory_bytes)
        entry = Entry(spec=order.spec, volumes=order.volumes, peer=order.source)
        try:
            self._residents.shelf.put(entry)
        except HostError:
            self._residents.unreserve(name)
            raise
        state = Target(name, order.migration, order.source.node, secrets.token_hex(8), order.epoch)
        role = self._target_role(
            state, entry, multifd_channels=order.multifd_channels, run_when_local=order.run_when_local
        )
        self._roles.remember(role)
        role.start()
        return role

    async def _withdraw_older(self, evm: str) -> None:
        """Rule R3: a new PREPARE first kills and withdraws every older one."""
        for role in self._roles.unfinished(evm):
            if isinstance(role, TargetRole) and not role.phase.final:
                role.feed(AbortAsked("a newer migration has been ordered"))
                admission.check_replaces(role.state)
                await role.until_final()

    async def hand_over(self, order: HandoverOrder) -> RoleStatus:
        """Begin the migration at its source; the same order again gets the role's present state."""
        role = self._roles.get(order.migration)
        if role is not None:
            return as_source(role).status
        resident = self._residents.get(order.evm)
        async with resident.lock:
            if role := self._roles.get(order.migration):
                return as_source(role).status
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
            began = self._source_role(state, order, order.target)
            self._roles.remember(began)  # so that an abort finds it while the link is being opened
            self._residents.guests.leave_clock(resident)
            try:
                await began.start()
            except BaseException:
                self._roles.forget(began)
                raise
            resident.role = began
        self._residents.changed.notify()
        return began.status

    def _check_handover(self, order: HandoverOrder) -> None:
        resident = self._residents.get(order.evm)
        ledger = self._journal.ledger(order.evm)
        self._roles.check_not_called_off(order.migration)
        if resident.role is not None and not resident.role.phase.final:
            raise Conflict(f"EVM {order.evm!r} is already migrating ({resident.role.state.migration})", field="evm")
        admission.check_hand_over(ledger, order.epoch_target)
        if resident.assembly is None or resident.state is not EvmState.RUNNING:
            raise Refused(f"EVM {order.evm!r} is {resident.state}, not running", field="evm", hint="start it first")

    async def go(self, migration: str, order: GoOrder) -> RoleStatus:
        """The source's GO, by the controller as courier; answered once it is decided, or after two seconds."""
        role = self._roles.get(migration)
        if role is None:
            return self._from_journal(migration, order.nonce)
        role = as_target(role)
        if (order.epoch, order.nonce) != (role.state.epoch, role.state.nonce):
            raise StaleEpoch(f"this is not the GO that {migration} waits for here", field="nonce")
        role.feed(GoArrived(order.epoch, order.nonce))
        await role.until(lambda: role.phase.final, timeout_s=_DECIDES_S)
        return role.status

    async def answer(self, migration: str, order: AnswerOrder) -> RoleStatus:
        """The target's word, by the controller as courier; answered like ``go``."""
        try:
            word = Word(order.word)
        except ValueError:
            raise BadInput(f"{order.word!r} is no answer to GO", field="word", hint="activated or withdrawn") from None
        role = self._roles.get(migration)
        if role is None:
            return self._from_journal(migration, order.nonce)
        role = as_source(role)
        if order.nonce != role.state.nonce:
            raise StaleEpoch(f"this is not the answer that {migration} waits for here", field="nonce")
        role.feed(TargetAnswered(word, order.nonce))
        await role.until(lambda: role.phase.final, timeout_s=_DECIDES_S)
        return role.status

    async def retire(self, evm: str, order: RetireOrder) -> EvmReport:
        """Whatever this node has of the EVM dies, a part in a migration included (rule R8); then RETIRED(k)."""
        if not self._residents.has_retired(evm, order):
            admission.check_epoch(self._journal.ledger(evm), order.epoch)
            for role in self._roles.unfinished(evm):
                if not role.phase.final:
                    role.feed(Retired())
                    await role.until_final()
        report = await self._residents.retire(evm, order)
        await self._relays.end_of(evm)
        return report

    async def abort(self, migration: str, order: AbortOrder) -> RoleStatus:
        """Ask for the way back; answered once the guest is back, or it is committed, or after ``wait_s`` in any case.

        Raises ``NotFound`` where the migration is not known; then its first order is refused should it still come.
        """
        role = self._roles.get(migration)
        if role is None:
            return self._call_off(migration)
        if order.source_is_back and isinstance(role, TargetRole):
            role.feed(SourceAborted())
        else:
            role.feed(AbortAsked(order.reason))
        await role.until(lambda: role.phase.final or role.state.committed, timeout_s=order.wait_s)
        if role.phase.final:
            await role.until_final()
        return role.status

    def _call_off(self, migration: str) -> RoleStatus:
        try:
            return self._roles.status(migration)
        except NotFound:
            self._roles.call_off(migration)
            raise

    def _from_journal(self, migration: str, nonce: str) -> RoleStatus:
        status = self._roles.status(migration)
        if status.nonce != nonce:
            raise StaleEpoch(f"{migration} was prepared here under another nonce", field="nonce")
        return status

    def address_moved(self, migration: str) -> RoleStatus:
        """The cloud sends what is for the EVM to the target from now on. Raises ``NotFound``, ``Conflict``."""
        if role := self._roles.get(migration):
            as_source(role).readdressed()
        return self._roles.status(migration)

    # -- roles

    def _target_role(
        self,
        state: Target,
        entry: Entry,
        assembly: Assembly | None = None,
        *,
        multifd_channels: int = 1,
        run_when_local: bool = False,
    ) -> TargetRole:
        return TargetRole(
            state,
            entry,
            journal=self._journal,
            assembler=self._residents.assembler,
            stream_host=self._stream_host,
            dial=lambda: self._dial_peer(entry.peer, state.migration),
            qemu_name=qemu_name,
            claim=lambda: self._claims.begin(entry.volumes, epoch=state.epoch),
            on_end=self._target_ended,
            assembly=assembly,
            multifd_channels=multifd_channels,
            run_when_local=run_when_local,
            probe=self._probe,
        )

    async def _dial_peer(self, peer: Peer | None, migration: str) -> tuple[Link, Standing]:
        if peer is None:
            raise Unreachable("the shelf does not know where the source is")
        return await self._dial(peer, migration)

    def _distrust(self, reason: str) -> None:
        self._gate.distrust = self._gate.distrust or reason
        self._residents.changed.notify()

    def _source_role(self, state: Source, order: HandoverOrder | None, peer: Peer) -> SourceRole:
        return SourceRole(
            state,
            order,
            journal=self._journal,
            assembly=self._residents.get(state.evm).assembly,
            dial=lambda: self._dial(peer, state.migration),
            dial_frames=partial(frames, peer, state.migration) if (frames := self._dial_frames) else None,
            qemu_name=qemu_name,
            claim=lambda: self._claims.begin(self._residents.get(state.evm).entry.volumes, epoch=state.epoch_back),
            distrust=self._distrust,
            relays=self._relays,
            on_end=self._source_ended,
        )

    async def _source_ended(self, role: SourceRole) -> None:
        evm, guests = role.state.evm, self._residents.guests
        match role.phase:
            case RolePhase.DONE:
                await self._residents.depart(evm)
            case RolePhase.ABORTED:
                await guests.catch_up(self._residents.get(evm))
            case RolePhase.LOST:
                await guests.crashed(self._residents.get(evm), role.state.cause or "lost in a migration")
        self._residents.changed.notify()

    async def _target_ended(self, role: TargetRole) -> None:
        evm, guests = role.state.evm, self._residents.guests
        self._residents.unreserve(evm)
        match role.phase:
            case RolePhase.RUNNING:
                assert role.assembly is not None
                arrived = self._residents.settle(role.entry, role.assembly)
                await guests.catch_up(arrived)  # what the guest did before anybody listened here
            case RolePhase.LOST:
                lost = self._residents.note(role.entry, EvmState.CRASHED, role.state.cause)
                lost.assembly = role.assembly
                await guests.crashed(lost, role.state.cause or "lost in a migration")
            case _:
                self._residents.shelf.drop(evm)

    # -- after a restart of the agent

    def resume_source(self, state: Source, peer: Peer, event: Event) -> None:
        """HANDOVER or GIVEN was the last record: go on from there."""
        role = self._source_role(state, None, peer)
        self._residents.get(state.evm).role = role
        self._roles.remember(role)
        role.resume(event)

    def resume_target(self, state: Target, entry: Entry, assembly: Assembly | None, event: Event) -> None:
        """PREPARED was the last record: the machine waits, has everything, or is gone."""
        if assembly is not None:
            self._residents.reserve(state.evm, entry.spec.memory_bytes)
        role = self._target_role(state, entry, assembly)
        self._roles.remember(role)
        role.resume(event)


def qemu_name(node: str) -> str:
    """Common name of the certificate of a node's QEMU processes."""
    return Identity(WireRole.QEMU, node).cn
