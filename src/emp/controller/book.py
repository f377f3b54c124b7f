"""The pool's records: in memory for reading, written through to the store, and whoever waits for a change is told.

A ``Table`` mirrors the records of one type. Every write is a transaction over one or more records that holds only if
they are still what this process believes; if not, they are read again and the change is computed anew.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from pydantic import Field

from emp.controller.addresses import Claim
from emp.model.base import Model
from emp.model.errors import AlreadyExists, Conflict, NotFound
from emp.model.evm import Evm
from emp.model.migration import Migration
from emp.model.names import Name
from emp.model.node import Node
from emp.model.volume import Volume, VolumeType
from emp.store.base import Compare, Delete, Get, KeyValue, Op, Store, absent, unchanged
from emp.store.records import Counter, Record, Records

M = TypeVar("M", bound=Model)

PUBLIC = ("/nodes/", "/evms/", "/migrations/", "/volumes/")
"""prefixes that people may watch"""
_ATTEMPTS = 50
_EPOCHS = "/counters/epoch"


class Verb(StrEnum):
    CREATE = "create"
    START = "start"
    STOP = "stop"
    DELETE = "delete"
    ATTACH = "attach"
    """of a volume, as the next two"""
    DETACH = "detach"
    RESIZE = "resize"


class VolumeWish(Model):
    """A volume of a new EVM: one that exists (``id``), or one to make. ``id`` is filled in once it is made."""

    id: str | None = None
    type: VolumeType | None = None
    size_bytes: int | None = None
    image: Name | None = None
    """what it is made from; None: zeros"""


class Intent(Model):
    """What is being done to an EVM. On disk before it is begun, gone when it is done: a restart carries it on."""

    verb: Verb
    epoch: int = 0
    """of the ownership to come (create, start); of the volume's attachment (attach, resize)"""
    retire_epoch: int = 0
    """of the retirement at every holder that comes first (start, delete); lower than ``epoch``"""
    node: Name | None = None
    grace_s: float = 0.0
    wishes: tuple[VolumeWish, ...] = ()
    volume: str | None = None
    slot: int = 0
    size_bytes: int = 0
    in_use: bool = False
    """detach: also if the guest is using it"""


class Upkeep(Model):
    """What the controller must remember of an EVM and nobody else needs to see."""

    intent: Intent | None = None
    own_volumes: tuple[str, ...] = ()
    """made with the EVM, deleted with it"""
    holders: tuple[Name, ...] = ()
    """nodes that could hold authority over it: a cold start elsewhere retires each of them first (rule R8)"""
    restarts: int = Field(default=0, ge=0)
    """in a row, by the restart policy"""

    def held_by(self, node: str | None) -> Upkeep:
        """Return it with ``node`` among the holders."""
        if node is None or node in self.holders:
            return self
        return self.model_copy(update={"holders": (*self.holders, node)})


class Table(Generic[M]):
    """The records of one type, as this process knows them."""

    def __init__(self, store: Store, prefix: str, model: type[M], noun: str) -> None:
        self.records = Records(store, prefix, model, noun=noun)
        self.noun = noun
        self.held: dict[str, Record[M]] = {}

    async def load(self) -> None:
        self.held = {record.name: record for record in (await self.records.list()).records}

    def find(self, name: str) -> M | None:
        record = self.held.get(name)
        return record.model if record else None

    def get(self, name: str, *, field: str | None = None) -> M:
        """Return the record. Raises ``NotFound`` naming ``field``."""
        record = self.held.get(name)
        if record is None:
            shown = name if len(name) <= 63 else name[:60] + "..."
            raise NotFound(f"no {self.noun} is named {shown!r}", field=field or self.noun)
        return record.model

    def revision_of(self, name: str) -> int:
        """Return the revision of the record's last change, 0 when there is none."""
        record = self.held.get(name)
        return record.kv.mod_revision if record else 0

    def all(self) -> list[M]:
        """Return every record, in order of names."""
        return [self.held[name].model for name in sorted(self.held)]

    def note(self, name: str, record: Record[M] | None) -> None:
        """Take over what the store has; an older state than the one held is left out."""
        held = self.held.get(name)
        if record is None:
            self.held.pop(name, None)
        elif held is None or held.kv.mod_revision <= record.kv.mod_revision:
            self.held[name] = record


@dataclass(frozen=True)
class Edit(Generic[M]):
    """One record's part in a transaction. ``change`` gets the model, or None where there is none; None deletes.

    It may be called several times and may raise to give the whole transaction up.
    """

    table: Table[M]
    name: str
    change: Callable[[M | None], M | None]


