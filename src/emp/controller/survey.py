"""What is known of an EVM's volumes before a migration: by their services, by their records, by their earlier moves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from emp.migration.preflight import VolumeFacts
from emp.model.volume import Volume, VolumeType

REMEMBERED = 20
"""moves that an expectation is made of: the newest"""


@dataclass(frozen=True)
class Survey:
    volumes: tuple[Volume, ...]
    obstacles: Mapping[str, Mapping[str, str]]
    """node -> volume -> why it could not be attached there"""
    expected_ms: Mapping[VolumeType, float]
    """detach and attach of those that one node alone can have"""
    unanswered: str | None = None
    """why the services could not be asked"""

    def of(self, node: str) -> tuple[VolumeFacts, ...]:
        """Return the facts for a move to ``node``."""
        there = self.obstacles.get(node, {})
        return tuple(
            VolumeFacts(v, obstacle=self.unanswered or there.get(v.id), move_ms=self.expected_ms.get(v.type))
            for v in self.volumes
        )


def expected_ms(known: Iterable[Volume], *, usual_s: float | None) -> dict[VolumeType, float]:
    """Return what detach and attach take, for each type that one node alone can have.

    The median of what moves of that type have taken, as the records of ``known`` say; ``usual_s`` where none has.
    """
    usual = {} if usual_s is None else {kind: usual_s * 1000 for kind in VolumeType if not kind.multi_attach}
    measured: dict[VolumeType, list[tuple[float, float]]] = {}
    for volume in known:
        move = volume.handover
        if move is not None and move.ended_at and move.detach_ms is not None and move.attach_ms is not None:
            measured.setdefault(volume.type, []).append((move.ended_at, move.detach_ms + move.attach_ms))
    learnt = {kind: [took_ms for _, took_ms in sorted(took)[-REMEMBERED:]] for kind, took in measured.items()}
    return usual | {kind: statistics.median(took) for kind, took in learnt.items() if not kind.multi_attach}
