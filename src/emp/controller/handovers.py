"""What the records of an EVM's volumes say of one migration, and which of them are on their way, for who looks on.

A record has its volume's last handover: written when it begins and when something is to be told, for good together with
the migration's end. In between a write that fails is only logged: nothing is decided by a handover.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from emp.controller.book import Book, Edit
from emp.controller.volumes import Volumes
from emp.model.errors import EmpError
from emp.model.migration import Migration, MoveStep, Outcome, VolumeMove, VolumeOrder, VolumeStep
from emp.model.volume import Handover, MoveOrder, Volume, VolumeType

log = logging.getLogger(__name__)

Show = Callable[[tuple[VolumeStep, ...]], None]


def order_of(kind: VolumeType, order: VolumeOrder) -> MoveOrder:
    """Return how a volume of that type goes over under the policy ``order``."""
    if kind is VolumeType.SHARED:
        return MoveOrder.SHARED
    if kind.multi_attach:
        return MoveOrder.MULTI_ATTACH
    return MoveOrder.CLASSIC if order is VolumeOrder.CLASSIC else MoveOrder.RELAY


class Handovers:
    """Of the volumes of one migration. ``show`` is given those that are on their way, whenever one goes a step on."""

    def __init__(self, book: Book, volumes: Volumes, migration: Migration, show: Show) -> None:
        self._book = book
        self._volumes = volumes
        self._migration = migration
        self._show = show
        self._begun: set[str] = set()
        self._steps: dict[str, VolumeStep] = {}
        self._learnt: dict[str, dict[str, Any]] = {}
        """volume -> fields of its handover"""
        self._held_s: dict[str, float] = {}
        """volume -> monotonic time since when its I/O waits"""

    # -------------------------------------------------------------- what happens

    async def begin(self, volumes: Sequence[str]) -> None:
        """Write down that they go over. Again, after a restart, leaves what is written of this migration."""
        self._begun.update(volumes)
        await self._write(volumes)

    @contextlib.asynccontextmanager
    async def timed(self, volume: str, field: str) -> AsyncIterator[None]:
        """Note in ``field`` of its handover how many milliseconds this took."""
        began_s = time.monotonic()
        yield
        self._learn(volume, **{field: round((time.monotonic() - began_s) * 1000, 1)})

    async def went_over(self, volumes: Sequence[str]) -> None:
        for volume in volumes:
            self._learn(volume, ended_at=time.time())
        await self._write(volumes)

    def at(self, volume: str, step: MoveStep | None) -> None:
        """Take where a volume is that one node alone can have; None: its move is over. See ``Moves.at``."""
        self._note_stall(volume, step)
        record = self._book.volumes.find(volume)
        if step is None or record is None:
            self._steps.pop(volume, None)
        else:
            held_since = time.time() - (time.monotonic() - self._held_s[volume]) if volume in self._held_s else None
            self._steps[volume] = VolumeStep(
                volume=volume,
                type=record.type,
                step=step,
                held_since=held_since,
                expected_ms=self._volumes.expected_ms().get(record.type),
            )
        self._show(tuple(self._steps[one] for one in sorted(self._steps)))

    def _note_stall(self, volume: str, step: MoveStep | None) -> None:
        if step is not None and step is not MoveStep.RELAYED:
            self._held_s.setdefault(volume, time.monotonic())
        elif (since_s := self._held_s.pop(volume, None)) is not None:
            stalls_ms = (round((time.monotonic() - since_s) * 1000, 1), self._learnt.get(volume, {}).get("io_stall_ms"))
            self._learn(volume, io_stall_ms=max(stall for stall in stalls_ms if stall is not None))
        if step is MoveStep.RELAYED:
            self._learnt.setdefault(volume, {}).setdefault("relayed_since", time.time())

    async def note(self, alarms: dict[str, str], made: dict[str, VolumeMove], tries: dict[str, int]) -> None:
        """Write down what has become of moves (``Moves``)."""
        for volume, count in tries.items():
            self._learn(volume, tries=count, alarm=alarms.get(volume))
        for volume, move in made.items():
            if "ended_at" not in self._learnt[volume]:
                self._learn(volume, **_figures(move))
        await self._write(tries)

    def edits(self, volumes: Sequence[str], outcome: Outcome, at_s: float) -> list[Edit[Volume]]:
        """Return the edits that end what is under way; ``at_s`` is the wall clock."""
        return [Edit(self._book.volumes, volume, self._ending(outcome, at_s)) for volume in volumes]

    # -------------------------------------------------------------- the records

    def _learn(self, volume: str, **fields: Any) -> None:
        self._learnt.setdefault(volume, {}).update(fields)

    def _now(self, record: Volume) -> Handover:
        """Return the record's handover in this migration, as far as it is known."""
        live, known = self._migration, record.handover
        if known is None or known.migration != live.id:
            order = order_of(record.type, live.policy.volume_order)
            known = Handover(
                migration=live.id, order=order, source=live.source, target=live.target, began_at=time.time()
            )
        elif known.ended_at is not None:
            return known
        learnt = self._learnt.get(record.id, {})
        if known.relayed_since is not None:  # of a controller that was killed: it is since then
            learnt = learnt | {"relayed_since": known.relayed_since}
        now = known.model_copy(update=learnt)
        if now.relayed_since is not None and now.ended_at is not None and now.relayed_s is None:
            now = now.model_copy(update={"relayed_s": round(max(0.0, now.ended_at - now.relayed_since), 3)})
        return now

    async def _write(self, volumes: Iterable[str]) -> None:
        def update(record: Volume | None) -> Volume | None:
            return record.model_copy(update={"handover": self._now(record)}) if record else None

        try:
            await self._book.write(*(Edit(self._book.volumes, volume, update) for volume in volumes))
        except EmpError as error:
            log.error("migration %s: the records of its volumes could not be written: %s", self._migration.id, error)

    def _ending(self, outcome: Outcome, at_s: float) -> Callable[[Volume | None], Volume | None]:
        def update(record: Volume | None) -> Volume | None:
            written = record.handover if record else None
            is_ours = written is not None and written.migration == self._migration.id
            if record is None or not (is_ours or record.id in self._begun):
                return record
            now = self._now(record)
            if now.ended_at is None:  # not told of, or not happened
                held = {attachment.node for attachment in record.attachments}
                is_over = outcome is Outcome.COMPLETED and (now.order is MoveOrder.SHARED or now.target in held)
                now = now.model_copy(update={"ended_at": at_s, "broken_off": not is_over})
            over = now.model_copy(update={"alarm": now.alarm if now.broken_off else None})
            return record.model_copy(update={"handover": over})

        return update


def _figures(move: VolumeMove) -> dict[str, Any]:
    steps = {"detach_ms": move.detach_s, "attach_ms": move.attach_s}
    figures: dict[str, Any] = {name: None if took_s is None else took_s * 1000 for name, took_s in steps.items()}
    return figures | {"ended_at": time.time(), "relayed_bytes": move.read_bytes + move.written_bytes}
