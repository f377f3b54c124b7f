"""A migration in a log: one line for each stage that begins, and one now and then while a stage is long."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from emp.cli.follow import break_text
from emp.cli.output import milliseconds, rate, seconds, size
from emp.model.migration import MoveStep, Stage

if TYPE_CHECKING:
    from emp.model.errors import EmpError
    from emp.model.migration import Migration, VolumeStep

EVERY_S = 30.0
_BLACKOUT = "blackout: the last pages and the CPU state"


class Lines:
    def __init__(self) -> None:
        self._stage: Stage | None = None
        self._abort_asked: str | None = None
        self._hint: str | None = None
        self._steps: dict[str, MoveStep] = {}
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
            self._steps.clear()  # what takes long is told again
            if self._stage is not Stage.CLOSED:
                _say(stage_text(migration))
        self._show_volumes(migration)

    def _show_volumes(self, migration: Migration) -> None:
        """A line for each step of a volume's move that may be long, and for what stands in the way."""
        for step in migration.moving:
            if step.step is not self._steps.get(step.volume) and step.step in (MoveStep.DETACH, MoveStep.ATTACH):
                _say(f"  {step_text(step, migration)}")
            self._steps[step.volume] = step.step
        if migration.hint != self._hint and migration.stage is not Stage.CLOSED:
            self._hint = migration.hint
            _say(f"  {self._hint or 'nothing stands in the way any more'}")

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


def step_text(step: VolumeStep, migration: Migration) -> str:
    """Return where a volume is on its way, since when its I/O waits, and when that is expected to be over."""
    match step.step:
        case MoveStep.RELAYED:
            return f"{step.volume} {step.type}: in use by way of {migration.source}"
        case MoveStep.HOLD:
            what = "flushing"
        case MoveStep.DETACH:
            what = f"detaching from {migration.source}"
        case MoveStep.ATTACH:
            what = f"attaching to {migration.target}"
        case _:
            what = f"{migration.target} opens it"
    held_s = max(0.0, time.time() - step.held_since) if step.held_since is not None else 0.0
    parts = [f"held {held_s:.1f} s" if held_s >= 1 else "held", what]
    if step.expected_ms is not None:
        left_s = step.expected_ms / 1000 - held_s
        parts.append(f"ETA {left_s:.1f} s" if left_s > 0 else f"expected {milliseconds(step.expected_ms)}")
    return f"{step.volume} {step.type}: {', '.join(parts)}"


def _say(line: str) -> None:
    print(line, flush=True)
