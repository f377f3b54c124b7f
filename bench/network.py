"""What a migration costs on the network: ``make bench-network``.

A lab of its own for each driver, and in it an EVM for the streams and connections and one for each number of pods; one
is migrated at a time, the cases in turn, so that all see the same machine. Those whose load fills the processors have a
lab of their own, with nearly all of them; the others' runs before whatever else is at work on the machine. Writes
``build/bench/network.json``: the rows, the verdict, every run.

Each migration stands between a control at rest under the same load and a time in which what comes late is counted. The
gap is the client's longest silence. It is split into the vCPUs' pause, the time from RESUME until the guest's first UDP
frame on its tap (an emulator begins with an empty translation cache), and the rest, in which is also what the guest
waits for the first request. The guest itself
counts the stream one way; its gap is the pause and the guest's own longest silence, by a clock that stands in the
pause. A capture on both uplinks, the fault tests' network checker, says who spoke when.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from bench.network_figures import L2, REMAP_S, VPC, Case, Run, cases, row, table, verdict
from bench.network_subject import NODES, Subject
from emp.client import Client
from emp.host.schedule import before_others, larger_share
from emp.lab.cloud.knobs import RemapDelay
from emp.lab.cloud_control import turn
from emp.lab.down import down
from emp.lab.state import LabFiles, LabState
from emp.lab.topology import Network
from emp.lab.up import Options, up
from emp.model.errors import EmpError, Refused
from emp.model.node import Versions

NAME = "bench-network"
RUNS = 20
DRIVERS = (L2, VPC)
WIDTH = 150
"""of the tables"""


def lab(driver: str, console: Console) -> LabState:
    """Make the lab of a driver."""
    if driver == L2:
        return up(Options(NAME, len(NODES), faults=True), console.print)
    state = up(Options(NAME, len(NODES), faults=True, network=Network.VPC), console.print)
    turn(LabFiles(NAME), remap=RemapDelay(least_s=REMAP_S))
    return state


def in_turn(chosen: Sequence[Case], runs: int) -> list[Case]:
    """Return every run of every case; of two neighbours neither always comes first."""
    return [case for number in range(runs) for case in (chosen if number % 2 == 0 else chosen[::-1])]


def bearable(subject: Subject, case: Case, console: Console) -> int:
    """Return the first of a case's rates at which nothing is lost at rest, or the last."""
    for rate_hz in case.rates_hz[:-1]:
        rest = subject.at_rest(case, rate_hz)
        console.print(f"{case.name} at rest, {rate_hz / 1000:g} kHz: {rest.lost} of {rest.sent} lost")
        if rest.lost == 0:
            return rate_hz
    return case.rates_hz[-1]


def measured(
    driver: str, chosen: Sequence[Case], runs: int, console: Console
) -> tuple[Versions, dict[Case, list[Run]]]:
    """Return what the nodes of a driver's lab run, and what ``measure`` found there."""
    try:
        state = lab(driver, console)
        with Client.from_context(state.name) as client:
            versions = client.nodes.get(NODES[0]).report.versions
        return versions, measure(state, chosen, runs, console)
    finally:
        down(LabFiles(NAME))


def measure(state: LabState, chosen: Sequence[Case], runs: int, console: Console) -> dict[Case, list[Run]]:
    """Return the runs of each case; one whose EVM cannot be made is left out, which its demands then say."""
    with Client.from_context(state.name) as client:
        subjects: dict[Kind, Subject] = {}
        for pods, ipv6 in sorted({_kind(case) for case in chosen}):
            what = f"an EVM with {pods} pods{' and an IPv6 address' if ipv6 else ''}"
            name = f"with-{pods}" if pods else ("ipv6" if ipv6 else "plain")
            try:
                made = subjects[pods, ipv6] = Subject(state, client, name, pods, ipv6)
            except Refused as error:
                console.print(f"{what} cannot be had, its cases are left out: {error}")
            else:
                console.print(f"{what}: all answer after {made.boot_s:.1f} s")
        due = [case for case in chosen if _kind(case) in subjects]
        found: dict[Case, list[Run]] = {case: [] for case in due}
        rates_hz = {case: bearable(subjects[_kind(case)], case, console) for case in due}
        began_s, order = time.monotonic(), in_turn(due, runs)
        for number, case in enumerate(order, 1):
            run = subjects[_kind(case)].run(case, rates_hz[case])
            found[case].append(run)
            left_s = (time.monotonic() - began_s) / number * (len(order) - number)
            stream = run.stream
            where = f", {run.lost_at_ms[0]:+.1f} ms from RESUME first" if run.lost_at_ms else ""
            console.print(
                f"{number:4} of {len(order)}: {case.name:12} {stream.lost} of {stream.sent} lost{where}, gap"
                f" {run.gap_ms:.0f} ms, vCPUs paused {run.pause_ms:.1f} ms; {left_s / 60:.1f} min left"
            )
    return found


