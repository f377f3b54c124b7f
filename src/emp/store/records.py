"""Pydantic models as records under a prefix, and counters: the store as the controller's code uses it.

A write that spans records is a plain transaction of the parts named here::

    await store.txn([unchanged(evm.kv), absent(migrations.key(id))],
                    [evms.put("web", moved, evm.kv.lease), migrations.put(id, migration)])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

from pydantic import BaseModel, ValidationError

from emp.model.errors import AlreadyExists, BadInput, Conflict, Internal, NotFound
from emp.store.base import (
    Delete,
    Event,
    EventKind,
    Get,
    KeyValue,
    Put,
    Store,
    Watch,
    absent,
    unchanged,
)
from emp.store.rules import check_key

M = TypeVar("M", bound=BaseModel)
_ATTEMPTS = 1000  # someone gets on with each round, so only a broken store comes near it


class BadRecord(Internal):
    """What the store holds under a key is not what this program expects there."""

    code = "bad_record"


@dataclass(frozen=True, slots=True)
class Record(Generic[M]):
    """A model as it is stored; ``kv`` has its key and revisions."""

    name: str
    model: M
    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Listing(Generic[M]):
    """Records in order of their names, and the store's revision at which they all stood: watch from there."""

    records: tuple[Record[M], ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Change(Generic[M]):
    """A record put, or deleted (``record`` is None). As with events, resume only after one with ``last``."""

    name: str
    record: Record[M] | None
    revision: int
    last: bool


class Records(Generic[M]):
    """The models of one type below ``prefix`` (``/evms/``); a name is what follows it. ``noun`` is for messages."""

    def __init__(self, store: Store, prefix: str, model: type[M], *, noun: str | None = None) -> None:
        if not prefix.endswith("/"):
            raise BadInput(f"{prefix!r} is not a prefix", field="prefix", hint="end it with '/'")
        self.store = store
        self.prefix = prefix
        self.model = model
        self.noun = noun or model.__name__.lower()

    def key(self, name: str) -> str:
        """Return the key of ``name``. Raises ``BadInput``."""
        return check_key(self.prefix + name, field="name")

    def put(self, name: str, model: M, lease: int = 0) -> Put:
        """Return the operation that stores ``model``, for a transaction of the caller's own."""
        return Put(self.key(name), model.model_dump_json().encode(), lease)

    async def find(self, name: str) -> Record[M] | None:
        kv = await self.store.get(self.key(name))
        return self._record(kv) if kv else None

    async def get(self, name: str) -> Record[M]:
        """Return the record. Raises ``NotFound``."""
        record = await self.find(name)
        if record is None:
            raise self._not_found(name)
        return record

    async def list(self) -> Listing[M]:
        found = await self.store.range(self.prefix)
        return Listing(tuple(map(self._record, found.kvs)), found.revision)

    async def create(self, name: str, model: M, *, lease: int = 0) -> Record[M]:
        """Store a new record. Raises ``AlreadyExists``."""
        put = self.put(name, model, lease)
        result = await self.store.txn([absent(put.key)], [put])
        if not result.succeeded:
            raise AlreadyExists(f"{self.noun} {name} exists already", field="name")
        return Record(name, model, KeyValue(put.key, put.value, result.revision, result.revision, 1, lease))

    async def update(self, name: str, change: Callable[[M], M]) -> Record[M]:
        """Store ``change(model)``, computed anew whenever someone else was faster, so it may be called several times.

        Nothing is written where it returns an equal model, or raises. The record keeps its lease. Raises ``NotFound``.
        """
        key = self.key(name)
        kv = await self.store.get(key)
        for _ in range(_ATTEMPTS):
            if kv is None:
                raise self._not_found(name)
            old = self._record(kv)
            new = change(old.model)
            if new == old.model:
                return old
            put = self.put(name, new, kv.lease)
            result = await self.store.txn([unchanged(kv)], [put], [Get(key)])
            if result.succeeded:
                written = KeyValue(key, put.value, kv.create_revision, result.revision, kv.version + 1, kv.lease)
                return Record(name, new, written)
            (kv,) = result.found
        raise Conflict(f"{self.noun} {name} changed {_ATTEMPTS} times while it was being changed", hint="try again")

    async def delete(self, name: str, *, seen: Record[M] | None = None) -> None:
        """Delete the record, if given only while it is still as it was ``seen``. Raises ``NotFound``, ``Conflict``."""
        key = self.key(name)
        compares = [unchanged(seen.kv)] if seen else []
        result = await self.store.txn(compares, [Get(key), Delete(key)], [Get(key)])
        if result.found == (None,):
            raise self._not_found(name)
        if not result.succeeded:
            raise Conflict(f"{self.noun} {name} was changed in the meantime", field="name", hint="look at it again")

    def watch(self, from_revision: int) -> RecordWatch[M]:
        """Return every change after ``from_revision``; see ``Store.watch``."""
        return RecordWatch(self.store.watch(self.prefix, from_revision), self._change)

    def _change(self, event: Event) -> Change[M]:
        record = self._record(event.kv) if event.kind is EventKind.PUT else None
        return Change(event.kv.key.removeprefix(self.prefix), record, event.revision, event.last)

    def _record(self, kv: KeyValue) -> Record[M]:
        try:
            model = self.model.model_validate_json(kv.value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or None
            raise BadRecord(
                f"{kv.key} is not a valid {self.noun}: {first['msg']}",
                field=where,
                hint="was it written by another version of emp?",
            ) from error
        return Record(kv.key.removeprefix(self.prefix), model, kv)

    def _not_found(self, name: str) -> NotFound:
        return NotFound(f"no {self.noun} is named {name}", field="name")


class RecordWatch(Generic[M]):
    """An async iterator of ``Change``, usable in ``async with``; it ends and fails as ``base.Watch`` does."""

    def __init__(self, watch: Watch, decode: Callable[[Event], Change[M]]) -> None:
        self._watch = watch
        self._decode = decode

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change[M]:
        return self._decode(await anext(self._watch))

    async def aclose(self) -> None:
        await self._watch.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._watch.aclose()


class Counter:
    """A source of integers that only grow: each is issued by a transaction, never computed, and none is issued twice.

    A number whose answer was lost is spent. The key must never be deleted: epochs of an EVM that is gone stay used.
    """

    def __init__(self, store: Store, key: str) -> None:
        self.store = store
        self.key = check_key(key)

    async def last(self) -> int:
        """Return the last number issued, 0 before the first."""
        return self._number(await self.store.get(self.key))

    async def issue(self, *, above: int = 0) -> int:
        """Return a new number, greater than every earlier one and than ``above``.

        ``above`` is the greatest number known elsewhere: after a restore from a backup the nodes know more.
        """
        kv = await self.store.get(self.key)
        for _ in range(_ATTEMPTS):
            number = max(self._number(kv), above) + 1
            compare = unchanged(kv) if kv else absent(self.key)
            result = await self.store.txn([compare], [Put(self.key, b"%d" % number)], [Get(self.key)])
            if result.succeeded:
                return number
            (kv,) = result.found
        raise Conflict(f"{self.key} was contended {_ATTEMPTS} times", hint="try again")

    def _number(self, kv: KeyValue | None) -> int:
        if kv is None:
            return 0
        if not kv.value.isdigit():
            raise BadRecord(f"{self.key} is not a counter: {kv.value[:40]!r}")
        return int(kv.value)
