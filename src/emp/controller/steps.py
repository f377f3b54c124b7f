"""The controller's own acts in one migration: volumes, the two orders, the record of who owns the EVM, the end.

Each is called by ``supervise`` when the supervisor's ``step`` asks for it, and raises what went wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from emp.controller.agents import AgentClient, Agents
from emp.controller.attested import ENDED
from emp.controller.book import Book, change
from emp.controller.handovers import Handovers
from emp.controller.hub import Hub
from emp.controller.metrics import Metrics
from emp.controller.moves import Moves, Say
from emp.controller.nodes import Nodes
from emp.controller.patience import until_known
from emp.controller.reach import Reach
from emp.controller.reassign import Reassignment
from emp.controller.tally import Tally
from emp.controller.tasks import all_of
from emp.controller.volumes import Volumes
from emp.migration import supervisor
from emp.model.clock import GuestClock
from emp.model.errors import EmpError, OutcomeUnknown, Unavailable
from emp.model.evm import Evm, EvmState
from emp.model.migration import Migration, Outcome, VolumeOrder, VolumeStep
from emp.model.orders import (
    AbortOrder,
    AnswerOrder,
    GoOrder,
    HandoverOrder,
    Peer,
    PrepareOrder,
    Role,
    RolePhase,
    RoleStatus,
    VolumeGrant,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

TRIES = 2
"""for a step before the hand-over: not to be stuck there is worth more than to get there"""


@dataclass(frozen=True)
class Tools:
    """What every supervision works with."""

    book: Book
    nodes: Nodes
    agents: Agents
    volumes: Volumes
    hub: Hub
    metrics: Metrics
    reach: Reach


class Steps:
    def __init__(self, tools: Tools, tally: Tally, say: Say) -> None:
        """``say`` shows people what ``moves`` has to tell."""
        self._tools = tools
        self._tally = tally
        self.handovers = Handovers(tools.book, tools.volumes, tally.migration, self._show_moving)
        self.moves = Moves(
            tally.migration, tools.volumes, tools.agents, tools.nodes, say, self.handovers.at, self._until_ended
        )
        self.reassignment = Reassignment(tally.migration, tools.reach, tools.agents, tools.nodes, say)
        self._grants: tuple[VolumeGrant, ...] = ()

    @property
    def _live(self) -> Migration:
        return self._tally.migration

    # -------------------------------------------------------------- forward

    async def attach(self) -> None:
        """Open every volume to the target under e_t; what one node alone can have, the source lends it."""
        target, epoch = self._live.target, self._live.epoch_target
        single, multi = self._volumes()
        await self.handovers.begin((*single, *multi))

        async def attach(volume: str) -> VolumeGrant:
            async with self.handovers.timed(volume, "attach_ms"):
                (grant,) = await self._tools.volumes.attach((volume,), node=target, epoch=epoch)
                return grant

        attached = await _tries(lambda: all_of(attach(volume) for volume in multi))
        lent = await _tries(lambda: self.moves.lend(single))
        grants = {grant.volume.id: grant for grant in (*attached, *lent)}
        self._grants = tuple(grants[volume] for volume in self._evm().spec.volumes)

    async def prepare(self) -> None:
        """Have the target make a machine that waits."""
        live = self._live
        order = PrepareOrder(
            migration=live.id,
            spec=self._evm().spec,
            epoch=live.epoch_target,
            source=self._peer(live.source),
            volumes=self._grants,
            multifd_channels=live.policy.multifd_channels,
            run_when_local=live.policy.volume_order is VolumeOrder.CLASSIC,
        )
        self._tally.prepared(await _tries(lambda: self.agent(Role.TARGET).prepare(order)))
        await self.save()  # the nonce is on disk before the source may act on it: a restart must know

    async def hand_over(self) -> RoleStatus:
        """Tell the source to begin."""
        live, prepared = self._live, self._tally.answer
        assert prepared is not None
        order = HandoverOrder(
            migration=live.id,
            evm=live.evm,
            epoch_target=live.epoch_target,
            epoch_source=live.epoch_source,
            target=self._peer(live.target),
            prepared=prepared,
            policy=live.policy,
        )
        return await self.agent(Role.SOURCE).hand_over(order)

    # -------------------------------------------------------------- back, and the end

    async def abort(self, role: Role, order: AbortOrder) -> RoleStatus:
        """Ask that end to go back, until it has heard it. Raises ``NotFound`` where it knows of no such migration."""
        return await self._until_known(self.node_of(role), lambda: self.agent(role).abort(self._live.id, order))

    async def carry_go(self) -> RoleStatus:
        """Give the source's GO to the target, once."""
        live = self._live
        return await self.agent(Role.TARGET).go(live.id, GoOrder(epoch=live.epoch_target, nonce=live.nonce or ""))

    async def carry_answer(self, phase: RolePhase) -> RoleStatus:
        """Give the target's answer to the source, once."""
        order = AnswerOrder(word=phase.value, nonce=self._live.nonce or "")
        return await self.agent(Role.SOURCE).answer(self._live.id, order)

    async def record_owner(self, role: Role, *, lost: str | None) -> None:
        """Write down who owns the EVM, as that end has attested; ``lost``: why it runs nowhere."""
        live = self._live
        owner, epoch = (live.target, live.epoch_target) if role is Role.TARGET else (live.source, live.epoch_source)

        def owned(evm: Evm) -> Evm:
            update: dict[str, object] = {"owner": owner, "epoch": epoch}
            if lost:
                update |= {"state": EvmState.CRASHED, "reason": lost}
            elif evm.state not in ENDED or (role is Role.TARGET and (evm.owner, evm.epoch) != (owner, epoch)):
                # What its owner has said to have ended meanwhile stays ended.
                update |= {"state": EvmState.MIGRATING, "reason": None}
            return evm.model_copy(update=update)

        await self._tools.book.update(self._tools.book.evms, live.evm, owned)

    async def move(self) -> None:
        """Have the target get the volumes that the source lends it, however long it takes."""
        await self.moves.finish(self._volumes()[0])

    async def readdress(self, *, tell_again: bool = False) -> None:
        """Have the cloud send what is for the EVM to the target, however long it takes."""
        if not self.reassignment.is_over:
            self._tally.orders_addresses()
            await self.save()  # before there is an order that nobody would know of
        await self.reassignment.finish(self._evm().spec, tell_again=tell_again)

    async def detach(self, role: Role) -> None:
        """Shut out the side that no longer has the EVM, until the services of volumes and addresses have done it."""
        single, multi = self._volumes()
        if role is Role.TARGET:
            await self.moves.take_back(single)
            await self._shut_out(role, (*single, *multi))
            await self._until_known(self._live.source, lambda: self.moves.bring_home(single))
            if self._live.addresses_ordered:  # else an abort would wait for a cloud that it does not concern
                await self._until_known(None, lambda: self.reassignment.bring_home(self._evm().spec))
        else:
            # Not the one for the other's failure: a volume whose move is broken off stands still.
            each = self._detach_from_source(multi), self._move_away(single), self.readdress()
            for ended in await asyncio.gather(*each, return_exceptions=True):
                if isinstance(ended, BaseException):
                    raise ended

    async def _detach_from_source(self, volumes: Sequence[str]) -> None:
        async def detach(volume: str) -> None:
            try:
                async with self.handovers.timed(volume, "detach_ms"):
                    await self._shut_out(Role.SOURCE, (volume,))
            except EmpError as error:
                if not self._has_ended():
                    raise
                log.warning("%s: %s stays attached to %s: %s", self._live.id, volume, self._live.source, error)

        await all_of(detach(volume) for volume in volumes)
        await self.handovers.went_over(volumes)

    async def _move_away(self, volumes: Sequence[str]) -> None:
        await self.moves.finish(volumes)
        await self._shut_out(Role.SOURCE, [volume for volume in volumes if volume not in self.moves.left])

    async def _shut_out(self, role: Role, volumes: Sequence[str]) -> None:
        live, node = self._live, self.node_of(role)

        async def detach() -> None:
            unheld = self._tools.nodes.get(node).fence is not None  # else its QEMU may have them open still
            if role is Role.SOURCE:
                newest = live.epoch_target
                await self._tools.volumes.fence(volumes, epoch=newest, unheld=unheld)
            else:
                newest = max(live.epoch_source, live.epoch_target + 1)
                await self._tools.volumes.take_back(volumes, node=live.source, epoch=live.epoch_source)
            await self._tools.volumes.release(volumes, node=node, older_than=newest, unheld=unheld)

        await self._until_known(None, detach)

    async def close(self, outcome: Outcome, cause: str | None, *, silent: Sequence[Role] = ()) -> None:
        """Write the end: the report, and the EVM free for the next order.

        An end that was ``silent`` to the last may still have something of the EVM: it stays on the list of those that
        a later delete or cold start retires.
        """
        live, book = self._tally.closed(outcome, cause, time.time(), self._clock_after(outcome)), self._tools.book
        holders = tuple(self.node_of(role) for role in Role if role in supervisor.holders(outcome) or role in silent)

        def free(evm: Evm) -> Evm:
            update: dict[str, object] = {"migration": None}
            if outcome is Outcome.LOST and evm.state not in ENDED:
                update |= {"state": EvmState.CRASHED, "reason": cause}
            elif evm.state is EvmState.MIGRATING:
                update["state"] = EvmState.RUNNING
            return evm.model_copy(update=update)

        ends = self.handovers.edits(self._evm().spec.volumes, outcome, live.ended_at or time.time())

        async def write() -> None:
            await book.write(
                *ends,
                change(book.migrations, live.id, lambda _: live),
                change(book.evms, live.evm, free),
                change(book.upkeep, live.evm, lambda upkeep: upkeep.model_copy(update={"holders": holders})),
            )

        await self._until_known(None, write)
        self._tools.metrics.migrated(live)

    def _clock_after(self, outcome: Outcome) -> GuestClock | None:
        """Return what the node where the guest runs has told of its clock since the end there."""
        node = self.node_of(Role.SOURCE if outcome is Outcome.ABORTED else Role.TARGET)
        told = self._tools.nodes.told_of(self._live.evm, node)
        return told.clock if told else None

    # -------------------------------------------------------------- the record

    async def save(self) -> None:
        """Write the migration's record as it stands, if anything of weight has changed."""
        if self._tally.worth_writing:
            migration = self._live
            await self._tools.book.update(self._tools.book.migrations, migration.id, lambda _: migration)
            self._tally.written(migration)

    # -------------------------------------------------------------- tools

    def node_of(self, role: Role) -> str:
        return self._live.source if role is Role.SOURCE else self._live.target

    def agent(self, role: Role) -> AgentClient:
        return self._tools.agents.of(self._tools.nodes.get(self.node_of(role)))

    async def _until_ended(self) -> None:
        await self._tools.book.until(self._has_ended)

    def _has_ended(self) -> bool:
        """Whether the target has said that its machine is gone: the guest uses no volume any more."""
        evm, live = self._evm(), self._live
        is_target = (evm.owner, evm.epoch) == (live.target, live.epoch_target)
        return is_target and evm.state in (EvmState.STOPPED, EvmState.CRASHED)

    def _volumes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the EVM's volumes: those that one node alone can have, and the others."""
        records = [self._tools.book.volumes.get(volume) for volume in self._evm().spec.volumes]
        single = tuple(volume.id for volume in records if not volume.type.multi_attach)
        return single, tuple(volume.id for volume in records if volume.type.multi_attach)

    def _show_moving(self, steps: tuple[VolumeStep, ...]) -> None:
        self._tally.moving(steps)
        self._tools.hub.show(self._live, self._tools.book.migrations.revision_of(self._live.id))

    def _evm(self) -> Evm:
        return self._tools.book.evms.get(self._live.evm, field="evm")

    def _peer(self, name: str) -> Peer:
        report = self._tools.nodes.get(name).report
        return Peer(node=name, host=report.address, link_port=report.link_port)

    async def _until_known(self, node: str | None, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return await until_known(self._tools.book, self._tools.nodes, node, call)


async def _tries(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return what ``call`` answers, asking once more if its outcome is unknown."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(Unavailable, OutcomeUnknown):
            return await call()
    return await call()
