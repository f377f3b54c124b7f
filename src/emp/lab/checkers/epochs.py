"""No double run, by the volume server's log: newer epochs claim a volume, and no older one gets in again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def violations(log: Path, volume: str) -> list[str]:
    """Return what breaks the order of epochs of a volume in ``epochs.log`` (``emp.volumes.server.epochs``)."""
    newest, wrong = 0, []
    for event in _events(log, volume):
        match event:
            case {"event": "attach", "node": node, "tag": int(tag)} if tag < newest:
                wrong.append(f"{node} got {volume} under epoch {tag} after {newest} had been claimed")
            case {"event": "claim", "tag": int(epoch)}:
                if epoch < newest:
                    wrong.append(f"{volume} was claimed under epoch {epoch} after {newest}")
                newest = max(newest, epoch)
            case {"event": "fence", "epoch": int(epoch)}:
                newest = max(newest, epoch)
    return wrong


def _events(log: Path, volume: str) -> Iterator[dict[str, Any]]:
    for path in (log.with_name(f"{log.name}.1"), log):
        for line in path.read_text().splitlines() if path.exists() else ():
            event = json.loads(line)
            if event.get("volume") == volume:
                yield event
