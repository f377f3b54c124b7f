"""Every search there is, on every processor: the worlds that must hold, the limits, the mutants, the coverage.

``python -m tests.search.run [-v] [NAME...]`` prints the tables; ``-v`` the history of what it finds. A NAME is a
part of a world's or a mutant's; ``LONG``: the worlds that take too long for every day.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.search.configurations import HOLD, LIMITS, LONG
from tests.search.explore import Found, search
from tests.search.mutants import MUTANTS

ROOT = Path(__file__).parents[2]


class Coverage(NamedTuple):
    covered: int
    branches: int
    missing: tuple[str, ...]
    """``module.py:line`` or ``module.py:from->to``"""


class Results(NamedTuple):
    holds: list[Found]
    limits: list[Found]
    mutants: list[Found]
    coverage: Coverage


def _world(number: int) -> Found:
    return search((*HOLD, *LIMITS, *LONG)[number])


def _mutant(number: int) -> Found:
    found = search(MUTANTS[number].found_in, MUTANTS[number].project)
    found.calls = []
    return found


def run() -> Results:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        worlds = pool.map(_world, range(len(HOLD) + len(LIMITS)))
        mutants = pool.map(_mutant, range(len(MUTANTS)))
        found = list(worlds)
        return Results(found[: len(HOLD)], found[len(HOLD) :], list(mutants), coverage_of(found[: len(HOLD)]))


def coverage_of(found: list[Found]) -> Coverage:
    """What these searches alone reach of the protocol's functions."""
    calls = {(name, args, tuple(kwargs.items())): (name, args, kwargs) for f in found for name, args, kwargs in f.calls}
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "calls"), Path(folder, "told")
        asked.write_bytes(pickle.dumps(list(calls.values())))
        command = [sys.executable, "-B", "-m", "tests.search.coverage_of", str(asked), str(told)]
        subprocess.run(command, check=True, cwd=ROOT, timeout=300)
        said = json.loads(told.read_text())
    return Coverage(said["covered"], said["branches"], tuple(said["missing"]))


def table(results: Results) -> str:
    lines = [f"{'world':62} {'states':>8} {'CPU s':>6}  verdict"]
    for found in (*results.holds, *results.limits):
        lines.append(f"{found.name:62} {found.states:8} {found.seconds:6.1f}  {found.wrong or 'holds'}")
    lines.append(f"{'in all':62} {sum(f.states for f in (*results.holds, *results.limits)):8}")
    lines += ["", f"{'rule':8} {'mutant':62} {'states':>8}  found as"]
    for mutant, found in zip(MUTANTS, results.mutants, strict=True):
        lines.append(f"{mutant.rule:8} {mutant.what:62} {found.states:8}  {found.wrong or 'NOT FOUND'}")
    covered = results.coverage
    lines += [
        "",
        f"branches of the state functions reached by the search alone: {covered.covered} of {covered.branches}",
    ]
    return "\n".join([*lines, *(f"  not reached: {line}" for line in covered.missing)])


if __name__ == "__main__":
    wanted = [argument for argument in sys.argv[1:] if argument != "-v"]
    if wanted:
        for number, configuration in enumerate((*HOLD, *LIMITS, *LONG)):
            if any(part in configuration.name for part in wanted) or ("LONG" in wanted and configuration in LONG):
                one = _world(number)
                print(
                    f"{one.name:62} {one.states:8} {one.seconds:6.1f}  {one.wrong or 'holds'}", *one.history, sep="\n  "
                )
        for number, mutant in enumerate(MUTANTS):
            if any(part in mutant.what for part in wanted):
                one = _mutant(number)
                print(f"{mutant.rule:8} {mutant.what:62} {one.states:8}  {one.wrong}", *one.history, sep="\n  ")
    else:
        everything = run()
        print(table(everything))
        if "-v" in sys.argv:
            for found in (*everything.holds, *everything.limits, *everything.mutants):
                print("", found.name, *found.history, sep="\n  ")
