"""Whether all is well with a pool at rest: every record, process, port and attachment says the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from emp.migration.records import RUNNABLE, RecordKind
from emp.model.evm import Evm, EvmState

if TYPE_CHECKING:
    from tests.simulation.world import World

_HOLDING = (*RUNNABLE, RecordKind.HANDOVER, RecordKind.PREPARED, RecordKind.GIVEN)


def troubles(world: World) -> list[str]:
    """Return what is not as it should be; empty when all is well."""
    services = world.controller.services
    if services is None or not all(daemon.alive for daemon in world.daemons):
        return ["a daemon is down"]
    found = [f"node {node.name} is down" for node in services.nodes.all() if not node.ready]
    found += [f"node {n.name}: {n.report.journal}" for n in services.nodes.all() if n.report.journal]
    for evm in services.book.evms.all():
        found += _evm(world, evm)
    known = {evm.spec.name for evm in services.book.evms.all()}
    found += [f"a QEMU of {q.spec.name}, which nobody knows" for q in world.fabric.qemus if q.spec.name not in known]
    found += [f"role {role}" for role in _open_roles(world)]
    return found


def _evm(world: World, evm: Evm) -> Iterator[str]:
    name, owner = evm.spec.name, evm.owner
    services = world.controller.services
    assert services is not None
    if evm.state is not EvmState.RUNNING:
        yield f"{name} is {evm.state}: {evm.reason}"
    upkeep = services.book.upkeep.find(name)
    if upkeep is not None and upkeep.intent is not None:
        yield f"{upkeep.intent.verb} of {name} is under way"
    copies = [(q.node, str(q.run_state)) for q in world.copies(name)]
    if copies != [(owner, "running")]:
        yield f"{name} of {owner} has copies {copies}"
    for node, agent in world.agents.items():
        yield from _node(world, evm, node)
        ports = agent.network.ports.get(name, [])
        if node == owner and not (ports and all(port.is_open for port in ports)):
            yield f"a port of {name} is closed on {node}"
        if node != owner and ports:
            yield f"{node} has a port of {name}"
        if left := [relay for relay in agent.relays.relays if relay.startswith(evm.spec.volumes or ("none",))]:
            yield f"{node} has relays {left}"
    for volume in evm.spec.volumes:
        yield from _volume(world, evm, volume)


def _node(world: World, evm: Evm, node: str) -> Iterator[str]:
    name = evm.spec.name
    record = world.last_record(node, name)
    kind = RecordKind(str(record["kind"])) if record else None
    if node == evm.owner:
        if kind not in RUNNABLE or record is None or record["epoch"] != evm.epoch:
            yield f"{node} has {kind} epoch {record and record['epoch']} of {name}, the store has epoch {evm.epoch}"
    elif kind in _HOLDING:
        yield f"{node} still has {kind} of {name}"
    on_shelf = f"{node}/evms/{name}.json" in world.disks[node].files
    if on_shelf != (node == evm.owner):
        yield f"{name} is {'' if on_shelf else 'not '}on the shelf of {node}"


def _volume(world: World, evm: Evm, volume: str) -> Iterator[str]:
    service = world.volumes.service
    assert service is not None
    served = {(a.node, a.epoch) for a in service.describe(volume).attachments}
    exports = sorted(export for export in world.exports if export.startswith(volume))
    if {node for node, _ in served} != {evm.owner} or len(served) != 1:
        yield f"{volume} of {evm.spec.name} on {evm.owner} is attached to {sorted(served)}"
    if len(exports) != len(served):
        yield f"{volume} has exports {exports}"


def _open_roles(world: World) -> Iterator[str]:
    for node, agent in world.agents.items():
        if agent.roles is None or agent.residents is None:
            continue
        for role in agent.roles.unfinished():
            yield f"{role.name} of {role.state.migration} on {node} is {role.phase}"
        expected = sum(q.spec.memory_bytes for q in world.fabric.qemus if q.node == node)
        if agent.residents.memory_used_bytes != expected:
            yield f"{node} counts {agent.residents.memory_used_bytes} bytes of memory as used, {expected} are"
