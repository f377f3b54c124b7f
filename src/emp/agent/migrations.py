"""The migrations that this node has a part in: orders from the controller, links from peers, ends.

A role stays here after its end, so that late questions get its last word; after a restart the journal gives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial

from emp.agent.assembly import Assembly
from emp.agent.claims import Claims
from emp.agent.devices import MakeProbe
from emp.agent.gate import Gate
from emp.agent.journal import Journal, Standing
from emp.agent.links import answer_from_journal, hello, standing_in
from emp.agent.relays import Relays
from emp.agent.residents import Residents
from emp.agent.shelf import Entry
from emp.agent.source import SourceRole
from emp.agent.target import TargetRole
from emp.migration import admission
from emp.migration.events import AbortAsked, Event, GoArrived, Retired, SourceAborted, TargetAnswered, Word
from emp.migration.records import RUNNABLE, RecordKind
from emp.migration.states import Source, Target
from emp.model.errors import BadInput, Conflict, HostError, NotFound, Refused, StaleEpoch, Unavailable, Unreachable
from emp.model.evm import EvmState
from emp.model.migration import Stage
from emp.model.node import EvmReport, OpenRole
from emp.model.orders import (
    AbortOrder,
    AnswerOrder,
    GoOnOrder,
    GoOrder,
    HandoverOrder,
    HoldOrder,
    LendOrder,
    Lent,
    Peer,
    Prepared,
    PrepareOrder,
    Relayed,
    RetireOrder,
    RolePhase,
    RoleStatus,
    TakeBackOrder,
)
from emp.volumes.base import RelayStatus
from emp.wire.identity import Identity
from emp.wire.identity import Role as WireRole
from emp.wire.link import Link

log = logging.getLogger(__name__)

_REMEMBERED = 256

_DECIDES_S = 2.0
"""how long the answer to a courier waits for what his message leads to"""
_LANDS_S = 5.0
"""how long the answer to a landing waits for a guest that was to run only then"""

Dial = Callable[[Peer, str], Awaitable[tuple[Link, Standing]]]
"""(peer, migration) -> a link on which both have said ``hello``, and the peer's journal; raises ``Unreachable``"""
DialFrames = Callable[[Peer, str], Awaitable[Link]]
"""(peer, migration) -> a link for frames; raises ``Unreachable``"""


