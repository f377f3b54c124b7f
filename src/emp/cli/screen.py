"""A migration at a terminal: its stages as they pass, a bar of the memory left, and the rates, redrawn in place."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from emp.cli.follow import break_text
from emp.cli.lines import rates, step_text
from emp.cli.output import milliseconds, seconds, size
from emp.model.migration import Outcome, Stage

if TYPE_CHECKING:
    from emp.model.errors import EmpError
    from emp.model.migration import Migration, VolumeStep

STAGES = (Stage.PREPARATION, Stage.SOURCE_BROWNOUT, Stage.BLACKOUT, Stage.TARGET_BROWNOUT)
REFRESHES_PER_S = 8
BAR = 18


class Screen:
    """Redraws itself for the clock; a snapshot is drawn at once."""

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self._loss: EmpError | None = None
        self._began_at: dict[Stage, float] = {migration.stage: time.monotonic()}
        self._reached = Stage.PREPARATION
        console = Console(highlight=False)
        self._marks = ("✓", "▸", "✗") if console.encoding.startswith("utf") else ("+", ">", "x")
        self._live = Live(self, console=console, refresh_per_second=REFRESHES_PER_S)
        self._live.start()

    def show(self, migration: Migration) -> None:
        self._migration = migration
        self._began_at.setdefault(migration.stage, time.monotonic())
        if migration.stage is not Stage.CLOSED:
            self._reached = migration.stage
        elif migration.outcome is Outcome.COMPLETED:
            self._reached = Stage.TARGET_BROWNOUT
        self._live.refresh()

    def on_break(self, loss: EmpError | None) -> None:
        self._loss = loss
        self._live.refresh()

    def close(self) -> None:
        self._live.stop()

    # -------------------------------------------------------------- drawing

    def __rich__(self) -> RenderableType:
        migration = self._migration
        grid = Table.grid(padding=(0, 1, 0, 0))
        for stage in STAGES:
            grid.add_row(*self._row(stage))
        route = f"{migration.evm}: {migration.source} -> {migration.target}"
        parts: list[RenderableType] = [
            Text.assemble((route, "bold"), f"  {migration.id}"),
            Text(f"  {migration.target}: {migration.placement}", style="dim"),
            grid,
            *(self._volume(step) for step in migration.moving),
        ]
        if migration.hint and migration.stage is not Stage.CLOSED:
            parts.append(Text(f"  {migration.hint}", style="yellow"))
        if migration.abort_asked and migration.stage is not Stage.CLOSED:
            parts.append(Text(f"  going back: {migration.abort_asked}", style="yellow"))
        if self._loss is not None:
            parts.append(Text(f"  {break_text(self._loss)}", style="yellow"))
        return Group(*parts)

    def _row(self, stage: Stage) -> tuple[RenderableType, ...]:
        migration, name = self._migration, stage.replace("-", " ")
        now, reached = STAGES.index(stage), STAGES.index(self._reached)
        done, active, failed = self._marks
        if now > reached:
            return Text(" "), Text(name, style="dim"), "", ""
        if now < reached or migration.outcome is Outcome.COMPLETED:
            return Text(done, style="green"), name, Text(self._took(stage), justify="right"), ""
        if migration.stage is Stage.CLOSED:
            return Text(failed, style="red"), name, "", Text(str(migration.outcome), style="red")
        detail = self._progress() if stage is Stage.SOURCE_BROWNOUT else Text("")
        elapsed_s = time.monotonic() - self._began_at[stage]
        return Text(active, style="cyan"), Text(name, style="bold"), Text(f"{elapsed_s:.1f} s", justify="right"), detail

    def _took(self, stage: Stage) -> str:
        """Return how long a stage took: as the pool measured it, else as it was seen from here."""
        stages = self._migration.report.stages
        match stage:
            case Stage.SOURCE_BROWNOUT if stages.source_brownout_s is not None:
                return seconds(stages.source_brownout_s)
            case Stage.BLACKOUT if stages.blackout_ms is not None:
                return milliseconds(stages.blackout_ms)
            case Stage.TARGET_BROWNOUT if stages.target_brownout_s is not None:
                return seconds(stages.target_brownout_s)
        after = [at for other, at in self._began_at.items() if stage in STAGES and _is_after(other, stage)]
        began = self._began_at.get(stage)
        return f"{min(after) - began:.1f} s" if began is not None and after else ""

    def _volume(self, step: VolumeStep) -> RenderableType:
        """A volume on its way; with a bar of the time that detach and attach usually take, once it is held."""
        text = Text(f"  {step_text(step, self._migration)}")
        if step.held_since is None or step.expected_ms is None:
            return text
        held_ms = min(max(0.0, (time.time() - step.held_since) * 1000), step.expected_ms)
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row(text, ProgressBar(total=step.expected_ms, completed=held_ms, width=BAR))
        return row

    def _progress(self) -> RenderableType:
        progress = self._migration.progress
        if not progress.memory_bytes:
            return Text("")
        copied = progress.memory_bytes - progress.remaining_bytes
        bar = Table.grid(padding=(0, 1, 0, 0))
        bar.add_row(
            ProgressBar(total=progress.memory_bytes, completed=copied, width=BAR),
            f"{size(progress.remaining_bytes)} left of {size(progress.memory_bytes)}",
        )
        return Group(bar, Text(", ".join(rates(self._migration)), style="dim"))


def _is_after(other: Stage, stage: Stage) -> bool:
    return other is Stage.CLOSED or STAGES.index(other) > STAGES.index(stage)
