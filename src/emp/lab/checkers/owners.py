"""Who owned an EVM when: the records of all nodes' journals, by the moment at which each was on disk.

The moments are those of the fault points round each record's fsync, so the lab must have its points on. What is being
written may be on disk already, so GIVEN ends the source's time when its writing begins. Authority is nowhere between
GIVEN and ACTIVATED. With WITHDRAWN a target swears that it made no use of it, ACTIVATED or not: it is the source's
again then, which may run before its own record is on disk (rule R10).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from emp.faults import Hit

_BEGINS = ("journal.own.after_fsync", "journal.activated.before_fsync")
_GOES_BACK = "journal.withdrawn.after_fsync"
_FENCED = "fenced"
_ENDS = tuple(f"journal.{record}.before_fsync" for record in ("given", "withdrawn", "retired", "stopped"))


@dataclass(frozen=True)
class Tenure:
    """``node`` owned the EVM in this time (CLOCK_MONOTONIC)."""

    node: str
    since_s: float
    until_s: float = math.inf


def tenures(
    first: str,
    hits: Mapping[str, Iterable[Hit]],
    *,
    since_s: float = -math.inf,
    fenced: Sequence[tuple[float, str]] = (),
) -> list[Tenure]:
    """Return who owned the EVM from ``since_s`` on, when ``first`` did; ``hits``: node -> what its agent reached.

    ``fenced``: when a fence had proved a node off.
    """
    reached = [(hit.at_s, node, hit.point) for node, all_of_it in hits.items() for hit in all_of_it]
    reached += [(at_s, node, _FENCED) for at_s, node in fenced]
    off = {node for _, node in fenced}
    found = [Tenure(first, since_s)]
    for at_s, node, point in sorted(moment for moment in reached if moment[0] >= since_s):
        if point in _BEGINS and not (found[-1].node == node and found[-1].until_s == math.inf):
            found.append(Tenure(node, at_s))
        elif point in (*_ENDS, _FENCED) and found[-1].node == node and found[-1].until_s == math.inf:
            found[-1] = Tenure(node, found[-1].since_s, at_s)
        elif point == _GOES_BACK and found[-1].until_s < math.inf:
            others = [earlier.node for earlier in found[::-1] if earlier.node != node]
            found += [Tenure(other, at_s) for other in others[:1] if other not in off]
    return found


def violations(found: Sequence[Tenure]) -> list[str]:
    """Return the moments at which two nodes owned the EVM."""
    return [
        f"{later.node} owned the EVM while {earlier.node} did"
        for at, earlier in enumerate(found)
        for later in found[at + 1 :]
        if later.since_s < earlier.until_s
    ]