Kind = tuple[int, bool]
"""of an EVM: how many pods it has, and whether an IPv6 address"""


def _kind(case: Case) -> Kind:
    return case.pods, case.ipv6


def machine() -> dict[str, Any]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    load = [round(each, 2) for each in os.getloadavg()]
    return {"cpu": model[1] if model else platform.machine(), "cpus": os.cpu_count(), "load": load}


def terminated(number: int, frame: FrameType | None) -> None:
    """Unwind as for Ctrl-C, so that the lab is cleared."""
    sys.exit(128 + number)


def arguments() -> argparse.Namespace:
    names = list(dict.fromkeys(case.name for driver in DRIVERS for case in cases(driver)))
    parser = argparse.ArgumentParser(description="Measure what migrations cost on the network.")
    parser.add_argument("--output", type=Path, default=Path("build/bench/network.json"))
    parser.add_argument("--runs", type=int, default=RUNS, help=f"migrations of each case ({RUNS})")
    parser.add_argument("--cases", default=",".join(names), help=f"of {','.join(names)} (all)")
    parser.add_argument("--drivers", default=",".join(DRIVERS), help=f"of {','.join(DRIVERS)} (both)")
    options = parser.parse_args()
    options.cases, options.drivers = options.cases.split(","), options.drivers.split(",")
    if options.runs < 1:
        parser.error("--runs: at least 1")
    for asked, known in ((options.cases, names), (options.drivers, list(DRIVERS))):
        if unknown := [name for name in asked if name not in known]:
            parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(known)}")
    return options


def main() -> int:
    """Measure, print, write; the exit status says whether all that was chosen is met."""
    options = arguments()
    signal.signal(signal.SIGTERM, terminated)
    console = Console(highlight=False, width=WIDTH)
    options.output.unlink(missing_ok=True)
    ran_on = machine()
    rows, demands, runs = [], [], []
    try:
        for fills in (True, False):  # in this order: there is no way back from a real-time class
            with larger_share() if fills else nullcontext(before_others()) as first:
                if not first:
                    console.print("not allowed to run before other processes: their load is measured too")
                for driver in options.drivers:
                    chosen = [case for case in cases(driver) if case.name in options.cases and case.fills == fills]
                    if not chosen:
                        continue
                    versions, found = measured(driver, chosen, options.runs, console)
                    ran_on |= {"qemu": versions.qemu, "accel": versions.accelerator}
                    ran_on["larger_share" if fills else "before_others"] = first
                    mine = [row(driver, case, of_it) for case, of_it in found.items()]
                    rows += mine
                    demands += [(f"{driver} {what}", ok, figures) for what, ok, figures in verdict(mine, chosen)]
                    runs += [
                        {"driver": driver, "case": case.name, **asdict(run)}
                        for case, of_it in found.items()
                        for run in of_it
                    ]
    except EmpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    ran_on["load_at_end"] = machine()["load"]
    console.print(f"\n{ran_on['cpus']} x {ran_on['cpu']}, QEMU {ran_on.get('qemu')} ({ran_on.get('accel')})")
    console.print(table(rows))
    for what, ok, figures in demands:
        console.print(f"{'ok    ' if ok else 'FAILED'} {what}: {figures}")
    record = {
        "machine": ran_on,
        "rows": rows,
        "verdict": [{"demand": what, "ok": ok, "figures": figures} for what, ok, figures in demands],
        "runs": runs,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if demands and all(ok for _, ok, _ in demands) else 1


if __name__ == "__main__":
    sys.exit(main())
