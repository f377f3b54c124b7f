"""One healthy EVM: every account of where it is says the same node, and no other node has any of it.

The accounts: QEMU processes and their run state, the owner's journal, the agents' reports, the controller's record, the
attachments of its volumes, and taps, run directories and the shelves of all nodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from emp.agent.journal import replay
from emp.client.client import Client
from emp.host.run import run_sync
from emp.lab import daemons, places
from emp.lab.state import LabFiles
from emp.lab.topology import VOL, Place
from emp.migration.records import RUNNABLE, SETTLED, Record
from emp.model.errors import EmpError
from emp.model.evm import EvmState
from emp.network.tap_driver import interface_name


def check(files: LabFiles, client: Client, evm: str) -> list[str]:
    """Return what contradicts that the EVM runs on its owner's node and nowhere else, and may migrate again."""
    try:
        record, nodes = client.evms.get(evm), client.nodes.list().items
        volumes = [client.volumes.get(volume) for volume in record.spec.volumes]
    except EmpError as error:
        return [f"the controller: {error}"]
    owner = record.owner or "nobody"
    wrong = [] if record.state is EvmState.RUNNING else [f"the record says {record.state}: {record.reason}"]
    wrong += [f"{record.migration} is open"] if record.migration else []
    claims = {node.name: mine.state for node in nodes for mine in node.report.evms if mine.name == evm}
    wrong += [] if claims == {owner: EvmState.RUNNING} else [f"{owner} owns it, and agents report {claims}"]
    wrong += [f"{node.name} is not ready" for node in nodes if not node.ready]
    wrong += [f"{node.name} is still fenced" for node in nodes if node.fence]
    for volume in volumes:
        held = [(attachment.node, attachment.epoch) for attachment in volume.attachments]
        if [node for node, _ in held] != [owner]:
            wrong.append(f"{volume.id} is attached to {held}")
    for place in files.load().topology.node_places:
        wrong += _node(files, place, evm, record.epoch if place.name == owner else None)
    words = [word for served in daemons.daemons(files, VOL) for word in served.argv]
    opened = [word for word in words for volume in volumes if word.startswith(f"{volume.id}.")]
    return wrong + [f"the export {name} is open" for name in opened if name.split(".")[1] != owner]


def last_record(files: LabFiles, node: str, evm: str) -> Record | None:
    """Return the last record of an EVM in the journal on a node's disk; raise ``JournalUntrusted`` if it is broken."""
    path = files.data(node) / "journal"
    if not path.exists():
        return None
    _, _, book = replay(path.read_bytes())
    return book[evm].last if evm in book else None


def _node(files: LabFiles, place: Place, evm: str, epoch: int | None) -> Iterator[str]:
    """Yield what is wrong on one node; ``epoch``: of the owner's record where this is the owner's, else None."""
    qemu = daemons.find(files, place.name, f"qemu:{evm}")
    try:
        last = last_record(files, place.name, evm)
    except EmpError as error:
        yield f"{place.name}: {error}"
        return
    if epoch is None:
        if last is not None and last.kind not in SETTLED:
            yield f"the journal of {place.name} ends with {last.kind}"
        yield from (f"{place.name} has {trace}" for trace in _traces(files, place, evm, qemu is not None))
        return
    if qemu is None:
        yield f"there is no QEMU on {place.name}"
    if last is None or last.kind not in RUNNABLE:
        yield f"the journal of {place.name}, its owner, ends with {last and last.kind}"
    elif last.epoch != epoch:
        yield f"the journal of {place.name} says epoch {last.epoch}, the record {epoch}"


def _traces(files: LabFiles, place: Place, evm: str, qemu: bool) -> Iterator[str]:
    root = Path(f"/proc/{places.init_of(files, place.name).pid}/root")
    links = json.loads(run_sync("ip", "-n", files.load().topology.namespace(place.name), "-json", "link", "show"))
    if qemu:
        yield "a QEMU"
    if interface_name(evm, 0) in {link["ifname"] for link in links}:
        yield "a tap"
    for path in (root / "run/emp/evm" / evm, root / "var/lib/emp/evms" / f"{evm}.json"):
        if path.exists():
            yield str(path.relative_to(root))
