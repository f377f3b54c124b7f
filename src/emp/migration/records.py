"""What a node writes into its journal about an EVM, and what the last record allows.

Authority over an EVM travels with it: the node whose journal holds it may run it. Each record is on disk (fsync) before
it is acted on. **Only the last record of an EVM allows an act**; older ones only answer questions::

    source   OWN(e) -> HANDOVER(e, m, T, p) -> GIVEN(e_t, m, T, p) -> DONE(m)
                                |                    |
                                +-> OWN(e_s) abort   +-> OWN(e_s) rescue, only with T's WITHDRAWN(m, p)
    target   PREPARED(e_t, m, S, p) -> ACTIVATED(e_t, m, p)      (from then on as OWN(e_t))
                                |
                                +-> WITHDRAWN(m, p)
    any      RETIRED(k)  fenced for a cold restart      STOPPED(e)  the guest has shut down by itself
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class RecordKind(StrEnum):
    OWN = "own"
    HANDOVER = "handover"
    GIVEN = "given"
    DONE = "done"
    PREPARED = "prepared"
    ACTIVATED = "activated"
    WITHDRAWN = "withdrawn"
    RETIRED = "retired"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Record:
    """One line of a node's journal. ``epoch`` is the one that the record is about (see the module's diagram)."""

    kind: RecordKind
    evm: str
    epoch: int
    migration: str | None = None
    peer: str | None = None
    """the other node"""
    nonce: str | None = None
    """p: fresh for each PREPARED, quoted by HANDOVER, GIVEN, GO and WITHDRAWN"""
    epoch_target: int | None = None
    """HANDOVER: e_t"""
    epoch_back: int | None = None
    """HANDOVER, GIVEN: e_s, the epoch of the way back"""
    pid: int | None = None
    start_ticks: int | None = None
    """of the machine that OWN, PREPARED and ACTIVATED are about"""


OWNING = frozenset({RecordKind.OWN, RecordKind.HANDOVER, RecordKind.ACTIVATED})
"""The EVM's authority is here."""
RUNNABLE = frozenset({RecordKind.OWN, RecordKind.ACTIVATED})
"""``cont`` may be sent (rule R1)."""
SETTLED = frozenset({RecordKind.DONE, RecordKind.WITHDRAWN, RecordKind.RETIRED, RecordKind.STOPPED})
"""No machine of this EVM has any business here (rule R5: it may be killed)."""


@dataclass(frozen=True)
class Ledger:
    """All that a journal says of one EVM."""

    records: tuple[Record, ...] = ()

    @property
    def last(self) -> Record | None:
        return self.records[-1] if self.records else None

    @property
    def highest_epoch(self) -> int:
        """Orders below this are refused as stale."""
        epochs = (max(r.epoch, r.epoch_back or 0 if r.kind is RecordKind.OWN else 0) for r in self.records)
        return max(epochs, default=0)

    def add(self, record: Record) -> Ledger:
        return Ledger((*self.records, record))

    def end_of(self, migration: str) -> Record | None:
        """The last record that names ``migration``: what a late question about it is answered from."""
        named = [r for r in self.records if r.migration == migration]
        return named[-1] if named else None

    def compacted(self) -> Ledger:
        """Drop what can no longer be asked: keep the last record, each migration's last word, the highest epoch."""
        ends = {r.migration: r for r in self.records if r.migration}
        keep = {id(r) for r in ends.values()} | {id(self.records[-1])} if self.records else set()
        if self.records:
            keep.add(id(max(self.records, key=lambda r: r.epoch)))
        return Ledger(tuple(r for r in self.records if id(r) in keep))


def ledgers(records: Iterable[Record]) -> dict[str, Ledger]:
    """Replay a journal: EVM name -> what it says of it."""
    found: dict[str, Ledger] = {}
    for record in records:
        found[record.evm] = found.get(record.evm, Ledger()).add(record)
    return found
