"""Carries out what is intended for an EVM: create, start, stop, delete, step by step and from any step again.

Every step may be repeated, and what the next one relies on is on disk before it is taken. So a restart of the
controller just carries on. A step whose outcome is unknown (a node that does not answer) is repeated until it is known;
one that is refused ends the intent: a create is undone, a start leaves the EVM as it is found, with the reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from emp.controller import trust
from emp.controller.agents import AgentClient, Agents
from emp.controller.book import Book, Intent, Upkeep, Verb, VolumeWish, change, gone
from emp.controller.fences import Fences
from emp.controller.nodes import Nodes
from emp.controller.patience import until_known
from emp.controller.plugs import Plugs
from emp.controller.reach import Reach
from emp.controller.tasks import all_of
from emp.controller.volumes import Volumes
from emp.model.errors import (
    Conflict,
    EmpError,
    HypervisorError,
    NotFound,
    StaleEpoch,
)
from emp.model.evm import Evm, EvmState
from emp.model.node import EvmReport, NodeReport
from emp.model.orders import RetireOrder, StartOrder, StopOrder

log = logging.getLogger(__name__)

T = TypeVar("T")

_BEGUN = (EvmState.RUNNING, EvmState.CREATING)


class Boot:
    def __init__(
        self, book: Book, nodes: Nodes, agents: Agents, volumes: Volumes, fences: Fences, reach: Reach
    ) -> None:
        self._book = book
        self._nodes = nodes
        self._agents = agents
        self._volumes = volumes
        self._fences = fences
        self._reach = reach
        self._plugs = Plugs(book, volumes, self._agent, self._patiently)

    async def carry_out(self, name: str, *, resumed: bool = False) -> None:
        """Bring the EVM's intent to its end. ``resumed``: an earlier process may have given the orders already.

        Raises the error that ended a create or a start; their consequences have been dealt with then.
        """
        intent = self._intent(name)
        try:
            match intent.verb:
                case Verb.CREATE:
                    await self._create(name, resumed)
                case Verb.START:
                    await self._start(name, resumed)
                case Verb.STOP:
                    await self._stop(name, intent)
                case Verb.DELETE:
                    await self._delete(name, intent)
                case Verb.ATTACH | Verb.DETACH | Verb.RESIZE:
                    await self._plugs.carry_out(name, intent)
        except EmpError as error:
            log.error("%s of EVM %s failed: %s", intent.verb, name, error)
            await self._failed(name, intent, error)
            raise

    # -------------------------------------------------------------- create and start

    async def _create(self, name: str, resumed: bool) -> None:
        for index, wish in enumerate(self._intent(name).wishes):
            if wish.id is None:
                await self._make_volume(name, index, wish)
        wishes = self._intent(name).wishes
        await self._edit_evm(name, lambda evm: _with_volumes(evm, tuple(wish.id or "" for wish in wishes)))
        await self._boot(name, resumed)

    async def _make_volume(self, name: str, index: int, wish: VolumeWish) -> None:
        assert wish.type is not None and wish.size_bytes is not None
        made = await self._volumes.create(wish.type, wish.size_bytes, image=wish.image, evm=name)

        def note(upkeep: Upkeep) -> Upkeep:
            assert upkeep.intent is not None
            wishes = list(upkeep.intent.wishes)
            wishes[index] = wish.model_copy(update={"id": made.id})
            intent = upkeep.intent.model_copy(update={"wishes": tuple(wishes)})
            return upkeep.model_copy(update={"intent": intent, "own_volumes": (*upkeep.own_volumes, made.id)})

        await self._book.update(self._book.upkeep, name, note)

    async def _start(self, name: str, resumed: bool) -> None:
        """Cold start: first every node that could hold authority has sworn that it holds none (rule R8)."""
        if not (resumed and await self._is_started(name)):
            await self._retire_holders(name)
            await self._boot(name, resumed)
        else:
            await self._started(name)

    async def _boot(self, name: str, resumed: bool) -> None:
        intent = self._intent(name)
        assert intent.node is not None
        node, epoch = intent.node, intent.epoch
        await self._hold(name, node)
        spec = self._book.evms.get(name).spec
        self._volumes.check_given_up(spec.volumes, node=node)
        volumes = self._volumes  # nobody has them open: all that could have are retired, or fenced (rule R8)
        await self._patiently(
            name, None, lambda: volumes.release(spec.volumes, keep_node=node, unheld=True), sent=resumed
        )
        grants = await self._patiently(
            name, None, lambda: volumes.attach(spec.volumes, node=node, epoch=epoch), sent=resumed
        )
        await self._patiently(name, None, lambda: volumes.fence(spec.volumes, epoch=epoch, unheld=True))
        await self._patiently(name, None, lambda: self._reach.assign(spec, node, insist=True), sent=resumed)
        order = StartOrder(spec=spec, epoch=epoch, volumes=grants)
        try:
            report = await self._patiently(name, node, lambda: self._agent(node).start(order), sent=resumed)
        except StaleEpoch:
            if not await self._is_started(name):
                raise
        else:
            if report.state not in _BEGUN:
                raise HypervisorError(f"it is {report.state} on {node}: {report.reason or 'no reason given'}")
        await self._started(name)

    async def _is_started(self, name: str) -> bool:
        """Return whether the intent's node runs the EVM under the intent's epoch, by its own word."""
        intent = self._intent(name)
        assert intent.node is not None
        node = intent.node

        async def ask() -> NodeReport:
            return await self._agent(node).report()

        found = (await self._patiently(name, node, ask)).evms
        return any(r.name == name and r.epoch == intent.epoch and r.state in _BEGUN for r in found)

    async def _started(self, name: str) -> None:
        intent = self._intent(name)

        def run(evm: Evm) -> Evm:
            update = {"state": EvmState.RUNNING, "reason": None, "owner": intent.node, "epoch": intent.epoch}
            return evm.model_copy(update=update | {"want_running": True})

        await self._finish(name, run)
        await self._tidy(name, keep_epoch=intent.epoch, unheld=True)

    async def _retire_holders(self, name: str) -> None:
        """Have every node that could hold authority give it up: RETIRED(k) in its journal, or a fence (rule R8).

        A fenced node writes RETIRED(k) before its fence is lifted. What no service can shut a node out of is given up
        by this proof alone.
        """
        order = RetireOrder(epoch=self._intent(name).retire_epoch)
        holders = self._upkeep(name).holders
        await all_of(self._retire(name, node, order) for node in holders)
        unfenceable = self._volumes.unfenceable(self._book.evms.get(name).spec.volumes)
        await all_of(self._volumes.release(unfenceable, node=node) for node in holders)
        await self._book.update(self._book.upkeep, name, lambda u: u.model_copy(update={"holders": ()}))

    async def _retire(self, name: str, node: str, order: RetireOrder) -> None:
        while not await self._fences.owe(node, name, order.epoch):
            ordering = asyncio.create_task(self._order_to_retire(name, node, order), name=f"retire {name} on {node}")
            fenced = asyncio.create_task(self._book.until(lambda: self._is_fenced(node)), name=f"fence of {node}")
            try:
                await asyncio.wait([ordering, fenced], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (ordering, fenced):
                    task.cancel()
                await asyncio.wait([ordering, fenced])
            if not ordering.cancelled():
                ordering.result()
                return

    async def _order_to_retire(self, name: str, node: str, order: RetireOrder) -> None:
        async def explain(error: EmpError) -> None:
            record = self._nodes.find(node)
            remedy = f"; {trust.remedy(record)}" if record else ""
            reason = f"waiting for {node}, which may hold it: {error.message}{remedy}"
            await self._edit_evm(name, lambda evm: evm.model_copy(update={"reason": reason}))

        async def retire() -> None:
            self._nodes.need_trusted(node)
            await self._agent(node).retire(name, order)

        try:
            await until_known(self._book, self._nodes, node, retire, on_wait=explain)
        except StaleEpoch as error:
            raise Conflict(
                f"{node} has promised a newer epoch than {order.epoch}: {error.message}", field="evm", hint="try again"
            ) from error

    def _is_fenced(self, node: str) -> bool:
        record = self._nodes.find(node)
        return record is not None and record.fence is not None

    async def _hold(self, name: str, node: str) -> None:
        """Remember that ``node`` may have authority from now on."""
        await self._book.update(self._book.upkeep, name, lambda upkeep: upkeep.held_by(node))

    # -------------------------------------------------------------- stop and delete

    async def _stop(self, name: str, intent: Intent) -> None:
        evm = self._book.evms.get(name)
        reason = "stopped by request"
        if (report := await self._stop_at_owner(evm, intent.grace_s)) is not None:
            reason = report.reason or reason

        def stopped(evm: Evm) -> Evm:
            return evm.model_copy(update={"state": EvmState.STOPPED, "reason": reason, "want_running": False})

        if evm.migration is not None:  # all but over: its volumes follow an EVM that has ended no longer (``Moves``)
            await self._edit_evm(name, stopped)
            await self._book.until(lambda: self._book.evms.get(name).migration is None)
        await self._finish(name, stopped)
        await self._tidy(name, keep_epoch=None, unheld=report is not None)

    async def _stop_at_owner(self, evm: Evm, grace_s: float) -> EvmReport | None:
        """Return the owner's report; None where there is nothing to stop."""
        name, owner = evm.spec.name, evm.owner
        if owner is None:
            return None
        order = StopOrder(epoch=evm.epoch, grace_s=grace_s)
        try:
            return await self._patiently(name, owner, lambda: self._agent(owner).stop(name, order))
        except NotFound:
            return None

    async def _delete(self, name: str, intent: Intent) -> None:
        evm = self._book.evms.get(name)
        if intent.grace_s > 0 and evm.state in (EvmState.RUNNING, EvmState.PAUSED):
            await self._stop_at_owner(evm, intent.grace_s)
        await self._retire_holders(name)
        own = self._upkeep(name).own_volumes
        others = (v.id for v in self._book.volumes.all() if v.evm == name)  # half attached, or half detached
        volumes = tuple(dict.fromkeys((*evm.spec.volumes, *own, *others)))
        await self._patiently(name, None, lambda: self._volumes.disown(volumes, own))
        await self._patiently(name, None, lambda: self._reach.release(evm.spec))
        freed = [gone(self._book.claims, claim.address) for claim in self._book.claims.all() if claim.evm == name]
        await self._book.write(gone(self._book.evms, name), gone(self._book.upkeep, name), *freed)

    # -------------------------------------------------------------- ends

    async def _finish(self, name: str, update: Callable[[Evm], Evm]) -> None:
        await self._book.write(
            change(self._book.evms, name, update),
            change(self._book.upkeep, name, lambda u: u.model_copy(update={"intent": None})),
        )

    async def _failed(self, name: str, intent: Intent, error: EmpError) -> None:
        match intent.verb:
            case Verb.CREATE:
                await self._undo(name, error)
            case Verb.START:
                await self._finish(name, lambda evm: _not_started(evm, error))
                await self._tidy(name, keep_epoch=None)
            case Verb.ATTACH | Verb.DETACH | Verb.RESIZE:
                await self._plugs.give_up(name, intent)
            case Verb.STOP | Verb.DELETE:
                # The intent goes: the agent's reports tell how the EVM is, and a person tries again.
                await self._finish(
                    name, lambda evm: evm.model_copy(update={"reason": f"{intent.verb} failed: {error.message}"})
                )

    async def _undo(self, name: str, error: EmpError) -> None:
        """Take back a create that was refused: what is left of it goes, and then its record."""
        retire_epoch = await self._book.epochs.issue()
        undo = Intent(verb=Verb.DELETE, retire_epoch=retire_epoch)
        await self._book.write(
            change(self._book.upkeep, name, lambda u: u.model_copy(update={"intent": undo})),
            change(
                self._book.evms,
                name,
                lambda e: e.model_copy(update={"reason": f"not created: {error.message}; removing"}),
            ),
        )
        try:
            await self._delete(name, undo)
        except EmpError as second:
            log.error("what is left of EVM %s could not be removed: %s", name, second)
            await self._failed(name, undo, second)

    async def _tidy(self, name: str, *, keep_epoch: int | None, unheld: bool = False) -> None:
        """Detach what older epochs left behind. Nothing depends on it: the fence has shut them out.

        Unless they are known to be ``unheld``, what nobody can be shut out of stays noted as theirs.
        """
        evm = self._book.evms.find(name)
        if evm is not None and evm.spec.volumes:
            kept = () if unheld else self._volumes.unfenceable(evm.spec.volumes)
            try:
                await self._volumes.release(
                    [v for v in evm.spec.volumes if v not in kept], keep_epoch=keep_epoch, unheld=unheld
                )
            except EmpError as error:
                log.warning("old attachments of EVM %s are left: %s", name, error)

    # -------------------------------------------------------------- tools

    async def _patiently(
        self, name: str, node: str | None, call: Callable[[], Awaitable[T]], *, sent: bool = True
    ) -> T:
        async def explain(error: EmpError) -> None:
            await self._edit_evm(name, lambda evm: evm.model_copy(update={"reason": f"waiting: {error.message}"}))

        async def unless_fenced() -> T:
            if node is not None and self._is_fenced(node):  # it is off: whatever it was told, it does not do it
                raise Conflict(f"node {node} is fenced", field="node", hint=f"emp evm recover {name}")
            return await call()

        return await until_known(self._book, self._nodes, node, unless_fenced, sent=sent, on_wait=explain)

    def _agent(self, node: str) -> AgentClient:
        return self._agents.of(self._nodes.get(node))

    def _upkeep(self, name: str) -> Upkeep:
        return self._book.upkeep.get(name)

    def _intent(self, name: str) -> Intent:
        intent = self._upkeep(name).intent
        if intent is None:
            raise Conflict(f"nothing is being done to EVM {name}", field="evm")
        return intent

    async def _edit_evm(self, name: str, update: Callable[[Evm], Evm]) -> None:
        await self._book.update(self._book.evms, name, update)


def _with_volumes(evm: Evm, volumes: tuple[str, ...]) -> Evm:
    return evm.model_copy(update={"spec": evm.spec.model_copy(update={"volumes": volumes})})


def _not_started(evm: Evm, error: EmpError) -> Evm:
    """It runs nowhere: every holder was retired, or still holds what it held."""
    state = evm.state if evm.state in (EvmState.STOPPED, EvmState.PANICKED) else EvmState.CRASHED
    return evm.model_copy(update={"state": state, "reason": f"not started: {error.message}"})
