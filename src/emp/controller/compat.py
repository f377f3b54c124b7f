"""Which machine type and CPU model a new EVM gets, so that it can later move to every node of the pool. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

from emp.model.errors import BadInput, Refused
from emp.model.node import Node, Versions

FAMILIES = ("pc-i440fx", "pc-q35")
"""machine types that QEMU versions and migrates, the preferred first"""
CPU_MODELS = ("Westmere-v1", "Nehalem-v1", "qemu64-v1")
"""preferred defaults, the newest first: what TCG emulates in full and what Intel's and AMD's CPUs of a pool all have"""
_MACHINE = re.compile(r"(?P<family>[a-z0-9-]+?)-(?P<major>\d+)\.(?P<minor>\d+)")


def common_machine(nodes: Sequence[Node]) -> str:
    """Return the newest versioned machine type that every one of ``nodes`` knows. Raises ``Refused``."""
    known = _common([node.report.versions.machines for node in nodes])
    ranked = sorted(((rank, machine) for machine in known if (rank := _rank(machine))), reverse=True)
    if not ranked:
        raise Refused(
            "the ready nodes have no versioned machine type in common",
            field="node",
            hint="run QEMU versions on the nodes that overlap; see: emp node list",
        )
    return ranked[0][1]


def common_cpu_model(nodes: Sequence[Node], asked: str | None) -> str:
    """Return the model that every one of ``nodes`` runs: the one asked for, else the first of ``CPU_MODELS``.

    Raises ``BadInput`` naming who cannot run the one asked for, ``Refused`` when nothing is common.
    """
    known = _common([node.report.versions.cpu_models for node in nodes])
    if asked is not None:
        if asked not in known:
            missing = ", ".join(n.name for n in nodes if asked not in n.report.versions.cpu_models)
            raise BadInput(
                f"CPU model {asked!r} does not run on {missing}",
                field="cpu_model",
                hint=f"models of every ready node: {', '.join(known) or 'none'}",
            )
        return asked
    if not known:
        raise Refused("the ready nodes have no CPU model in common", field="node", hint="see: emp node list")
    return next((model for model in CPU_MODELS if model in known), known[0])


def same_accelerator(nodes: Sequence[Node], versions: Versions) -> list[Node]:
    """Return those of ``nodes`` that an EVM started under ``versions`` could ever migrate to."""
    return [node for node in nodes if node.report.versions.accelerator == versions.accelerator]


def _common(lists: Sequence[Sequence[str]]) -> list[str]:
    """Return what is in every list, in the order of the first."""
    if not lists:
        return []
    return [item for item in lists[0] if all(item in other for other in lists[1:])]


def _rank(machine: str) -> tuple[int, int, int] | None:
    match = _MACHINE.fullmatch(machine)
    if match is None or match["family"] not in FAMILIES:
        return None
    return -FAMILIES.index(match["family"]), int(match["major"]), int(match["minor"])
