"""Migrations in a row, with and without faults, for as long as one likes: ``make soak N=200``.

One EVM goes round a pool of three nodes. Two of three migrations are cells of the fault matrix, drawn with a seed from
those after which the guest must live on; the others are left alone. After each one all checkers look, and the daemons'
memory and descriptors are counted. Connections that are idle are closed only after half a minute, so they are counted
when nothing has happened for longer than that, half way and in the end. Writes ``build/soak.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from emp.lab.region import Profile
from tests.fault import holds
from tests.fault.breaks import Script
from tests.fault.matrix import Cell, cells
from tests.fault.stage import CLOUD, Stage, Stages
from tests.fault.test_matrix import play
from tests.isolation import isolate
from tests.leaks import MARK

FAULTY = 2 / 3
REST_S = 35.0
"""longer than a client keeps an idle connection (``emp.wire.exchange``: 30 s)"""
RSS_GROWTH = 1.05
"""the last quarter's median may be this much of the second quarter's"""


@dataclass
class Run:
    """What one migration of the soak came to."""

    name: str
    seen: str
    wrong: list[str]
    rss_bytes: Mapping[str, int]
    descriptors: Mapping[str, int]
    connections: Mapping[str, int]


@dataclass
class Soak:
    seed: int
    runs: list[Run] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)
    rests: list[Mapping[str, int]] = field(default_factory=list)
    """daemon -> its connections, when the pool had been left alone for ``REST_S``: half way, and in the end"""

    def record(self) -> dict[str, Any]:
        """Return what ``build/soak.json`` holds."""
        second, last = quarter(self.runs, 1), quarter(self.runs, 3)
        rss = {
            daemon: {
                "second_quarter_bytes": (early := median(second, "rss_bytes", daemon)),
                "last_quarter_bytes": (late := median(last, "rss_bytes", daemon)),
                "held": late <= early * RSS_GROWTH,
            }
            for daemon in roles((*second, *last))
        }
        descriptors = {
            daemon: {
                "second_quarter": (early := median(second, "descriptors", daemon)),
                "last_quarter": (late := median(last, "descriptors", daemon)),
                "held": late <= early,
            }
            for daemon in rss
        }
        connections = {
            daemon: {
                "half_way": (early := of_role(self.rests[0], daemon)),
                "in_the_end": (late := of_role(self.rests[-1], daemon)),
                "held": late <= early,
            }
            for daemon in rss
        }
        wrong = [
            {"run": number, "name": run.name, "wrong": run.wrong}
            for number, run in enumerate(self.runs, 1)
            if run.wrong
        ]
        return {
            "runs": len(self.runs),
            "seed": self.seed,
            "outcomes": dict(Counter(run.seen for run in self.runs)),
            "violations": len(wrong),
            "wrong": wrong,
            "rss": rss,
            "descriptors": descriptors,
            "connections": connections,
            "held": not wrong
            and all(one["held"] for table in (rss, descriptors, connections) for one in table.values()),
            "faults": dict(sorted(Counter(run.name for run in self.runs).items())),
            "minutes": round((time.monotonic() - self.began_s) / 60, 1),
            "after_each": [
                {"rss_bytes": run.rss_bytes, "descriptors": run.descriptors, "connections": run.connections}
                for run in self.runs
            ],
        }


def quarter(runs: Sequence[Run], number: int) -> Sequence[Run]:
    return runs[len(runs) * number // 4 : len(runs) * (number + 1) // 4] or runs


def role(daemon: str) -> str:
    """Return what a daemon is. The agents are looked at as one: the EVM is now on this node and now on that one, and an
    agent that a fault has restarted begins small."""
    return daemon.partition(" of ")[0]


def roles(runs: Sequence[Run]) -> list[str]:
    return sorted({role(name) for run in runs for name in run.rss_bytes})


def median(runs: Sequence[Run], figure: str, daemon: str) -> float:
    """Return the median of a figure over those runs and every daemon of that role."""
    values = [value for run in runs for name, value in getattr(run, figure).items() if role(name) == daemon]
    return float(statistics.median(values or [0]))


def of_role(connections: Mapping[str, int], daemon: str) -> int:
    """Return how many all daemons of a role have together."""
    return sum(number for name, number in connections.items() if role(name) == daemon)


def undisturbed(stage: Stage) -> Script:
    """Nothing breaks."""
    yield


PLAIN = Cell(0, "-", "C", holds.PRECOPY, undisturbed, case="undisturbed")
PERSON = (25, 26, 28, 29)
"""rows after which the guest is not the same, or a person has to say how it goes on"""


def drawable() -> list[Cell]:
    """Return the cells after which the very same guest runs on."""
    return [cell for cell in cells() if cell.row not in PERSON and not cell.pending and "K" not in cell.expected]


def run(stage: Stage, cell: Cell) -> Run:
    """Play one migration and look at everything afterwards."""
    seen, wrong = "?", []
    try:
        with stage.playing():
            seen = play(stage, cell)
            wrong = [f"{checker}: {what}" for checker, found in stage.violations().items() for what in found]
    except Exception as error:  # noqa: BLE001 - whatever it was, it is a violation, and the next one is played
        wrong = [f"{type(error).__name__}: {error}"]
    if seen not in cell.expected and not wrong:
        wrong = [f"ended {seen}, expected {cell.expected}"]
    stock = stage.stock()
    return Run(cell.name, seen, wrong, stock.rss_bytes, stock.descriptors, stock.connections)


def at_rest(stage: Stage) -> Mapping[str, int]:
    """Leave the pool alone, and return each daemon's connections."""
    time.sleep(REST_S)
    return stage.stock().connections


def soak(runs: int, seed: int, console: Console, cloud: Profile | None = CLOUD) -> Soak:
    """Go round; a stage with a violation is given up for a new one, so that the next finds a sound one."""
    draw, done, stages = random.Random(seed), Soak(seed), Stages(cloud)
    faulty = drawable()
    try:
        for number in range(1, runs + 1):
            cell = draw.choice(faulty) if draw.random() < FAULTY else PLAIN
            began_s = time.monotonic()
            one = run(stages.whole(), cell)
            done.runs.append(one)
            now_s = time.monotonic()
            left_s = (now_s - done.began_s) / number * (runs - number)
            console.print(
                f"{number:4} of {runs}  {one.name:28} {one.seen}  {now_s - began_s:5.1f} s  ETA {left_s / 60:.0f} min"
                + "".join(f"\n     {what}" for what in one.wrong)
            )
            if one.wrong:
                stages.discard()
            if number in (runs // 2, runs):
                done.rests.append(at_rest(stages.whole()))
    finally:
        stages.close()
    return done


def main() -> int:
    """Soak, print, write; the exit status is 1 if any checker saw a violation, a leak or growth."""
    parser = argparse.ArgumentParser(description="Migrations in a row, with random faults.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="the same seed draws the same faults")
    parser.add_argument("--output", type=Path, default=Path("build/soak.json"))
    parser.add_argument("--fault-cloud", choices=("none", *Profile), default=CLOUD, help="as of the fault matrix")
    options = parser.parse_args()
    os.environ[MARK] = secrets.token_hex(8)
    isolate()
    console = Console(highlight=False, soft_wrap=True)
    seed = options.seed if options.seed is not None else secrets.randbelow(1_000_000)
    console.print(f"seed {seed}")
    cloud = None if options.fault_cloud == "none" else Profile(options.fault_cloud)
    record = soak(options.runs, seed, console, cloud).record()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    console.print(json.dumps({key: record[key] for key in ("runs", "outcomes", "violations", "held", "minutes")}))
    return 0 if record["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
