"""Cuts the wire between two places of a lab, one way or both, and heals it: nftables in the fabric's namespace.

What one place's own address sends to the other's is dropped where it enters the switch, or refused with a TCP reset as
by a firewall; connections that are open notice it too. The frames of EVMs pass the same wires and are left alone, and
so is ARP: a one-way cut stays one-way however long it lasts. The rules are the only record; they go with the lab.

The hook is ``ingress`` of the family ``netdev``, because kernels may lack ``reject`` for the family ``bridge``
(CONFIG_NFT_BRIDGE_REJECT).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from emp.host.run import run_sync
from emp.lab.places import NAMESPACES
from emp.lab.state import LabFiles
from emp.lab.topology import FABRIC, Place, Topology
from emp.model.errors import BadInput, CommandFailed

TABLE = "emp-cuts"
_REFUSE = "refuse"


class How(StrEnum):
    """What becomes of a frame on a cut wire."""

    DROP = "drop"
    REJECT = "reject"
    """TCP is answered with a reset; the rest is dropped"""


@dataclass(frozen=True)
class Cut:
    """What ``source`` sends to ``target`` does not arrive."""

    source: str
    target: str
    how: How


Pair = tuple[str, str]
"""addresses: from, to"""


def cut(files: LabFiles, one: str, other: str, *, one_way: bool = False, how: How = How.DROP) -> None:
    """Cut what ``one`` sends to ``other``, and unless ``one_way`` the way back; in force when this returns.

    Raises ``BadInput`` for a place and itself, ``NotFound`` for a place that the lab does not have,
    ``HostError`` where nftables is not there or refuses.
    """
    with files.locked():
        topology = files.load().topology
        pairs = _pairs(topology, one, other)[: 1 if one_way else 2]
        _install(topology, _installed(topology) | dict.fromkeys(pairs, how))


def heal(files: LabFiles, one: str | None = None, other: str | None = None) -> None:
    """Mend both ways between two places, or every cut of the lab; nothing to mend is no error."""
    with files.locked():
        topology = files.load().topology
        mended = _pairs(topology, one, other) if one is not None and other is not None else None
        left = {pair: how for pair, how in _installed(topology).items() if mended and pair not in mended}
        _install(topology, left)


def renew(topology: Topology) -> None:
    """Put the cuts in force on a cable that is new."""
    _install(topology, _installed(topology))


def cuts(topology: Topology) -> list[Cut]:
    """Return what is cut now, read from the kernel."""
    names = {place.address: place.name for place in topology.places}
    return [Cut(names[source], names[target], how) for (source, target), how in sorted(_installed(topology).items())]


def _pairs(topology: Topology, one: str, other: str) -> list[Pair]:
    first, second = topology.place(one), topology.place(other)
    if first == second:
        raise BadInput(f"there is no wire from {one} to itself", field="where", hint="name two places")
    return [(first.address, second.address), (second.address, first.address)]


def _nft(topology: Topology, *words: str, stdin: str | None = None) -> str:
    return run_sync("nsenter", f"--net={_fabric(topology)}", "nft", *words, stdin=stdin)


def _fabric(topology: Topology) -> Path:
    return NAMESPACES / topology.namespace(FABRIC)


def _installed(topology: Topology) -> dict[Pair, How]:
    if not _fabric(topology).exists():
        return {}  # a lab in the making, or half cleared
    try:
        listed = json.loads(_nft(topology, "-j", "list", "map", "netdev", TABLE, "cuts"))
    except CommandFailed as error:
        if "No such file" in error.details["stderr"]:
            return {}  # nothing is cut
        raise
    found = next(entry["map"] for entry in listed["nftables"] if "map" in entry)
    return {
        (pair["concat"][0], pair["concat"][1]): How.DROP if "drop" in verdict else How.REJECT
        for pair, verdict in found.get("elem", ())
    }


def _install(topology: Topology, wanted: Mapping[Pair, How]) -> None:
    """Put ``wanted`` in the place of what is cut, in one transaction: no frame sees anything between."""
    lines = [f"add table netdev {TABLE}", f"delete table netdev {TABLE}"]
    if wanted:
        lines.append(_table(topology.places, wanted))
    _nft(topology, "-f", "-", stdin="\n".join(lines) + "\n")


def _table(places: tuple[Place, ...], wanted: Mapping[Pair, How]) -> str:
    ports = ", ".join(place.name for place in places)
    verdicts = {How.DROP: "drop", How.REJECT: f"goto {_REFUSE}"}
    elements = ", ".join(f"{source} . {target} : {verdicts[how]}" for (source, target), how in wanted.items())
    return f"""
table netdev {TABLE} {{
    map cuts {{ type ipv4_addr . ipv4_addr : verdict; elements = {{ {elements} }} }}
    chain {_REFUSE} {{ meta l4proto tcp reject with tcp reset; drop; }}
    chain wires {{ type filter hook ingress devices = {{ {ports} }} priority 0; ip saddr . ip daddr vmap @cuts; }}
}}"""
