"""One migration in the lab as pool, user and client see it, and how it stands in ``demo.json`` and ``idle.json``."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from emp.client import Client
from emp.lab.probing import Probing, window
from emp.model.errors import HostError
from emp.model.migration import Migration


@dataclass
class Move:
    """A migration that was asked for with ``emp migrate`` while the client's prober ran."""

    migration: Migration
    wall_s: float
    """from the start to the end of ``emp migrate``"""
    window: str
    """the prober's name for the time of the migration"""
    figures: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """target of the prober -> its UDP figures in that window; see ``read_windows``"""

    def read_windows(self, report: dict[str, Any]) -> None:
        """Take this migration's figures from the prober's final report."""
        self.figures = {target: window(report, target, self.window) for target in report["targets"]}

    @property
    def overhead_s(self) -> float | None:
        """The wall time of ``emp migrate`` less QEMU's own total time less the target brownout."""
        report = self.migration.report
        if report.qemu_total_ms is None or report.stages.target_brownout_s is None:
            return None
        return self.wall_s - report.qemu_total_ms / 1000 - report.stages.target_brownout_s


def move(client: Client, probing: Probing, evm: str, target: str, *, quiet: bool = False) -> Move:
    """Migrate an EVM as a user does, by the command, in a window of the prober. ``HostError`` when the command fails.

    Its live progress goes to our standard output unless ``quiet``.
    """
    # The command is to end with us: it would wait for a controller that has gone.
    argv = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        sys.executable,
        "-m",
        "emp.cli.main",
        "--context",
        client.context.name,
        "migrate",
        evm,
        "--to",
        target,
    ]
    name = f"to-{target}-{time.monotonic_ns()}"
    probing.mark(name)
    began_s = time.monotonic()
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        check=False,
    )
    wall_s = time.monotonic() - began_s
    probing.mark(f"after-{name}")
    if done.returncode:
        raise HostError(f"emp migrate {evm} --to {target} ended with status {done.returncode}: {done.stdout or ''}")
    return Move(client.migrations.list(evm=evm).items[0], wall_s, name)


def entry(move: Move) -> dict[str, Any]:
    """Return a migration as JSON; figures that are not known are null."""
    migration, report, overhead_s = move.migration, move.migration.report, move.overhead_s
    return {
        "evm": migration.evm,
        "source": migration.source,
        "target": migration.target,
        "outcome": migration.outcome,
        "stages": report.stages.model_dump(),
        "vcpu_pause_ms": report.vcpu_pause_ms,
        "qemu_downtime_ms": report.qemu_downtime_ms,
        "network_gap_ms": {name: figures["gap_ms"] for name, figures in move.figures.items()},
        "packets": {
            name: {key: figures[key] for key in ("sent", "lost", "duplicated")}
            for name, figures in move.figures.items()
        },
        "memory_bytes": report.memory_bytes,
        "sent_bytes": report.sent_bytes,
        "passes": report.passes,
        "overhead_s": None if overhead_s is None else round(overhead_s, 3),
    }
