"""Which node an EVM goes to, and why; and if to none, why not to each. Pure.

Of the nodes that fit, the one with the most free memory is taken, by name where two are equal. Memory is free that no
record claims: an EVM counts on the node that owns it, on the node that it is being started on, and, while it migrates,
on both ends. What is claimed is claimed from the plan on, so that two plans at the same moment never overcommit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from emp.controller import trust
from emp.model.errors import NoPlacement, Refused
from emp.model.evm import Evm, EvmSpec, EvmState
from emp.model.migration import Migration
from emp.model.names import format_size
from emp.model.node import Node

WITHOUT_MACHINE = (EvmState.STOPPED, EvmState.CRASHED)
"""states in which no QEMU holds the EVM's memory"""


@dataclass(frozen=True)
class Candidate:
    node: Node
    free_bytes: int
    """of what the node offers to EVMs; negative where it has been made smaller since"""


@dataclass(frozen=True)
class Placed:
    candidate: Candidate
    reason: str

    @property
    def node(self) -> Node:
        return self.candidate.node


Unfit = Callable[[Candidate], str | None]
"""why a candidate does not do, None if it does"""


def place(candidates: Iterable[Candidate], unfit: Sequence[Unfit], *, what: str) -> Placed:
    """Return the fitting candidate with the most free memory. Raises ``NoPlacement`` with the reason per node."""
    fitting: list[Candidate] = []
    reasons: dict[str, str] = {}
    for candidate in candidates:
        reason = next((text for check in unfit if (text := check(candidate))), None)
        if reason is None:
            fitting.append(candidate)
        else:
            reasons[candidate.node.name] = reason
    if not fitting:
        raise _no_placement(what, reasons)
    best = min(fitting, key=lambda c: (-c.free_bytes, c.node.name))
    return Placed(best, _why(best, len(fitting), reasons))


def _why(best: Candidate, fitting: int, reasons: Mapping[str, str]) -> str:
    what = "the only node that fits" if fitting == 1 else f"most free memory of {fitting} nodes that fit"
    others = "".join(f"; not {name}: {reason}" for name, reason in sorted(reasons.items()))
    return f"{what} ({format_size(best.free_bytes)} free){others}"


def _no_placement(what: str, reasons: Mapping[str, str]) -> NoPlacement:
    listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
    return NoPlacement(
        f"no node can take {what}: {listed or 'the pool has no node'}",
        field="node",
        hint="free memory, uncordon or add a node",
        nodes=dict(reasons),
    )


def place_on(candidate: Candidate, unfit: Sequence[Unfit], *, field: str = "node") -> Placed:
    """Return the node that was asked for, or raise ``Refused`` saying why not."""
    for check in unfit:
        if reason := check(candidate):
            name = candidate.node.name
            hint = "uncordon it" if check is cordoned else "choose another node, or leave the choice to placement"
            raise Refused(f"node {name} does not fit: {reason}", field=field, hint=hint)
    return Placed(candidate, "asked for")


# ------------------------------------------------------------------ reasons


def not_there(candidate: Candidate) -> str | None:
    return None if candidate.node.ready else "down"


def cordoned(candidate: Candidate) -> str | None:
    return "cordoned" if candidate.node.cordoned else None


def untrusted(candidate: Candidate) -> str | None:
    """A node whose word is not taken must not get new authority."""
    return trust.doubt(candidate.node)


def short_of_memory(memory_bytes: int) -> Unfit:
    def check(candidate: Candidate) -> str | None:
        if candidate.free_bytes >= memory_bytes:
            return None
        return f"{format_size(max(0, candidate.free_bytes))} free, {format_size(memory_bytes)} needed"

    return check


def short_of_vcpus(vcpus: int) -> Unfit:
    """More vCPUs than the node has CPUs would make them wait for each other."""

    def check(candidate: Candidate) -> str | None:
        has = candidate.node.report.vcpus
        return None if has >= vcpus else f"{vcpus} vCPUs needed, CPUs there: {has}"

    return check


def without_image(image: str) -> Unfit:
    def check(candidate: Candidate) -> str | None:
        return None if image in candidate.node.report.versions.images else f"it does not have the image {image}"

    return check


def cannot_run(spec: EvmSpec) -> Unfit:
    """An EVM keeps the image build, machine type and CPU model that it was made with."""

    def check(candidate: Candidate) -> str | None:
        versions = candidate.node.report.versions
        if versions.images.get(spec.image) != spec.image_digest:
            return f"it does not have that build of the image {spec.image}"
        if spec.machine not in versions.machines:
            return f"its QEMU does not know {spec.machine}"
        return None if spec.cpu_model in versions.cpu_models else f"it cannot run {spec.cpu_model}"

    return check


def without_ipv6(candidate: Candidate) -> str | None:
    """An EVM with IPv6 addresses is refused by an agent that cannot bring them to it."""
    why = candidate.node.report.no_ipv6
    return None if why is None else f"it takes no IPv6 addresses, as {why}"


def needs(memory_bytes: int, vcpus: int, image: str, *, ipv6: bool = False) -> list[Unfit]:
    """Return what every node must pass that is to run an EVM. ``ipv6``: it has such addresses."""
    always = [
        not_there,
        cordoned,
        untrusted,
        without_image(image),
        short_of_vcpus(vcpus),
        short_of_memory(memory_bytes),
    ]
    return [*always, without_ipv6] if ipv6 else always


def excluded(name: str, reason: str) -> Unfit:
    return lambda candidate: reason if candidate.node.name == name else None


# ------------------------------------------------------------------ memory


def claimed_by(evm: Evm, migration: Migration | None, starting_on: str | None) -> frozenset[str]:
    """Return the nodes on which the EVM's memory counts."""
    nodes = {starting_on}
    if evm.state not in WITHOUT_MACHINE or evm.migration is not None:
        nodes.add(evm.owner)
    if migration is not None:
        nodes |= {migration.source, migration.target}
    return frozenset(node for node in nodes if node)


def free_bytes(node: Node, claims: Iterable[tuple[int, frozenset[str]]]) -> int:
    """Return what is left on ``node``; ``claims`` are (bytes, nodes on which they count)."""
    return node.report.memory_bytes - sum(size for size, nodes in claims if node.name in nodes)
