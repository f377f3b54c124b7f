"""Whether a node's word is taken: a journal that is not the one it had, and a node that was fenced, speak for nothing.

Pure. The highest (journal id, record number) that a node has ever reported is remembered. A journal that comes back
with another id, or behind that number, was lost, restored from a backup, or is another machine's: the node may have
promised something that it does not know any more. A person decides (``emp node readmit``).
"""

from __future__ import annotations

from emp.model.node import Node, NodeReport


def heard(known: Node | None, report: NodeReport, *, at_s: float) -> Node:
    """Return the node's record with its newest report folded in; ``at_s`` is the wall clock, for people."""
    if known is None:
        node = Node(report=report, last_seen_at=at_s)
        return node if report.journal is not None else readmitted(node)
    update: dict[str, object] = {"report": report, "last_seen_at": at_s, "ready": True}
    if (doubt := _journal_doubt(known, report)) is not None:
        update["quarantine"] = known.quarantine or doubt
    elif known.quarantine is None and report.journal_id and report.journal is None:
        update |= {"journal_id": report.journal_id, "journal_seq": report.journal_seq}
    return known.model_copy(update=update)


def _journal_doubt(known: Node, report: NodeReport) -> str | None:
    if not known.journal_id or not report.journal_id or report.journal is not None:
        return None  # what its agent distrusts by itself says nothing of the journal that it had
    if report.journal_id != known.journal_id:
        return "its journal is another one than it had: lost, or another machine's"
    if report.journal_seq < known.journal_seq:
        return (
            f"its journal ends at record {report.journal_seq}, and it had reported {known.journal_seq}: "
            "an old disk or a restored backup"
        )
    return None


def readmitted(node: Node) -> Node:
    """The journal that the node has now is its journal."""
    memory = {"journal_id": node.report.journal_id, "journal_seq": node.report.journal_seq}
    return node.model_copy(update={"quarantine": None, **memory})


def is_late(known: Node | None, report: NodeReport) -> bool:
    """Whether a report was overtaken: by a newer one of the same process, or by the fence that ended that process."""
    if known is None:
        return False
    if known.fence is not None and known.fence.boot_id == report.boot_id:
        return True
    last = known.report
    same = (last.boot_id, last.journal_id) == (report.boot_id, report.journal_id)
    return same and report.journal_seq < last.journal_seq


def doubt(node: Node) -> str | None:
    """Why the node takes no order and its word is not taken; None for a node in good standing."""
    if node.quarantine is not None:
        return f"it is quarantined: {node.quarantine}"
    if node.fence is not None:
        return f"it is fenced ({node.fence.driver}, {node.fence.by})"
    if node.report.journal is not None:
        return f"its journal cannot be trusted: {node.report.journal}"
    return None


def closed(node: Node) -> str | None:
    """Why the node must not act, as its agent is told; what the agent has said of itself it knows already."""
    return doubt(node) if node.quarantine is not None or node.fence is not None else None


def remedy(node: Node) -> str:
    """What a person does about a node that cannot be asked to give an EVM up."""
    name = node.name
    if node.quarantine is not None:
        return f"look at its journal, then: emp node readmit {name} --confirm; or switch it off: {fence_command(name)}"
    if node.report.journal is not None:
        return (
            f"repair its journal and start its agent again (docs/journal.md); or switch it off: {fence_command(name)}"
        )
    return f"start its agent; if the node is lost for good: {fence_command(name)}"


def fence_command(name: str) -> str:
    return f"emp node fence {name} --confirm"
