"""``python -m tests.simulation``: many seeds on all processors, or one with its trace. ``make simulate`` calls it."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.simulation import mutants, patches
from tests.simulation.cases import CASES
from tests.simulation.run import Result, run_seed

CHUNK = 4
CASE_SEEDS = 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--seed", type=int, help="this one alone, with its trace")
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS), help="plant this bug first")
    parser.add_argument("--case", choices=sorted(CASES), help="one of cases.py, from a few seeds")
    parser.add_argument("--stop", action="store_true", help="at the first violation")
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # what depends on the order of a set must be the same in every run
        os.execve(sys.executable, [*sys.orig_argv], os.environ | {"PYTHONHASHSEED": "0"})
    if arguments.case is not None:
        return case(arguments.case, arguments.seed)
    if arguments.seed is not None:
        return one(arguments.seed, arguments.mutant)
    return many(arguments)


def one(seed: int, mutant: str | None) -> int:
    _prepare(mutant)
    result = run_seed(seed, keep_trace=True)
    print("\n".join(result.trace))
    verdict = result.violation or f"all is well after {', '.join(result.outcomes)}"
    print(f"seed {seed}: {verdict}  [{result.digest & 0xFFFFFFFF:08x}]")
    return 1 if result.violation else 0


def case(name: str, seed: int | None) -> int:
    """Play it from ``seed``, with its trace, or from a few; it must have come to its faults in one of them."""
    _prepare(None)
    fired = 0
    for number in range(1, CASE_SEEDS + 1) if seed is None else (seed,):
        result = run_seed(number, keep_trace=seed is not None, planned=CASES[name].planned())
        print(*result.trace, sep="\n" if result.trace else "")
        fired += len(result.fired) == len(CASES[name].faults)
        if result.violation:
            print(f"{name!r} from seed {number}: {result.violation}")
            return 1
    return 0 if fired else 1


def many(arguments: argparse.Namespace) -> int:
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    began_s, results = time.monotonic(), []
    for result in _results(seeds, arguments.mutant):
        results.append(result)
        if result.violation:
            print(f"seed {result.seed}: {result.violation}", file=sys.stderr)
            print(f"  faults: {'; '.join(result.fired) or 'none'}", file=sys.stderr)
            print(f"  again:  {_again(result.seed, arguments.mutant)}", file=sys.stderr)
            if arguments.stop:
                break
        _progress(len(results), len(seeds), time.monotonic() - began_s)
    summary = summarize(results, time.monotonic() - began_s)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n")
    shown = ("seeds", "migrations", "faults_injected", "violations", "minutes")
    print(json.dumps({key: summary[key] for key in shown}))
    return 1 if summary["violations"] else 0


def _again(seed: int, mutant: str | None) -> str:
    """The command that runs the seed again, with its trace."""
    if mutant is None:
        return f"make simulate SEED={seed}"
    return f".venv/bin/python -m tests.simulation --seed {seed} --mutant {mutant}"


def _results(seeds: range, mutant: str | None) -> Iterator[Result]:
    context = multiprocessing.get_context("fork")
    with context.Pool(os.cpu_count(), _prepare, (mutant,)) as pool:
        yield from pool.imap_unordered(run_seed, seeds, chunksize=CHUNK)


def _prepare(mutant: str | None) -> None:
    patches.install()
    if mutant is not None:
        mutants.MUTANTS[mutant]()


def _progress(done: int, of: int, took_s: float) -> None:
    if sys.stderr.isatty() or done % 100 == 0 or done == of:
        left_s = took_s / done * (of - done)
        end = "\r" if sys.stderr.isatty() and done < of else "\n"
        print(f"{done} of {of} seeds, {took_s:.0f} s, {left_s:.0f} s to go ", end=end, file=sys.stderr, flush=True)


def summarize(results: list[Result], took_s: float) -> dict[str, Any]:
    cells = Counter(" ".join(fired.split()[1:2]) for result in results for fired in result.fired)
    return {
        "seeds": len(results),
        "migrations": sum(result.migrations for result in results),
        "faults_injected": sum(len(result.fired) for result in results),
        "violations": sum(result.violation is not None for result in results),
        "failing": [{"seed": r.seed, "violation": r.violation} for r in results if r.violation],
        "outcomes": dict(Counter(outcome for result in results for outcome in result.outcomes)),
        "cells": dict(sorted(cells.items())),
        "moments": sum(result.moments for result in results),
        "virtual_hours": round(sum(result.virtual_s for result in results) / 3600, 2),
        "minutes": round(took_s / 60, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
