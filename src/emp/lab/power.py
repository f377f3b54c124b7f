"""What a node's power switch does. Off is pulling the plug: everything in the place dies at once, in the middle of
whatever it did, and the wire goes dead. On boots it with its disk as it was and starts its agent, as its init would.

Its memory, its network's state and /run are gone, and what was written but not synced is still there: the disk below is
a directory of the machine, which goes on.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

from emp.lab import daemons, partition, places, scan
from emp.lab.state import LabFiles, LabState
from emp.lab.topology import Place
from emp.model.errors import NotFound


class Power(StrEnum):
    ON = "on"
    OFF = "off"


def state_of(files: LabFiles, node: str) -> Power:
    """Return whether anything runs in a node now. ``NotFound`` if there is no such node."""
    _node(files.load(), node)
    return Power.ON if node in places.inits(files) else Power.OFF


def switch(files: LabFiles, node: str, wanted: Power) -> None:
    """Switch a node and return when it is so: nothing of it runs, or its agent has been started. Idempotent.

    Raises ``NotFound`` if there is no such node, ``HostError`` if it does not go off or cannot be made.
    """
    with files.locked() as lock:
        state = files.load()
        place = _node(state, node)
        process = places.inits(files).get(node)
        if wanted is Power.OFF:
            files.save(replace(state, off=tuple(sorted({*state.off, node}))))
            places.plug(state.topology, place, plugged=False)
            if process is not None:
                scan.kill([process])  # ends after all that is in the place
        elif process is None:
            places.rewire(state.topology, place)
            partition.renew(state.topology)
            places.boot(files, [place], lock=lock)
            places.plug(state.topology, place)
            daemons.spawn(files, state, place)
            files.save(replace(state, off=tuple(name for name in state.off if name != node)))


def _node(state: LabState, name: str) -> Place:
    place = state.topology.place(name)
    if not place.is_node:
        raise NotFound(f"{name} has no power switch", field="node", hint="name a node, such as n1")
    return place
