"""A migration in a log: one line for each stage that begins, and one now and then while a stage is long."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from emp.cli.follow import break_text
from emp.cli.output import rate, seconds, size
from emp.model.migration import Stage

if TYPE_CHECKING:
    from emp.model.errors import EmpError
    from emp.model.migration import Migration

EVERY_S = 30.0
_BLACKOUT = "blackout: the last pages and the CPU state"


class Lines:
    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._abort_asked: str | None = None
        self._spoke_at = 0.0

    def show(self, migration: Migration) -> None:
        if self._stage is None:
            _say(f"{migration.id}: {migration.evm}, {migration.source} -> {migration.target} ({migration.placement})")
        if migration.abort_asked != self._abort_asked:
            self._abort_asked = migration.abort_asked
            _say(f"abort: {self._abort_asked}")
        if migration.stage is not self._stage or self._is_long():
            if migration.stage is Stage.TARGET_BROWNOUT and self._stage is Stage.SOURCE_BROWNOUT:
                _say(_BLACKOUT)  # shorter than it takes to be told of it
            self._stage = migration.stage
            self._spoke_at = time.monotonic()
            if self._stage is not Stage.CLOSED:
                _say(stage_text(migration))

    def on_break(self, loss: EmpError | None) -> None:
        _say(break_text(loss))

    def close(self) -> None:
        return

    def _is_long(self) -> bool:
        return time.monotonic() - self._spoke_at > EVERY_S


def stage_text(migration: Migration) -> str:
    """Return the line of the stage that a migration is in."""
    match migration.stage:
        case Stage.PREPARATION:
            return f"preparation: {migration.target} gets ready"
        case Stage.SOURCE_BROWNOUT:
            return f"source brownout: {progress_text(migration)}"
        case Stage.BLACKOUT:
            return _BLACKOUT
        case Stage.TARGET_BROWNOUT:
            return f"target brownout: {migration.evm} runs on {migration.target}"
        case _:
            return str(migration.outcome)


def progress_text(migration: Migration) -> str:
    """Return how the pre-copy goes."""
    progress = migration.progress
    if not progress.memory_bytes:
        return "memory is copied"
    parts = [f"{size(progress.remaining_bytes)} of {size(progress.memory_bytes)} left", *rates(migration)]
    return ", ".join(parts)


def rates(migration: Migration) -> list[str]:
    """Return dirty rate, bandwidth, pass and estimate, as far as they are known."""
    progress = migration.progress
    parts = [f"dirty {rate(progress.dirty_bytes_per_s)}"]
    if progress.bandwidth_bytes_per_s:
        parts.append(f"{rate(progress.bandwidth_bytes_per_s)} sent")
    parts.append(f"pass {progress.passes}")
    if progress.eta_s is not None:
        parts.append(f"ETA {seconds(progress.eta_s)}")
    elif progress.bandwidth_bytes_per_s and progress.dirty_bytes_per_s >= progress.bandwidth_bytes_per_s:
        parts.append("not converging")
    return parts


def _say(line: str) -> None:
    print(line, flush=True)
