"""No double run, by the volume server's log: newer epochs claim a volume, and no older one gets in again.

A simulated cloud writes the same log, without claims (``emp.lab.cloud.dataplane``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def violations(log: Path, volume: str, *, single: bool = False) -> list[str]:
    """Return what breaks the order of epochs of a volume in ``epochs.log`` (``emp.volumes.server.epochs``).

    ``single``: it is a volume that one node alone can have, so also where a second one had it.
    """
    newest, wrong = 0, []
    for event in _events(log, volume):
        match event:
            case {"event": "attach" | "tag", "node": node, "tag": int(tag)} if tag < newest:
                wrong.append(f"{node} got {volume} under epoch {tag} after {newest} had been claimed")
            case {"event": "claim", "tag": int(epoch)}:
                if epoch < newest:
                    wrong.append(f"{volume} was claimed under epoch {epoch} after {newest}")
                newest = max(newest, epoch)
            case {"event": "fence", "epoch": int(epoch)}:
                newest = max(newest, epoch)
    return wrong + (_shared(log, volume) if single else [])


def _shared(log: Path, volume: str) -> list[str]:
    """Return when two nodes had the volume open at once."""
    wrong, holders = [], set[tuple[str, int]]()
    for event in _events(log, volume):
        match event:
            case {"event": "attach", "node": str(node), "epoch": int(epoch)}:
                holders.add((node, event.get("export", epoch)))
                if len(nodes := sorted({holder for holder, _ in holders})) > 1:
                    wrong.append(f"{' and '.join(nodes)} had {volume} at once")
            case {"event": "close", "node": str(node), "epoch": int(epoch)}:
                holders.discard((node, event.get("export", epoch)))
    return wrong


def _events(log: Path, volume: str) -> Iterator[dict[str, Any]]:
    for path in (log.with_name(f"{log.name}.1"), log):
        for line in path.read_text().splitlines() if path.exists() else ():
            event = json.loads(line)
            if event.get("volume") == volume:
                yield event