def put(table: Table[M], name: str, model: M) -> Edit[M]:
    return Edit(table, name, lambda _: model)


def new(table: Table[M], name: str, model: M, *, field: str = "name") -> Edit[M]:
    """Return the edit that makes a record, or raises ``AlreadyExists``."""

    def change(old: M | None) -> M:
        if old is not None:
            raise AlreadyExists(f"{table.noun} {name} exists already", field=field, hint="choose another name")
        return model

    return Edit(table, name, change)


def gone(table: Table[M], name: str) -> Edit[M]:
    return Edit(table, name, lambda _: None)


def change(table: Table[M], name: str, update: Callable[[M], M]) -> Edit[M]:
    """Return the edit of a record that must be there: ``NotFound`` otherwise."""

    def apply(old: M | None) -> M:
        return update(old if old is not None else table.get(name))

    return Edit(table, name, apply)


class Book:
    """All tables of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.revision = 0
        """the newest that this process has seen"""
        self.nodes = Table(store, "/nodes/", Node, "node")
        self.evms = Table(store, "/evms/", Evm, "evm")
        self.migrations = Table(store, "/migrations/", Migration, "migration")
        self.volumes = Table(store, "/volumes/", Volume, "volume")
        self.shared = Table(store, "/shared/", Volume, "shared volume")
        """the own records of the driver for storage that every node reaches"""
        self.upkeep = Table(store, "/upkeep/", Upkeep, "upkeep record")
        self.claims = Table(store, "/addresses/", Claim, "address")
        self.epochs = Counter(store, _EPOCHS)
        """One source for the whole pool, so that a volume's fence still tells old from new when another EVM, or a later
        one of the same name, gets the volume."""
        self._waiting: set[asyncio.Event] = set()

    async def load(self) -> None:
        for table in self.tables:
            await table.load()
        self.revision = (await self.store.range("/nodes/", limit=1)).revision

    @property
    def tables(self) -> tuple[Table[Any], ...]:
        return self.nodes, self.evms, self.migrations, self.volumes, self.shared, self.upkeep, self.claims

    async def write(self, *edits: Edit[Any]) -> None:
        """Carry out all edits in one transaction, or raise and do none. Edits that change nothing cost nothing."""
        for _ in range(_ATTEMPTS):
            if await self._try(edits):
                return
        raise Conflict("the records changed faster than they could be written", hint="try again")

    async def update(self, table: Table[M], name: str, update: Callable[[M], M]) -> M:
        """Change one record. Raises ``NotFound``."""
        await self.write(change(table, name, update))
        return table.get(name)

    async def _try(self, edits: Sequence[Edit[Any]]) -> bool:
        compares: list[Compare] = []
        ops: list[Op] = []
        after: list[tuple[Edit[Any], Any]] = []
        for edit in edits:
            held = edit.table.held.get(edit.name)
            old = held.model if held else None
            model = edit.change(old)
            key = edit.table.records.key(edit.name)
            compares.append(unchanged(held.kv) if held else absent(key))
            if model != old:
                ops.append(edit.table.records.put(edit.name, model) if model is not None else Delete(key))
                after.append((edit, model))
        if not ops:
            return True
        keys = [edit.table.records.key(edit.name) for edit in edits]
        result = await self.store.txn(compares, ops, [Get(key) for key in keys])
        self.revision = max(self.revision, result.revision)
        if not result.succeeded:
            await self._reread(edits)
            return False
        for edit, model in after:
            edit.table.note(edit.name, _written(edit, model, result.revision))
        self._tell()
        return True

    async def _reread(self, edits: Sequence[Edit[Any]]) -> None:
        for edit in edits:
            edit.table.note(edit.name, await edit.table.records.find(edit.name))

    # -------------------------------------------------------------- waiting

    def _tell(self) -> None:
        for event in self._waiting:
            event.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return once ``condition`` holds; it is looked at after every change of a record."""
        async with contextlib.aclosing(self.changes()) as changes:
            async for _ in changes:
                if condition():
                    return

    async def changes(self) -> AsyncGenerator[None]:
        """Yield now, and again after changes of records; several in a row may come as one."""
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            while True:
                yield
                await event.wait()
                event.clear()
        finally:
            self._waiting.discard(event)


def _written(edit: Edit[Any], model: Any, revision: int) -> Record[Any] | None:
    if model is None:
        return None
    held = edit.table.held.get(edit.name)
    key = edit.table.records.key(edit.name)
    if held is None:
        return Record(edit.name, model, KeyValue(key, b"", revision, revision, 1))
    return Record(edit.name, model, KeyValue(key, b"", held.kv.create_revision, revision, held.kv.version + 1))
