"""What a record store must do: the contract that every driver keeps and that callers may lean on.

The shape is etcd's, so that SQLite serves one controller without set-up and etcd serves several, and nothing above
this module can tell which it is (``tests/contract/test_store.py`` runs on each driver).

**Revisions.** A store has one revision, an integer that grows by exactly one with each transaction that changes
something, and with nothing else: no revision is skipped, none is used twice, over restarts too. A transaction that
only reads, whose deletes find nothing, or that takes an empty branch, leaves the revision alone. A put always
counts as a change, even of an equal value.

**Keys and prefixes.** A key is printable ASCII such as ``/evms/web``; it begins with ``/`` and does not end with it.
Where a ``prefix`` is asked for, ``/evms/`` (ending in ``/``) selects every key below it, and ``/evms/web`` selects
that very key and not ``/evms/web2``. Keys are ordered by their characters. Values are bytes, opaque to the store.
The limits are in ``emp.store.rules`` and are etcd's defaults or less.

**Transactions** are atomic, isolated (one after another) and durable: when ``txn`` returns, its changes survive the
death of the process and of the machine. A caller that is cancelled while it waits cannot know whether the transaction
took place, but it took place wholly or not at all. ``StoreUnavailable`` means that nothing was changed;
``OutcomeUnknown`` means that it may or may not have been: read, then decide.

**Watches** give each change after a revision once, in order, with nothing left out: first from the history, then as it
happens. The history is kept with the records, so a watch goes on over a restart of either side. List, then watch from
the list's revision, and no change is missed. A slow reader costs nothing but history. An event whose ``last`` is true
ends its revision: resume only from the revision of such an event, else the rest of that transaction is lost.

**Leases.** Keys put with a lease vanish together, in one revision, once the lease was not kept alive for its TTL, or at
once when it is revoked. A TTL is a promise of "not earlier": time is monotonic, and time in which the store itself
did not run does not count against the holder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Literal, Protocol, Self

from emp.model.errors import Conflict, NotFound, Refused, StoreUnavailable


class Compacted(Conflict):
    """The history asked for is gone. List again, and watch from there; ``details["oldest"]`` still can be watched."""

    code = "compacted"
    http_status = 410

    def __init__(self, message: str, *, oldest: int, field: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, field=field, hint=hint, oldest=oldest)
        self.oldest = oldest


class FutureRevision(Conflict):
    """A revision this store never had: the caller remembers another store, or one restored from a backup since."""

    code = "future_revision"


class LeaseGone(NotFound):
    """The lease has expired, was revoked or never was; the keys that it held are gone."""

    code = "lease_gone"


class StoreClosed(StoreUnavailable):
    """The store was used after ``close``."""

    code = "store_closed"


class StoreCorrupt(StoreUnavailable):
    """The database cannot be trusted; only a restore from a backup helps."""

    code = "store_corrupt"


class StoreLocked(Refused):
    """Another process has the database open."""

    code = "store_locked"


class StoreMismatch(Refused):
    """The file is a newer schema than this program knows, or no EMP store at all."""

    code = "store_mismatch"


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as it stands. ``version`` counts its puts since it was created, from 1; ``lease`` is 0 where there is none.

    In a delete event: no value, ``mod_revision`` is the deletion's, the other numbers are 0.
    """

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Range:
    """Keys in order, as they all stood at ``revision``; ``more`` says that the limit cut the list."""

    kvs: tuple[KeyValue, ...]
    revision: int
    more: bool = False


Target = Literal["value", "version", "create_revision", "mod_revision"]
Relation = Literal["=", "!=", "<", ">"]


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition on one key. An absent key has version and revisions 0, and no comparison of its value holds."""

    key: str
    target: Target
    relation: Relation
    operand: int | bytes


def absent(key: str) -> Compare:
    """Return the condition that ``key`` does not exist."""
    return Compare(key, "create_revision", "=", 0)


def present(key: str) -> Compare:
    """Return the condition that ``key`` exists."""
    return Compare(key, "create_revision", ">", 0)


def unchanged(kv: KeyValue) -> Compare:
    """Return the condition that ``kv`` is still what it was when it was read."""
    return Compare(kv.key, "mod_revision", "=", kv.mod_revision)


def value_is(key: str, value: bytes) -> Compare:
    """Return the condition that ``key`` exists with exactly this value."""
    return Compare(key, "value", "=", value)


@dataclass(frozen=True, slots=True)
class Put:
    """Set ``key``; it belongs to ``lease`` from now on, or to none (0), whatever held it before."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove ``key``; nothing happens where it is absent."""

    key: str


@dataclass(frozen=True, slots=True)
class Get:
    """Read ``key`` inside the transaction; the answer is the next one in ``TxnResult.found``."""

    key: str


Op = Put | Delete | Get


@dataclass(frozen=True, slots=True)
class TxnResult:
    """``succeeded``: all compares held. ``revision``: the store's, after it. ``found``: one answer per ``Get`` done."""

    succeeded: bool
    revision: int
    found: tuple[KeyValue | None, ...] = ()


class EventKind(StrEnum):
    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one key; ``last`` marks the last one that this watch sees of its revision."""

    kind: EventKind
    kv: KeyValue
    revision: int
    last: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """``ttl_s`` in seconds is what was granted: at least what was asked for."""

    id: int
    ttl_s: float


class Watch(Protocol):
    """An async iterator of events, for one reader. Usable in ``async with``; a cancelled ``anext`` loses no event.

    Iteration ends when the watch or the store is closed, and raises ``Compacted`` or ``FutureRevision`` when the
    history to read is not there. Undelivered events are dropped at the end: resume from what was handled.
    """

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None:
        """End the watch, also for a reader that is waiting now."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Store(Protocol):
    """The store.

    Every method raises ``BadInput`` when its arguments break a rule, and ``StoreUnavailable`` when the store cannot be
    reached, read or written, or is closed.
    """

    async def get(self, key: str) -> KeyValue | None:
        """Return the key as it stands now, or None."""

    async def range(self, prefix: str, *, limit: int | None = None, after: str | None = None) -> Range:
        """Return what ``prefix`` selects, in order of keys: at most ``limit`` of them, from beyond the key ``after``.

        Pages are read at different revisions; watch from the revision of the first page to miss nothing.
        """

    async def txn(self, compares: Sequence[Compare], then: Sequence[Op], otherwise: Sequence[Op] = ()) -> TxnResult:
        """Do ``then`` if every compare holds, else ``otherwise``, as one step.

        Each branch changes a key at most once. Raises ``LeaseGone`` when a put names a lease that is not there,
        ``OutcomeUnknown`` when the store failed while it was committing.
        """

    def watch(self, prefix: str, from_revision: int) -> Watch:
        """Return the changes of what ``prefix`` selects in every revision **after** ``from_revision``."""

    async def grant(self, ttl_s: float) -> Lease:
        """Return a new lease, running from now."""

    async def keep_alive(self, lease_id: int) -> None:
        """Start the lease's TTL anew. Raises ``LeaseGone``."""

    async def revoke(self, lease_id: int) -> None:
        """End the lease and delete its keys. Raises ``LeaseGone``."""

    async def compact(self, revision: int) -> None:
        """Forget the history up to and with ``revision``; records stay. Again, or with an older one, does nothing.

        A watch that had not yet got so far ends in ``Compacted``. Raises ``FutureRevision``.
        """

    async def close(self) -> None:
        """Finish what was begun, end every watch, and let go of the database. Closing twice is allowed."""
