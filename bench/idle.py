"""Ten idle migrations in a row of a 512 MiB EVM in a lab of its own: ``make bench-idle``.

Writes ``build/bench/idle.json``: every run with the fields of a demo migration, median and worst of what counts, and
the bounds that the project has set itself. Nothing runs in the EVM but its answers to a UDP stream at 1 kHz and a TCP
connection. The lab runs before whatever else is at work on the machine, so that the neighbours are not measured.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from emp.client import Client
from emp.host.schedule import before_others
from emp.lab.down import down
from emp.lab.guest_control import Guest
from emp.lab.moves import Move, entry, move
from emp.lab.probing import Probing
from emp.lab.state import LabFiles, LabState
from emp.lab.up import Options, up
from emp.model.api import EvmCreate
from emp.model.errors import EmpError
from emp.model.node import Versions

NAME = "bench-idle"
EVM = "idle"
NODES = ("n1", "n2")
RUNS = 10
BOUNDS = {"vcpu_pause_ms": 25.0, "network_gap_ms.evm": 120.0, "overhead_s": 0.5}
"""upper bounds of the medians"""


FIGURES = (*BOUNDS, "qemu_downtime_ms", "packets.evm.lost")


def value_of(record: dict[str, Any], name: str) -> float:
    """Return a figure of a run; ``name`` is a path such as ``network_gap_ms.evm``."""
    found: Any = record
    for part in name.split("."):
        found = found[part]
    return float(found)


def condensed(runs: Sequence[dict[str, Any]], how: Callable[[Sequence[float]], float]) -> dict[str, Any]:
    """Return one record with the figures that count, nested as in a run: their median, say."""
    record: dict[str, Any] = {}
    for name in FIGURES:
        *parents, last = name.split(".")
        inner = record
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = round(how([value_of(run, name) for run in runs]), 3)
    return record


def measure(state: LabState, runs: int, console: Console) -> tuple[Versions, list[Move]]:
    """Migrate an idle EVM back and forth; return (versions of the node, the migrations)."""
    with Client.from_context(state.name) as client:
        versions = client.nodes.get(NODES[0]).report.versions
        spec = client.evms.create(EvmCreate(name=EVM, memory_bytes=512 << 20, node=NODES[0])).spec
        targets = {"evm": spec.nics[0].address}
        Guest(state.topology, targets["evm"]).wait_first_packet()
        moves = []
        with Probing(LabFiles(state.name), targets) as probing:
            for number in range(1, runs + 1):
                done = move(client, probing, EVM, NODES[number % 2], quiet=True)
                moves.append(done)
                pause_ms = done.migration.report.vcpu_pause_ms or 0.0
                console.print(f"{number:3} of {runs}: vCPUs paused {pause_ms:.1f} ms, command {done.wall_s:.2f} s")
            report = probing.stop()
    for done in moves:
        done.read_windows(report)
    return versions, moves


def show(record: dict[str, Any], console: Console) -> None:
    table = Table(f"{len(record['runs'])} idle migrations", "median", "worst", "bound", "", box=None)
    for column in table.columns[1:4]:
        column.justify = "right"
    for name in FIGURES:
        median, worst, bound = value_of(record["median"], name), value_of(record["worst"], name), BOUNDS.get(name)
        verdict = "" if bound is None else "ok" if record["held"][name] else "OVER"
        table.add_row(name, f"{median:g}", f"{worst:g}", "" if bound is None else f"{bound:g}", verdict)
    console.print(table)


def terminated(number: int, frame: FrameType | None) -> None:
    """Unwind as for Ctrl-C, so that the lab is cleared."""
    sys.exit(128 + number)


def main() -> int:
    """Measure, print, write; the exit status says whether every run completed, not how fast it was."""
    parser = argparse.ArgumentParser(description="Measure idle migrations.")
    parser.add_argument("--output", type=Path, default=Path("build/bench/idle.json"))
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, terminated)
    console = Console(highlight=False, soft_wrap=True)
    options.output.unlink(missing_ok=True)
    first = before_others()
    if not first:
        console.print("not allowed to run before other processes: their load is measured too")
    try:
        state = up(Options(NAME, len(NODES)), console.print)
        try:
            versions, moves = measure(state, options.runs, console)
        finally:
            down(LabFiles(NAME))
    except EmpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    runs = [entry(done) for done in moves]
    record: dict[str, Any] = {"qemu": versions.qemu, "accel": versions.accelerator, "before_others": first}
    record |= {"runs": runs}
    record |= {"median": condensed(runs, statistics.median), "worst": condensed(runs, max), "bounds": BOUNDS}
    record["held"] = {name: value_of(record["median"], name) <= bound for name, bound in BOUNDS.items()}
    show(record, console)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(run["outcome"] == "completed" for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
