"""No double run, by QEMU's own word: the RESUME and STOP events of all machines of one EVM, as the agents heard them.

Each event is a fault point of its node, so the lab must have its points on. An agent that is away hears nothing; the
scheduler's account (``vcpus``) does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from emp.faults import Hit

_RESUME, _STOP = "qmp-resume", "qmp-stop"


def violations(first: str, hits: Mapping[str, Iterable[Hit]], ended: Iterable[tuple[float, str]] = ()) -> list[str]:
    """Return each RESUME on one node while the machine on another ran; ``first``: where it runs at the beginning.

    ``ended``: (moment, node) at which a QEMU was gone, which no event tells of.
    """
    moments = [(hit.at_s, node, hit.point) for node, reached in hits.items() for hit in reached]
    moments += [(at_s, node, _STOP) for at_s, node in ended]
    runs, wrong = {first}, []
    for _, node, point in sorted(moments):
        if point == _STOP:
            runs.discard(node)
        elif point == _RESUME:
            wrong += [f"{node} resumed the guest while it ran on {other}" for other in sorted(runs - {node})]
            runs.add(node)
    return wrong
