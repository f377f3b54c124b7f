"""Migrations: asked for, planned, refused with reasons, supervised, aborted, listed.

A plan costs nothing and changes nothing until its record is written; from then on its memory counts on both ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator

from emp.controller.attested import ENDED
from emp.controller.book import Book, Upkeep, change, gone, new
from emp.controller.capacity import Capacity
from emp.controller.config import Network
from emp.controller.efs import Efs
from emp.controller.hub import Snapshot
from emp.controller.placement import Candidate, Placed, Unfit, cordoned, excluded, not_there, place, place_on, untrusted
from emp.controller.steps import Tools
from emp.controller.supervise import Supervision
from emp.controller.survey import Survey
from emp.controller.tasks import Tasks
from emp.migration.preflight import Facts, failed, preflight
from emp.model.addresses import AddressFacts
from emp.model.efs import EfsFacts
from emp.model.errors import BadInput, Conflict, EmpError, OutcomeUnknown, Refused
from emp.model.evm import Evm, EvmState
from emp.model.migration import Check, Migration, MigrationRequest, Outcome, Stage
from emp.model.node import Node
from emp.store.base import Compacted, EventKind, FutureRevision

log = logging.getLogger(__name__)

KEPT = 1000
"""closed migrations that stay in the store"""
END_S = 60.0
"""how long a delete waits for the end of a migration"""


class Migrations:
    def __init__(self, tools: Tools, capacity: Capacity, network: Network, efs: Efs) -> None:
        self._tools = tools
        self._book: Book = tools.book
        self._capacity = capacity
        self._network = network
        self._efs = efs
        self._open: dict[str, Supervision] = {}
        self._tasks = Tasks("migration")

    def resume(self) -> None:
        """After a restart: look at both ends of every migration that is open."""
        for migration in self._book.migrations.all():
            if migration.stage is not Stage.CLOSED:
                self._supervise(migration, resumed=True)

    async def close(self) -> None:
        """Stop looking. The migrations go on."""
        await self._tasks.close()

    async def node_down(self, node: Node) -> None:
        for supervision in list(self._open.values()):
            supervision.node_down(node)

    # -------------------------------------------------------------- reading

    def get(self, id: str) -> Migration:  # noqa: A002
        """Return the migration with its latest progress. Raises ``NotFound``."""
        live = self._tools.hub.newest(id)
        return live.migration if live else self._book.migrations.get(id)

    def all(self, *, evm: str | None = None) -> list[Migration]:
        """Return all migrations, or an EVM's, which may be gone since; the newest first. Raises ``NotFound``."""
        held = sorted(self._book.migrations.held.values(), key=lambda record: -record.kv.create_revision)
        found = [self.get(record.name) for record in held if evm in (None, record.model.evm)]
        if evm is not None and not found:
            self._book.evms.get(evm, field="evm")
        return found

    async def follow(self, id: str, *, after: int | None) -> AsyncGenerator[Snapshot]:  # noqa: A002
        """Yield snapshots until it is closed: from now on, or every stage written ``after`` that revision first."""
        self._book.migrations.get(id)
        with self._tools.hub.follow(id) as coming:
            upto = self._book.migrations.revision_of(id)
            newest = Snapshot(self.get(id), upto)
            if after is not None:
                async for snapshot in self._past(id, after, upto):
                    yield snapshot
                    newest = snapshot if snapshot.revision >= newest.revision else newest
            if after is None or newest.revision > after or newest.migration.stage is not Stage.CLOSED:
                newest = Snapshot(self.get(id), self._book.migrations.revision_of(id))
                yield newest
            if newest.migration.stage is Stage.CLOSED:
                return
            async for snapshot in coming:
                yield snapshot

    async def _past(self, id: str, after: int, upto: int) -> AsyncGenerator[Snapshot]:  # noqa: A002
        """Yield what was written in (after, upto); nothing where that history is gone."""
        if after >= upto:
            return
        key = self._book.migrations.records.key(id)
        try:
            async with self._book.store.watch(key, after) as watch:
                async for event in watch:
                    if event.revision >= upto:
                        return
                    if event.kind is EventKind.PUT:
                        yield Snapshot(Migration.model_validate_json(event.kv.value), event.revision)
        except (Compacted, FutureRevision) as error:
            log.info("migration %s: %s", id, error)

    # -------------------------------------------------------------- writing

    async def begin(self, name: str, request: MigrationRequest) -> Migration:
        """Plan it and start it; with ``dry_run`` only say what would be done.

        Raises ``NotFound``, ``BadInput``, ``Conflict``, ``NodeDown``, ``Refused`` or ``NoPlacement``.
        """
        survey = await self._survey(self._movable(name), request.target)
        efs = await self._efs.facts(self._movable(name).spec)
        addresses = await self._tools.reach.facts(self._movable(name).spec)
        async with self._capacity.lock:
            evm = self._movable(name)
            source = self._tools.nodes.need_ready(evm.owner or "", field="evm")
            if tuple(volume.id for volume in survey.volumes) != evm.spec.volumes:
                raise Conflict(f"the volumes of EVM {name} have changed in the meantime", field="evm", hint="try again")
            placed, checks = self._target(evm, source, survey, efs, addresses, request)
            if request.dry_run:
                return self._plan("dry-run", evm, placed, checks, request, (0, 0))
            epochs = await self._book.epochs.issue(), await self._book.epochs.issue()
            migration = self._plan(f"m-{secrets.token_hex(5)}", evm, placed, checks, request, epochs)
            await self._record(migration)
        self._supervise(migration, resumed=False)
        return migration

    async def _survey(self, evm: Evm, target: str | None) -> Survey:
        """Ask the services of the EVM's volumes, without holding anybody up: it may take seconds."""
        nodes = [target] if target is not None else [node.name for node in self._tools.nodes.ready()]
        return await self._tools.volumes.survey(evm.spec.volumes, nodes=nodes)

    def _movable(self, name: str) -> Evm:
        evm = self._book.evms.get(name, field="evm")
        if evm.migration is not None:
            raise self._still_migrating(name, self.get(evm.migration))
        if (intent := self._book.upkeep.get(name).intent) is not None:
            raise Conflict(f"{intent.verb} of EVM {name} is under way", field="evm", hint="wait until it is done")
        if evm.state is EvmState.UNKNOWN and evm.owner is not None:
            self._tools.nodes.need_ready(evm.owner, field="evm")
        if evm.state is not EvmState.RUNNING:
            why = f": {evm.reason}" if evm.reason else ""
            remedy = f"emp evm start {name}" if evm.state in ENDED else f"see: emp evm show {name}"
            raise Conflict(f"EVM {name} is {evm.state}, not running{why}", field="evm", hint=remedy)
        return evm

    def _still_migrating(self, name: str, live: Migration) -> Conflict:
        message, hint = f"EVM {name} is already migrating ({live.id})", f"watch it: emp migration watch {live.id}"
        if self.has_landed(live.id) and live.moving:
            volumes = ", ".join(step.volume for step in live.moving)
            why = live.hint or f"{volumes} is on its way from {live.source}"
            message = f"EVM {name} runs on {live.target}, and {live.id} is not over: {why}"
            hint = f"remove the cause, and it ends by itself: emp volume show {live.moving[0].volume}; "
            hint += f"or: emp evm stop {name}"
        return Conflict(message, field="evm", hint=hint, migration=live.id)

    def _target(
        self,
        evm: Evm,
        source: Node,
        survey: Survey,
        efs: EfsFacts,
        addresses: AddressFacts | None,
        request: MigrationRequest,
    ) -> tuple[Placed, tuple[Check, ...]]:
        """Return the target, asked for or found, with its checks, of which none has failed unless it is a dry run."""
        name = evm.spec.name

        def checks(candidate: Candidate) -> tuple[Check, ...]:
            return preflight(
                Facts(
                    spec=evm.spec,
                    source=source.report,
                    target=candidate.node.report,
                    target_free_bytes=candidate.free_bytes,
                    volumes=survey.of(candidate.node.name),
                    subnet=self._network.subnet,
                    subnet_ipv6=self._network.ipv6.subnet if self._network.ipv6 else None,
                    volume_order=request.policy.volume_order,
                    efs=efs,
                    addresses=addresses,
                )
            )

        if request.target is None:
            unfit: list[Unfit] = [excluded(source.name, "it runs there"), not_there, cordoned, untrusted]
            placed = place(
                self._capacity.candidates(but=None), [*unfit, lambda c: _first_failure(checks(c))], what=name
            )
            return placed, checks(placed.candidate)
        node = self._tools.nodes.get(request.target, field="target")
        if node.name == source.name:
            hint = "name another node, or none: then placement picks"
            raise BadInput(f"EVM {name} already runs on {node.name}", field="target", hint=hint)
        self._tools.nodes.need_ready(node.name, field="target")
        placed = place_on(self._capacity.candidate(node), [cordoned], field="target")
        found = checks(placed.candidate)
        if (bad := failed(found)) and not request.dry_run:
            raise Refused(
                f"EVM {name} cannot move to {node.name}: {'; '.join(f'{c.name}: {c.message}' for c in bad)}",
                field="target",
                hint=f"see every check: emp migrate {name} --to {node.name} --dry-run",
                checks=[check.model_dump(mode="json") for check in found],
            )
        return placed, found

    def _plan(
        self,
        id: str,  # noqa: A002
        evm: Evm,
        placed: Placed,
        checks: tuple[Check, ...],
        request: MigrationRequest,
        epochs: tuple[int, int],
    ) -> Migration:
        return Migration(
            id=id,
            evm=evm.spec.name,
            source=evm.owner or "",
            target=placed.node.name,
            epoch_target=epochs[0],
            epoch_source=epochs[1],
            policy=request.policy,
            placement=placed.reason,
            checks=checks,
            dry_run=request.dry_run,
            created_at=time.time(),
        )

    async def _record(self, migration: Migration) -> None:
        def migrate(evm: Evm) -> Evm:
            if evm.migration is not None or evm.owner != migration.source:
                raise Conflict(f"EVM {migration.evm} has changed in the meantime", field="evm", hint="try again")
            update = {"migration": migration.id, "state": EvmState.MIGRATING, "reason": None}
            return evm.model_copy(update=update)

        def hold(upkeep: Upkeep) -> Upkeep:
            if upkeep.intent is not None:
                raise Conflict(f"{upkeep.intent.verb} of EVM {migration.evm} is under way", field="evm", hint="wait")
            return upkeep.model_copy(update={"holders": (migration.source, migration.target)})

        await self._book.write(
            new(self._book.migrations, migration.id, migration),
            change(self._book.evms, migration.evm, migrate),
            change(self._book.upkeep, migration.evm, hold),
        )

    async def abort(self, id: str, reason: str) -> Migration:  # noqa: A002
        """Go back, and answer with the decision: the migration ``aborted``, the EVM on its source.

        Asking again gets the same answer. Raises ``NotFound``, ``Conflict`` once it only goes forward or was over
        before, ``OutcomeUnknown`` where the source does not say within five seconds: it is asked on.
        """
        migration = self.get(id)
        supervision = self._open.get(id)
        if supervision is not None and not migration.committed and migration.outcome is None:
            migration = await supervision.abort(reason)
        if migration.outcome is Outcome.ABORTED and migration.abort_asked:
            return migration
        if migration.stage is Stage.CLOSED and not (migration.abort_asked and migration.outcome is Outcome.COMPLETED):
            raise Conflict(f"migration {id} is over: {migration.outcome}", field="migration")
        if migration.outcome is Outcome.ABORTED:
            return migration
        hint = f"the EVM goes to {migration.target}; from there it can be migrated back"
        raise Conflict(f"migration {id} is committed: it only goes forward", field="migration", hint=hint)

    async def end(self, id: str, reason: str) -> None:  # noqa: A002
        """Have it end, whichever way: aborted if that is still possible, waited for if it is committed.

        Raises ``OutcomeUnknown`` when it is not over within ``END_S``.
        """
        supervision = self._open.get(id)
        if supervision is None:
            return
        with contextlib.suppress(Conflict):
            await self.abort(id, reason)
        try:
            async with asyncio.timeout(END_S):
                await self._book.until(lambda: self._is_closed(id))
        except TimeoutError:
            state = "committed" if self.get(id).committed else "not over"
            hint = f"ask again once it is over: emp migration watch {id}"
            raise OutcomeUnknown(f"migration {id} is {state} yet", field="migration", hint=hint) from None

    async def give_up(self, id: str) -> None:  # noqa: A002
        """Close a migration that nothing but a cold restart can end. Raises ``Conflict`` if it will end by itself."""
        supervision = self._open.get(id)
        if supervision is None:
            return
        if not supervision.needs_recovery:
            raise Conflict(
                f"migration {id} is open, and neither end is lost",
                field="migration",
                hint=f"it ends by itself: emp migration watch {id}; or: emp migration abort {id}",
            )
        await supervision.give_up("given up for a cold restart")
        await self._book.until(lambda: self._is_closed(id))

    def _is_closed(self, id: str) -> bool:  # noqa: A002
        migration = self._book.migrations.find(id)
        return migration is None or migration.stage is Stage.CLOSED

    def has_landed(self, id: str) -> bool:  # noqa: A002
        """Whether the EVM runs on the target and its source is clear, so that only volumes or addresses may follow."""
        supervision = self._open.get(id)
        return supervision is not None and supervision.has_landed

    def is_open(self, id: str) -> bool:  # noqa: A002
        """Whether the migration is supervised now."""
        return id in self._open

    # -------------------------------------------------------------- supervising

    def _supervise(self, migration: Migration, *, resumed: bool) -> None:
        supervision = self._open[migration.id] = Supervision(self._tools, migration)
        self._tasks.start(migration.id, self._run(supervision, resumed))

    async def _run(self, supervision: Supervision, resumed: bool) -> None:
        try:
            await supervision.run(resumed=resumed)
        finally:
            self._open.pop(supervision.id, None)
        await self._prune()

    async def _prune(self) -> None:
        """Forget the oldest closed migrations beyond ``KEPT``."""
        held = sorted(self._book.migrations.held.values(), key=lambda record: record.kv.create_revision)
        closed = [record.name for record in held if record.model.stage is Stage.CLOSED]
        for over in closed[: max(0, len(closed) - KEPT)]:
            with contextlib.suppress(EmpError):
                await self._book.write(gone(self._book.migrations, over))


def _first_failure(checks: tuple[Check, ...]) -> str | None:
    return next((check.message for check in failed(checks)), None)
