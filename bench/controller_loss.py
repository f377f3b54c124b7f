"""What a blackout costs when the controller dies in it: ``make bench-controller-loss``.

Migrations of an idle EVM, undisturbed and disturbed in turn so that both see the same machine. In a disturbed one the
controller is killed in the moment in which the source's guest has been paused, and it stays dead until both agents have
come to their end; only then is it started again, to plan the next migration. Writes
``build/bench/controller-loss.json``: every pause, the medians, and by how much they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from emp import faults
from emp.client import Client
from emp.client import context as contexts
from emp.host.schedule import before_others
from emp.lab import daemons, verbs
from emp.lab.down import down
from emp.lab.ready import wait_ready
from emp.lab.state import LabFiles, LabState
from emp.lab.up import Options, up
from emp.model.api import EvmCreate
from emp.model.errors import EmpError, HostError
from emp.model.migration import Migration, Outcome

NAME = "bench-loss"
EVM = "idle"
NODES = ("n1", "n2")
PAIRS = 15
ALLOWED_MS = 10.0
"""by how much the median of the disturbed may differ"""
POINTS = "/var/lib/emp/fault-points"
"""in each place; ``emp.faults`` writes there which points were reached"""
PAUSED = "source.continue-stream.before"
"""the guest stands still, the commit is to come"""
GONE = "source.kill-machine.after"
RUNS = "target.announce.after"
PATIENCE_S = 60.0


class Loss:
    """One lab, one EVM, and the controller that is killed now and then."""

    def __init__(self, state: LabState, client: Client) -> None:
        self._state = state
        self._files = LabFiles(state.name)
        self._client = client

    def migrate(self, source: str, target: str, *, kill: bool) -> Migration:
        """Migrate, with the controller killed in the blackout if ``kill``; return the closed record."""
        before = {node: len(self._hits(node)) for node in NODES}
        controller = daemons.find(self._files, "ctl", "controller")  # not in the blackout: looking costs time
        assert controller is not None
        started = self._client.migrations.start(EVM, target=target)
        self._wait(lambda: self._reached(source, PAUSED, before[source]), "the blackout", pause_s=0.0005)
        if kill:
            controller.send(signal.SIGKILL)
        self._wait(lambda: self._reached(target, RUNS, before[target]), "the EVM on the target")
        self._wait(lambda: self._reached(source, GONE, before[source]), "the source's end")
        if kill:
            verbs.start(self._files, "ctl", "controller")
            wait_ready(self._files, self._state, contexts.load_context(NAME))
        self._wait(lambda: self._client.migrations.get(started.id).outcome, "the report")
        migration = self._client.migrations.get(started.id)
        if migration.outcome is not Outcome.COMPLETED:
            raise HostError(f"migration {migration.id} ended {migration.outcome}: {migration.cause}")
        return migration

    def _hits(self, node: str) -> list[faults.Hit]:
        return faults.hits(self._files.data(node) / Path(POINTS).name)

    def _reached(self, node: str, point: str, since: int) -> bool:
        return any(hit.point == point for hit in self._hits(node)[since:])

    @staticmethod
    def _wait(condition: Callable[[], object], what: str, *, pause_s: float = 0.02) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise HostError(f"{what} did not come in {PATIENCE_S:.0f} s")
            time.sleep(pause_s)


def measure(state: LabState, pairs: int, console: Console) -> list[dict[str, Any]]:
    """Return one entry per migration, undisturbed and disturbed in turn."""
    runs: list[dict[str, Any]] = []
    with Client.from_context(state.name) as client:
        client.evms.create(EvmCreate(name=EVM, memory_bytes=512 << 20, node=NODES[0]))
        loss = Loss(state, client)
        for number in range(2 * pairs):
            source, target = NODES[number % 2], NODES[(number + 1) % 2]
            kill = number // 2 % 2 == number % 2  # neither side always goes the same way
            migration = loss.migrate(source, target, kill=kill)
            pause_ms = migration.report.vcpu_pause_ms
            side = "controller killed" if kill else "undisturbed"
            runs.append({"side": side, "id": migration.id, "vcpu_pause_ms": pause_ms})
            console.print(f"{number + 1:3} of {2 * pairs}: {side:17} vCPUs paused {pause_ms:.1f} ms")
    return runs


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return median and quartiles of both sides, and the difference of the medians."""
    sides = {side: [run["vcpu_pause_ms"] for run in runs if run["side"] == side] for side in {r["side"] for r in runs}}
    record: dict[str, Any] = {
        side: {"runs": len(pauses), "quartiles_ms": [round(q, 3) for q in statistics.quantiles(pauses, n=4)]}
        for side, pauses in sorted(sides.items())
    }
    medians = {side: statistics.median(pauses) for side, pauses in sides.items()}
    difference_ms = round(medians["controller killed"] - medians["undisturbed"], 3)
    record |= {"difference_ms": difference_ms, "allowed_ms": ALLOWED_MS, "held": abs(difference_ms) <= ALLOWED_MS}
    return record


def main() -> int:
    """Measure, print, write; the exit status says whether every migration completed, not how fast it was."""
    parser = argparse.ArgumentParser(description="Measure blackouts in which the controller dies.")
    parser.add_argument("--output", type=Path, default=Path("build/bench/controller-loss.json"))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    options.output.unlink(missing_ok=True)
    os.environ[faults.VARIABLE] = POINTS
    first = before_others()
    try:
        state = up(Options(NAME, len(NODES)), console.print)
        try:
            runs = measure(state, options.pairs, console)
        finally:
            down(LabFiles(NAME))
    except EmpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    record = {"before_others": first, **summary(runs), "runs": runs}
    console.print_json(json.dumps({key: value for key, value in record.items() if key != "runs"}))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
