"""What people may do to EVMs: each request is checked, recorded as an intent, and carried out by ``boot``.

A request answers when its intent has come to its end, or with ``OutcomeUnknown`` if that takes longer than
``PATIENCE_S`` (a node that does not answer): then it goes on, and ``emp evm show`` says how it stands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from emp.controller import trust
from emp.controller.addresses import claims
from emp.controller.attested import ENDED
from emp.controller.blueprint import Asked, Blueprints
from emp.controller.book import Book, Edit, Intent, Upkeep, Verb, change, new
from emp.controller.boot import Boot
from emp.controller.capacity import Capacity
from emp.controller.migrations import Migrations
from emp.controller.nodes import Nodes
from emp.controller.placement import Placed, cannot_run, needs, place, place_on
from emp.controller.tasks import Tasks
from emp.controller.volumes import Volumes
from emp.model.api import EvmCreate, EvmStart, EvmStop
from emp.model.errors import BadInput, Conflict, NodeDown, NotFound, OutcomeUnknown
from emp.model.evm import Evm, EvmSpec, EvmState
from emp.model.names import format_size
from emp.model.volume import Volume

PATIENCE_S = 90.0
DELETE_GRACE_S = 10.0


class Evms:
    def __init__(
        self,
        book: Book,
        nodes: Nodes,
        capacity: Capacity,
        blueprints: Blueprints,
        boot: Boot,
        migrations: Migrations,
        volumes: Volumes,
    ) -> None:
        self._book = book
        self._volumes = volumes
        self._migrations = migrations
        self._nodes = nodes
        self._capacity = capacity
        self._blueprints = blueprints
        self._boot = boot
        self._tasks = Tasks("order")
        self._closing = False

    def resume(self) -> None:
        """After a restart: carry on with what was intended."""
        for name, record in self._book.upkeep.held.items():
            if record.model.intent is not None:
                self._tasks.start(name, self._boot.carry_out(name, resumed=True))

    async def close(self) -> None:
        """Stop carrying out orders, and answer who waits for one. The next process carries on. Idempotent."""
        self._closing = True
        await self._tasks.close()

    def get(self, name: str) -> Evm:
        """Raises ``NotFound``."""
        return self._book.evms.get(name, field="evm")

    async def create(self, request: EvmCreate) -> Evm:
        """Return the EVM once its QEMU runs. Raises what ``Blueprints`` raises, or why its node could not start it."""
        asked = await self._blueprints.check(request)
        async with self._capacity.lock:
            self._blueprints.check_free(request.name)
            spec, placed = self._blueprints.draw(asked)
            await self._record(spec, placed, asked)
        return await self._finished(request.name, Verb.CREATE)

    async def _record(self, spec: EvmSpec, placed: Placed, asked: Asked) -> None:
        """Record first, then act: the EVM, its addresses and what is to be done appear in one step."""
        name = spec.name
        epoch = await self._book.epochs.issue()
        intent = Intent(verb=Verb.CREATE, epoch=epoch, node=placed.node.name, wishes=asked.wishes)
        evm = Evm(spec=spec, reason=f"on {placed.node.name}: {placed.reason}", created_at=time.time())
        await self._book.write(
            new(self._book.evms, name, evm),
            new(self._book.upkeep, name, Upkeep(intent=intent)),
            *(new(self._book.claims, claim.address, claim, field="pods") for claim in claims(spec)),
            *(change(self._book.volumes, volume.id, _given_to(name)) for volume in asked.existing),
        )

    async def start(self, name: str, request: EvmStart | None = None) -> Evm:
        """Cold start, only of what its owner attests to have ended. By a person: ``request``; by the policy: None."""
        self._check_idle(name)
        evm = self.get(name)
        if evm.state not in ENDED:
            hint = f"its node must say first how it is; if that is lost: emp evm recover {name}"
            raise Conflict(
                f"EVM {name} is {evm.state}", field="evm", hint=hint if evm.state is EvmState.UNKNOWN else None
            )
        self._check_holders(name)
        return await self._cold_start(name, request)

    async def recover(self, name: str, request: EvmStart) -> Evm:
        """Cold start of what nobody attests: its node is lost, or its migration was (rule R8).

        Only once each node that could hold authority can be asked to retire it, or is fenced: ``NodeDown`` says what is
        missing, with the command to run. Raises ``Conflict`` for an EVM that runs, or whose migration will end.
        """
        evm = self.get(name)
        self._check_no_intent(name)
        if evm.migration is None and evm.state not in (*ENDED, EvmState.UNKNOWN):
            why = f"it is {evm.state} on {evm.owner}"
            raise Conflict(f"EVM {name} needs no recovery: {why}", field="evm", hint=f"see: emp evm show {name}")
        self._check_holders(name)
        if evm.migration is not None:
            self._place_again(evm, request.node)  # a migration is not given up for nothing
            await self._migrations.give_up(evm.migration)
        return await self._cold_start(name, request)

    async def _cold_start(self, name: str, request: EvmStart | None) -> Evm:
        evm = self.get(name)
        async with self._capacity.lock:
            placed = self._place_again(evm, request.node if request else None)
            retire_epoch = await self._book.epochs.issue()
            epoch = await self._book.epochs.issue()
            intent = Intent(verb=Verb.START, epoch=epoch, retire_epoch=retire_epoch, node=placed.node.name)
            want = True if request else None
            await self._intend(name, intent, want_running=want, restarts=0 if request else None)
        return await self._finished(name, Verb.START)

    def _place_again(self, evm: Evm, node: str | None) -> Placed:
        """Where it was, unless another node was asked for or that one does not fit any more."""
        spec, name = evm.spec, evm.spec.name
        unfit = [*needs(spec.memory_bytes, spec.vcpus, spec.image, ipv6=spec.has_ipv6), cannot_run(spec)]
        if node is not None:
            return place_on(self._capacity.candidate(self._nodes.need_ready(node), but=name), unfit)
        candidates = self._capacity.candidates(but=name)
        for candidate in candidates:
            if candidate.node.name == evm.owner and not any(check(candidate) for check in unfit):
                return Placed(candidate, "where it was")
        return place(candidates, unfit, what=name)

    async def stop(self, name: str, request: EvmStop) -> Evm:
        """Shut it down, and keep it down. Raises ``NodeDown`` while its owner cannot be asked.

        ``Conflict`` while it migrates, but for one that runs on the target and waits for volumes to follow: they stay
        where they are then.
        """
        evm = self.get(name)
        if evm.migration is None or not self._migrations.has_landed(evm.migration):
            self._check_not_migrating(name)
        self._check_no_intent(name)
        if evm.state is EvmState.STOPPED:
            return await self._book.update(
                self._book.evms, name, lambda e: e.model_copy(update={"want_running": False})
            )
        if evm.owner is not None:
            self._nodes.need_ready(evm.owner, field="evm")
        await self._intend(name, Intent(verb=Verb.STOP, grace_s=request.grace_s), want_running=False)
        return await self._finished(name, Verb.STOP)

    # -------------------------------------------------------------- volumes

    async def attach_volume(self, name: str, volume: str) -> Evm:
        """Give it a volume that no EVM has: plugged if it runs, else there at its next start.

        Raises ``NotFound``, ``Conflict`` (another EVM's; all slots taken; migrating; being started or stopped),
        ``NodeDown``, or why the volume cannot be attached or plugged: nothing has changed then.
        """
        self._check_idle(name)
        await self._volumes.get(volume)
        evm = self.get(name)
        if volume in evm.spec.volumes:
            return evm
        slot = _free_slot(evm)
        given = change(self._book.volumes, volume, _given_to(name, field="volume"))
        if evm.state in ENDED:
            await self._while_down(name, lambda spec: spec.with_volume(volume, slot), given)
            return self.get(name)
        self._check_running(evm)
        epoch = await self._book.epochs.issue()
        intent = Intent(verb=Verb.ATTACH, epoch=epoch, volume=volume, slot=slot)
        await self._intend(name, intent, also=[given])
        return await self._finished(name, Verb.ATTACH)

    async def detach_volume(self, name: str, volume: str, *, in_use: bool = False) -> Evm:
        """Take a volume away; it is nobody's then, and outlives the EVM also if it was made with it.

        Raises ``NotFound``, and ``Conflict`` also where the guest is using it, unless ``in_use``.
        """
        self._check_idle(name)
        evm = self.get(name)
        if volume not in evm.spec.volumes:
            raise NotFound(f"EVM {name} has no volume {volume[:60]!r}", field="volume", hint=f"emp evm show {name}")
        if evm.state in ENDED:
            free = change(self._book.volumes, volume, lambda v: v.model_copy(update={"evm": None}))
            await self._while_down(name, lambda spec: spec.without_volume(volume), free, disowned=volume)
            return self.get(name)
        self._check_running(evm)
        await self._intend(name, Intent(verb=Verb.DETACH, volume=volume, in_use=in_use))
        return await self._finished(name, Verb.DETACH)

    async def resize_volume(self, volume: str, size_bytes: int) -> Volume:
        """Make a volume bigger; the guest of an EVM that runs sees it.

        Raises ``NotFound``, ``BadInput`` for less than it has, ``Refused`` where its driver does not resize,
        ``Conflict``, ``NodeDown``.
        """
        record = await self._volumes.get(volume)
        if size_bytes < record.size_bytes:
            raise BadInput(
                f"volume {volume} has {format_size(record.size_bytes)} and cannot shrink to {format_size(size_bytes)}",
                field="size_bytes",
                hint="volumes only grow",
            )
        evm = self._book.evms.find(record.evm) if record.evm else None
        if evm is None or evm.state in ENDED:
            return await self._volumes.resize(volume, size_bytes)
        name = evm.spec.name
        self._check_idle(name)
        self._check_running(evm)
        epoch = await self._book.epochs.issue()
        await self._intend(name, Intent(verb=Verb.RESIZE, epoch=epoch, volume=volume, size_bytes=size_bytes))
        await self._carried_out(name, Verb.RESIZE)
        return self._book.volumes.get(volume)

    def _check_running(self, evm: Evm) -> None:
        if evm.owner is not None:
            self._nodes.need_ready(evm.owner, field="evm")
        if evm.state is not EvmState.RUNNING:
            raise Conflict(
                f"EVM {evm.spec.name} is {evm.state}",
                field="evm",
                hint="its volumes change while it runs, or while it is stopped",
            )

    async def _while_down(
        self, name: str, update: Callable[[EvmSpec], EvmSpec], edit: Edit[Volume], *, disowned: str | None = None
    ) -> None:
        """Change the record alone, if the EVM is still down and nothing else has begun."""

        def changed(evm: Evm) -> Evm:
            self._check_idle(name)
            if evm.state not in ENDED:
                raise Conflict(f"EVM {name} is {evm.state}", field="evm", hint="try again")
            return evm.model_copy(update={"spec": update(evm.spec)})

        def kept(upkeep: Upkeep) -> Upkeep:
            own = tuple(each for each in upkeep.own_volumes if each != disowned)
            return upkeep.model_copy(update={"own_volumes": own})

        await self._book.write(change(self._book.evms, name, changed), change(self._book.upkeep, name, kept), edit)

    async def delete(self, name: str, *, grace_s: float | None = None) -> None:
        """Stop it, retire it, remove what was made with it. Takes over from whatever is being done to it.

        A migration is aborted first, or waited for if it is committed (``OutcomeUnknown`` where that takes too long).
        ``grace_s`` None: time to shut down in order only if it has a volume that outlives it.
        """
        if (migration := self.get(name).migration) is not None:
            await self._migrations.end(migration, f"EVM {name} is to be deleted")
        evm = self.get(name)
        self._check_not_migrating(name)
        self._check_holders(name)
        await self._tasks.cancel(name)
        if grace_s is None:
            stays = set(evm.spec.volumes) - set(self._book.upkeep.get(name).own_volumes)
            grace_s = DELETE_GRACE_S if stays else 0.0
        retire_epoch = await self._book.epochs.issue()
        intent = Intent(verb=Verb.DELETE, retire_epoch=retire_epoch, grace_s=grace_s)
        await self._intend(name, intent, want_running=False, replace=True)
        await self._carried_out(name, Verb.DELETE)

    # -------------------------------------------------------------- checks

    def _check_idle(self, name: str) -> None:
        self.get(name)
        self._check_not_migrating(name)
        self._check_no_intent(name)

    def _check_no_intent(self, name: str) -> None:
        intent = self._book.upkeep.get(name).intent
        if intent is not None:
            hint = f"wait, or look at: emp evm show {name}"
            raise Conflict(f"{intent.verb} of EVM {name} is under way", field="evm", hint=hint)

    def _check_not_migrating(self, name: str) -> None:
        if (migration := self.get(name).migration) is not None:
            raise Conflict(
                f"EVM {name} is migrating ({migration})",
                field="evm",
                hint=f"wait for its end, or: emp migration abort {migration}",
                migration=migration,
            )

    def _check_holders(self, name: str) -> None:
        """Raise ``NodeDown`` if a node that may hold authority over the EVM can neither be asked nor is fenced (R8)."""
        missing = {holder: why for holder in self._book.upkeep.get(name).holders if (why := self._still_holds(holder))}
        if missing:
            nodes = [node for holder in missing if (node := self._nodes.find(holder))]
            raise NodeDown(
                f"EVM {name} may run on {' and on '.join(missing)}: {'; '.join(missing.values())}",
                field="evm",
                hint="; ".join(map(trust.remedy, nodes)) or "start their agents",
                nodes=missing,
            )

    def _still_holds(self, holder: str) -> str | None:
        """Why a node cannot be asked to give an EVM up; None where it can be, or where it is fenced."""
        node = self._nodes.find(holder)
        if node is None:
            return f"node {holder} has never reported"
        if node.fence is not None:
            return None
        if not node.ready:
            return self._nodes.down(node).message
        why = trust.doubt(node)
        return f"node {holder} cannot speak for it: {why}" if why else None

    # -------------------------------------------------------------- carrying out

    async def _intend(
        self,
        name: str,
        intent: Intent,
        *,
        want_running: bool | None = None,
        restarts: int | None = None,
        replace: bool = False,
        also: Sequence[Edit[Volume]] = (),
    ) -> None:
        """Record what is to be done, unless something else has begun in the meantime."""

        def note(upkeep: Upkeep) -> Upkeep:
            if upkeep.intent is not None and not replace:
                raise Conflict(f"{upkeep.intent.verb} of EVM {name} is under way", field="evm", hint="wait")
            update = {"intent": intent} | ({} if restarts is None else {"restarts": restarts})
            return upkeep.model_copy(update=update)

        def want(evm: Evm) -> Evm:
            if evm.migration is not None and not (
                intent.verb is Verb.STOP and self._migrations.has_landed(evm.migration)
            ):
                self._check_not_migrating(name)
            return evm if want_running is None else evm.model_copy(update={"want_running": want_running})

        await self._book.write(change(self._book.upkeep, name, note), change(self._book.evms, name, want), *also)

    async def _finished(self, name: str, verb: Verb) -> Evm:
        await self._carried_out(name, verb)
        return self.get(name)

    async def _carried_out(self, name: str, verb: Verb) -> None:
        """Carry the intent out in a task of its own, so that a client who goes away changes nothing."""
        task = self._tasks.start(name, self._boot.carry_out(name))
        done, _ = await asyncio.wait([task], timeout=PATIENCE_S)
        if not done:
            how = self._book.evms.find(name)
            raise OutcomeUnknown(
                f"{verb} of EVM {name} is not done yet: {how.reason if how else 'nearly'}",
                field="evm",
                hint=f"it goes on; see: emp evm show {name}",
            )
        if task.cancelled() and self._closing:
            raise OutcomeUnknown(
                f"the controller stops during the {verb} of EVM {name}", field="evm", hint="it goes on when it is back"
            )
        if task.cancelled():
            raise Conflict(f"{verb} of EVM {name} was overtaken by another order", field="evm")
        task.result()


def _free_slot(evm: Evm) -> int:
    slot = evm.spec.free_slot()
    if slot is None:
        raise Conflict(
            f"EVM {evm.spec.name} has {len(evm.spec.volumes)} volumes, and none more can be plugged into it",
            field="volume",
            hint="detach one first",
        )
    return slot


def _given_to(name: str, *, field: str = "volumes") -> Callable[[Volume], Volume]:
    def give(volume: Volume) -> Volume:
        if volume.evm not in (None, name):
            hint = "a volume has one EVM: detach it there first"
            raise Conflict(f"volume {volume.id} belongs to EVM {volume.evm}", field=field, hint=hint)
        return volume.model_copy(update={"evm": name})

    return give
