"""What an agent does at its start with an EVM that its journal, or a process on its node, speaks of (rules R1, R5, R9).

A machine is killed only if a record says that it has lost; nothing is booted; and one that stands is started only by
the owner, only where it waits for nothing but its owner's ``cont``.
"""

from __future__ import annotations

from enum import StrEnum

from emp.migration.records import RUNNABLE, SETTLED, Record, RecordKind


class Sweep(StrEnum):
    UNKNOWN = "unknown"
    """no record: touch nothing, report"""
    CLEAR = "clear"
    """whatever is here has lost: kill it"""
    OWNED = "owned"
    """the EVM lives here: keep its machine, or note that it is gone"""
    LEAVING = "leaving"
    """a migration away is not over: its role goes on"""
    ARRIVING = "arriving"
    """a migration hither is not over: its role goes on"""


def sweep(last: Record | None) -> Sweep:
    """Return what the last record of an EVM says about its machine here."""
    if last is None:
        return Sweep.UNKNOWN
    if last.kind in SETTLED:
        return Sweep.CLEAR
    if last.kind in RUNNABLE:
        return Sweep.OWNED
    return Sweep.ARRIVING if last.kind is RecordKind.PREPARED else Sweep.LEAVING


def waits_for_its_owner(last: Record, *, loaded: bool, completed: bool) -> bool:
    """Return whether a machine that does not run lacks only ``cont``: the record was written, and then the agent died.

    ``loaded``: it came by a stream and has stood paused since. ``completed``: it has sent everything, and stands.
    One that was stopped by anything else has run, and is not touched (rule R4).
    """
    return loaded if last.kind is RecordKind.ACTIVATED else completed and last.kind is RecordKind.OWN