class Migrations:
    def __init__(
        self,
        journal: Journal,
        residents: Residents,
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
        self._dial = dial
        self._claims = claims
        self._gate = gate
        self._relays = relays
        self._stream_host = stream_host
        self._dial_frames = dial_frames
        self._probe = probe
        self._called_off: dict[str, None] = {}
        """migrations that were to be aborted here before their first order came: that comes too late now"""
        self._roles: dict[str, SourceRole | TargetRole] = {}
        self._links: set[asyncio.Task[None]] = set()

    # -- orders from the controller

    async def prepare(self, order: PrepareOrder) -> Prepared:
        """Make the target ready; the same order again gets the same answer."""
        role = self._roles.get(order.migration)
        if role is None:
            role = await self._new_target(order)
        return await self._as_target(role).prepared()

    @staticmethod
    def _as_target(role: SourceRole | TargetRole) -> TargetRole:
        if not isinstance(role, TargetRole):
            raise Conflict(f"this node is the source of {role.state.migration}", field="target")
        return role

    @staticmethod
    def _as_source(role: SourceRole | TargetRole) -> SourceRole:
        if not isinstance(role, SourceRole):
            raise Conflict(f"this node is the target of {role.state.migration}", field="source")
        return role

    def _check_not_called_off(self, migration: str) -> None:
        if migration in self._called_off:
            raise StaleEpoch(f"migration {migration} was called off before this order came", field="migration")

    async def _new_target(self, order: PrepareOrder) -> TargetRole:
        name = order.spec.name
        ledger = self._journal.ledger(name)
        admission.check_prepare(ledger, order.epoch)
        await self._withdraw_older(name)
        if role := self._roles.get(order.migration):
            return self._as_target(role)
        self._check_not_called_off(order.migration)
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
        self._remember(role)
        role.start()
        return role

    # -- orders about volumes that one node alone can have

    async def lend(self, order: LendOrder) -> Lent:
        """Source: relay the volumes to the target, its writes held until GIVEN is on disk here."""
        self._check_may_lend(order)
        lent = await self._relays.lend(order)
        if order.migration in self._called_off:  # while it was being done
            await self._relays.take_back(order.migration)
            self._check_not_called_off(order.migration)
        return lent

    def _check_may_lend(self, order: LendOrder) -> None:
        """An order that comes late must not put a relay beside the guest, or in the place of a newer migration's."""
        self._check_not_called_off(order.migration)
        ledger = self._journal.ledger(order.evm)
        if not order.given:
            self._residents.get(order.evm)
            is_late = ledger.end_of(order.migration) is not None
        else:
            last = ledger.last
            is_late = last is None or last.kind in RUNNABLE or last.migration not in (None, order.migration)
        if is_late:
            raise StaleEpoch(f"{order.migration} is beyond that here", field="migration")

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

    async def take_back(self, migration: str, order: TakeBackOrder) -> None:
        """Source: end relays; return when nothing of them has the volumes open. Idempotent."""
        if order.volumes is None:
            self._note_called_off(migration)
        await self._relays.take_back(migration, order.volumes)

    async def hold(self, migration: str, order: HoldOrder) -> Relayed:
        """Target: hold the volume's I/O and see what is on its way to its end. Raises as ``RelayDriver.hold``."""
        self._check_is_here(migration, order.evm)
        return _relayed(order.volume, await self._relays.hold(order.volume, within_s=order.within_s))

    async def go_on(self, migration: str, order: GoOnOrder) -> Relayed:
        """Target: let a held volume's I/O go on. At its own attachment the machine then uses that, and the relay ends.

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

    async def _withdraw_older(self, evm: str) -> None:
        """Rule R3: a new PREPARE first kills and withdraws every older one."""
        for role in tuple(self._roles.values()):
            if isinstance(role, TargetRole) and role.state.evm == evm and not role.phase.final:
                role.feed(AbortAsked("a newer migration has been ordered"))
                admission.check_replaces(role.state)
                await role.until_final()

    async def hand_over(self, order: HandoverOrder) -> RoleStatus:
        """Begin the migration at its source; the same order again gets the role's present state."""
        role = self._roles.get(order.migration)
        if role is not None:
            return self._as_source(role).status
        resident = self._residents.get(order.evm)
        async with resident.lock:
            if role := self._roles.get(order.migration):
                return self._as_source(role).status
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
            self._remember(began)  # so that an abort finds it while the link is being opened
            self._residents.leave_clock(resident)
            try:
                await began.start()
            except BaseException:
                del self._roles[order.migration]
                began.drop()
                raise
            resident.role = began
        self._residents.changed.notify()
        return began.status

    def _check_handover(self, order: HandoverOrder) -> None:
        resident = self._residents.get(order.evm)
        ledger = self._journal.ledger(order.evm)
        self._check_not_called_off(order.migration)
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
        role = self._as_target(role)
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
        role = self._as_source(role)
        if order.nonce != role.state.nonce:
            raise StaleEpoch(f"this is not the answer that {migration} waits for here", field="nonce")
        role.feed(TargetAnswered(word, order.nonce))
        await role.until(lambda: role.phase.final, timeout_s=_DECIDES_S)
        return role.status

    async def retire(self, evm: str, order: RetireOrder) -> EvmReport:
        """Whatever this node has of the EVM dies, a part in a migration included (rule R8); then RETIRED(k)."""
        if not self._residents.has_retired(evm, order):
            admission.check_epoch(self._journal.ledger(evm), order.epoch)
            for role in tuple(self._roles.values()):
                if role.state.evm == evm and not role.phase.final:
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
            return self.status(migration)
        except NotFound:
            self._note_called_off(migration)
            raise

    def _note_called_off(self, migration: str) -> None:
        self._called_off[migration] = None
        for old in tuple(self._called_off)[:-_REMEMBERED]:
            del self._called_off[old]

    # -- what is known

    def address_moved(self, migration: str) -> RoleStatus:
        """The cloud sends what is for the EVM to the target from now on. Raises ``NotFound``, ``Conflict``."""
        if role := self._roles.get(migration):
            self._as_source(role).readdressed()
        return self.status(migration)

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

    def _from_journal(self, migration: str, nonce: str) -> RoleStatus:
        status = self.status(migration)
        if status.nonce != nonce:
            raise StaleEpoch(f"{migration} was prepared here under another nonce", field="nonce")
        return status

    def statuses(self) -> tuple[RoleStatus, ...]:
        """Every role that this agent remembers, the newest last."""
        return tuple(role.status for role in self._roles.values())

    def open_roles(self) -> tuple[OpenRole, ...]:
        """Every part in a migration that is not over here."""
        return tuple(
            OpenRole(
                migration=role.state.migration,
                evm=role.state.evm,
                role=role.name,
                phase=role.phase,
                epoch=role.state.epoch,
            )
            for role in self._roles.values()
            if not role.phase.final
        )

    async def watch(self, migration: str) -> AsyncGenerator[RoleStatus]:
        if role := self._roles.get(migration):
            async with contextlib.aclosing(role.watch()) as statuses:
                async for status in statuses:
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
        """``hello`` says for which migration it is, and how far the peer's journal is."""
        async for message in link:
            standing = standing_in(message)
            if standing is None or not isinstance(migration := message.get("migration"), str):
                break
            await link.send(hello(self._journal, migration))
            if message.get("carries") == "frames":
                await self._take_frames(link, migration)
            else:
                await self._route(link, migration, standing)
            return
        await link.close()

    async def _take_frames(self, link: Link, migration: str) -> None:
        """The target may be running by now, and its role over."""
        role = self._roles.get(migration)
        if isinstance(role, TargetRole) and role.assembly and link.peer == Identity(WireRole.AGENT, role.state.source):
            await role.take_frames(link)
        else:
            log.warning("%s: frames from %s for an EVM that is not here by it", migration, link.peer)
            await link.close()

    async def _route(self, link: Link, migration: str, standing: Standing) -> None:
        role = self._roles.get(migration)
        if role is not None and not role.phase.final:
            other = role.state.source if isinstance(role, TargetRole) else role.state.target
            if link.peer != Identity(WireRole.AGENT, other):
                log.warning("%s: %s has no part in it", migration, link.peer)
                await link.close()
                return
            await role.serve(link, standing)
        async for message in link:  # over here: the journal has the last word, if it is to be believed
            if self._gate.closed or link.peer is None:
                continue
            if answer := answer_from_journal(self._journal, migration, message, peer=link.peer.name):
                await link.send(answer)

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
        evm = role.state.evm
        match role.phase:
            case RolePhase.DONE:
                await self._residents.depart(evm)
            case RolePhase.ABORTED:
                await self._residents.catch_up(evm)
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
                await self._residents.catch_up(evm)  # what the guest did before anybody listened here
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

    def resume_source(self, state: Source, peer: Peer, event: Event) -> None:
        """HANDOVER or GIVEN was the last record: go on from there."""
        role = self._source_role(state, None, peer)
        self._residents.get(state.evm).role = role
        self._remember(role)
        role.resume(event)

    def resume_target(self, state: Target, entry: Entry, assembly: Assembly | None, event: Event) -> None:
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


def qemu_name(node: str) -> str:
    """Common name of the certificate of a node's QEMU processes."""
    return Identity(WireRole.QEMU, node).cn
