"""What volumes of each kind cost in a migration, with the cloud as slow as AWS: ``make bench-volumes``.

A lab of its own (``--cloud aws``) and, in it, one EVM for each kind and number of volumes; one is migrated at a time,
the cases in turn, so that all see the same machine. *Busy*: on every volume of the EVM a journal writes 4 KiB and waits
for ``fdatasync``, ``JOURNAL_HZ`` times a second; it is stopped after the migration and checked at the host. Writes
``build/bench/volumes.json``: the rows, every run, the verdict. The lab runs before whatever else is at work on the
machine.

``vcpu_pause_ms``, the brownouts and the steps are the migration's report, ``network_gap_ms`` the client's longest
silence, ``io_stall_ms`` the longest that a journal waited, by the guest's clock. That stands while the guest does, so
the pause is added where the two can be one: not for relayed volumes, which are held when the guest runs again.
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
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from bench.volumes_figures import BUSY, CLASSIC, GP3, IDLE, IO2, MANY, Case, Run, row, steps_table, table, verdict
from emp.client import Client
from emp.host.schedule import before_others
from emp.lab.cloud.knobs import AWS
from emp.lab.demo import volume_file
from emp.lab.down import down
from emp.lab.guest_control import Guest
from emp.lab.journal_check import check_journal
from emp.lab.probing import Probing, window
from emp.lab.region import Profile
from emp.lab.state import LabFiles, LabState
from emp.lab.up import Options, up
from emp.model.api import EvmCreate
from emp.model.errors import EmpError, HostError
from emp.model.migration import Migration, Outcome, VolumeOrder
from emp.model.volume import Volume

NAME = "bench-volumes"
NODES = ("n1", "n2")
MEMORY_BYTES = 512 << 20
JOURNAL_HZ = 50
WARM = 25
"""records on each volume before the migration begins, and behind its end"""
PATIENCE_S = 120.0
RUNS = 15
"""of the two sides that are compared; the other cases have fewer"""
CASES = (
    Case(IO2, 1, BUSY, RUNS),
    Case(GP3, 1, BUSY, RUNS),
    Case(IO2, MANY, BUSY, 10),
    Case(IO2, 4, BUSY, 5),
    Case(GP3, 4, BUSY, 6),
    Case(CLASSIC, 1, BUSY, 4),
    Case(IO2, 1, IDLE, 4),
    Case(GP3, 1, IDLE, 4),
    Case(IO2, MANY, IDLE, 3),
    Case(IO2, 4, IDLE, 3),
    Case(GP3, 4, IDLE, 3),
    Case(CLASSIC, 1, IDLE, 3),
)
WIDTH = 132
"""of the tables"""
SMALLEST = {"io2": "4GiB", "gp3": "1GiB"}


class Subject:
    """One EVM with its volumes."""

    def __init__(self, state: LabState, client: Client, kind: str, volumes: int) -> None:
        self._state = state
        self._files = LabFiles(state.name)
        self._client = client
        self._name = f"{kind}-{volumes}"
        wishes = (f"{kind}:{SMALLEST[kind]}",) * volumes
        create = EvmCreate(name=self._name, memory_bytes=MEMORY_BYTES, node=NODES[0], volumes=wishes)
        spec = client.evms.create(create).spec
        self._address = spec.nics[0].address
        self._guest = Guest(state.topology, self._address)
        self._guest.wait_first_packet()
        self._volumes: tuple[Volume, ...] = tuple(client.volumes.get(volume) for volume in spec.volumes)

    def run(self, case: Case) -> Run:
        """Migrate it once to the other node."""
        if case.io == BUSY:
            for volume in self._volumes:
                self._guest.start_journal(volume.serial, JOURNAL_HZ)
            self._written(WARM)
            self._guest.ask("journal mark")
        with Probing(self._files, {self._name: self._address}) as probing:
            probing.mark("migration")
            migration = self._migrate(case)
            probing.mark("after")
            journals = self._end() if case.io == BUSY else []
            gap_ms = float(window(probing.stop(), self._name, "migration")["gap_ms"])
        report = migration.report
        pause_ms = _known(report.vcpu_pause_ms, "vcpu_pause_ms", migration)
        beside_ms = 0.0 if case.name == GP3 else pause_ms
        return Run(
            vcpu_pause_ms=pause_ms,
            network_gap_ms=gap_ms,
            qemu_downtime_ms=_known(report.qemu_downtime_ms, "qemu_downtime_ms", migration),
            source_brownout_s=_known(report.stages.source_brownout_s, "source_brownout_s", migration),
            target_brownout_s=_known(report.stages.target_brownout_s, "target_brownout_s", migration),
            stall_ms=max(journal["longest_stall_ms"] for journal in journals) + beside_ms if journals else None,
            io_errors=sum(journal["errors"] for journal in journals),
            acked_lost=sum(self._lost(journal) for journal in journals),
            journal_hz=min(journal["rate_hz"]["achieved"] for journal in journals) if journals else None,
            steps=tuple(
                {name: getattr(move, name) for name in ("hold_s", "detach_s", "attach_s", "land_s", "held_ms")}
                for move in report.volumes
            ),
        )

    def _migrate(self, case: Case) -> Migration:
        source = self._client.evms.get(self._name).owner
        target = next(node for node in NODES if node != source)
        order = VolumeOrder.CLASSIC if case.name == CLASSIC else VolumeOrder.RESUME_FIRST
        begun = self._client.migrations.start(self._name, target=target, policy={"volume_order": order.value})
        *_, ended = self._client.migrations.events(begun.id)
        if ended.outcome is not Outcome.COMPLETED:
            raise HostError(f"migration {ended.id} ended {ended.outcome}: {ended.cause}")
        return ended

    def _end(self) -> list[dict[str, Any]]:
        """Stop the journals once each has written on the target, and return how they were."""
        self._written(WARM)
        journals: list[dict[str, Any]] = self._guest.ask("journal stop")
        if len(journals) != len(self._volumes):
            raise HostError(f"{self._name} has {len(journals)} journals on {len(self._volumes)} volumes")
        return journals

    def _written(self, records: int) -> None:
        """Return once every journal has so many records more on its volume than now."""
        began_s, before = time.monotonic(), self._acked()
        while any(now < before[serial] + records for serial, now in self._acked().items()):
            if time.monotonic() > began_s + PATIENCE_S:
                raise HostError(f"the journals of {self._name} do not go on: {self._guest.ask('journal status')}")
            time.sleep(0.1)

    def _acked(self) -> dict[str, int]:
        return {journal["serial"]: int(journal["acked_seq"]) for journal in self._guest.ask("journal status")}

    def _lost(self, journal: dict[str, Any]) -> int:
        """Return how many records the guest was told were on the volume and are not. Raise for a broken chain."""
        (volume,) = (volume for volume in self._volumes if volume.serial == journal["serial"])
        found = check_journal(volume_file(self._files, volume))
        if not found.ok:
            raise HostError(f"the journal on {volume.id} is broken: {'; '.join(found.errors)}")
        return found.missing(journal["acked_seq"])


def _known(figure: float | None, name: str, migration: Migration) -> float:
    if figure is None:
        raise HostError(f"the report of {migration.id} has no {name}")
    return figure


def in_turn(cases: Sequence[Case]) -> list[Case]:
    """Return every run of every case, spread evenly; of two neighbours neither always comes first."""
    rounds = max(case.runs for case in cases)
    order: list[Case] = []
    for number in range(rounds):
        due = [case for case in cases if (number + 1) * case.runs // rounds > number * case.runs // rounds]
        order += due if number % 2 == 0 else due[::-1]
    return order


def measure(state: LabState, cases: Sequence[Case], console: Console) -> dict[Case, list[Run]]:
    found: dict[Case, list[Run]] = {case: [] for case in cases}
    with Client.from_context(state.name) as client:
        subjects = {}
        for case in cases:
            if (key := (case.name.split()[0], case.volumes)) not in subjects:
                began_s = time.monotonic()
                subjects[key] = Subject(state, client, *key)
                console.print(f"an EVM with {key[1]} {key[0]}: answers after {time.monotonic() - began_s:.1f} s")
        began_s, order = time.monotonic(), in_turn(cases)
        for number, case in enumerate(order, 1):
            run = subjects[case.name.split()[0], case.volumes].run(case)
            found[case].append(run)
            left_s = (time.monotonic() - began_s) / number * (len(order) - number)
            stall = "" if run.stall_ms is None else f", I/O stood {run.stall_ms:.0f} ms"
            console.print(
                f"{number:3} of {len(order)}: {case!s:28} vCPUs paused {run.vcpu_pause_ms:.1f} ms, network"
                f" {run.network_gap_ms:.0f} ms{stall}; {left_s / 60:.1f} min left"
            )
    return found


def machine() -> dict[str, Any]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    load = [round(each, 2) for each in os.getloadavg()]
    return {
        "cpu": model[1] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "load": load,
    }


def terminated(number: int, frame: FrameType | None) -> None:
    """Unwind as for Ctrl-C, so that the lab is cleared."""
    sys.exit(128 + number)


def main() -> int:
    """Measure, print, write; the exit status says whether every demand is met."""
    parser = argparse.ArgumentParser(description="Measure what volumes cost in a migration.")
    parser.add_argument("--output", type=Path, default=Path("build/bench/volumes.json"))
    parser.add_argument("--runs", type=int, default=RUNS, help="at most so many of each case")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs: at least 1")
    signal.signal(signal.SIGTERM, terminated)
    console = Console(highlight=False, width=WIDTH)
    options.output.unlink(missing_ok=True)
    ran_on = machine()
    first = before_others()
    if not first:
        console.print("not allowed to run before other processes: their load is measured too")
    cases = [Case(case.name, case.volumes, case.io, min(case.runs, options.runs)) for case in CASES]
    try:
        state = up(Options(NAME, len(NODES), cloud=Profile.AWS), console.print)
        try:
            with Client.from_context(state.name) as client:
                versions = client.nodes.get(NODES[0]).report.versions
            found = measure(state, cases, console)
        finally:
            down(LabFiles(NAME))
    except EmpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows = [row(case, runs) for case, runs in found.items()]
    demands = verdict(rows, (AWS.detach_s + AWS.attach_s) * 1000)
    ran_on |= {"load_at_end": machine()["load"]}
    ran_on |= {"qemu": versions.qemu, "accel": versions.accelerator, "before_others": first}
    console.print(f"\n{ran_on['cpus']} x {ran_on['cpu']}, QEMU {versions.qemu} ({versions.accelerator})", table(rows))
    console.print(steps_table(rows))
    for what, ok, figures in demands:
        console.print(f"{'ok    ' if ok else 'FAILED'} {what}: {figures}")
    record = {
        "machine": ran_on,
        "journal_hz": JOURNAL_HZ,
        "rows": rows,
        "verdict": [{"demand": what, "ok": ok, "figures": figures} for what, ok, figures in demands],
        "runs": [asdict(case) | asdict(run) for case, runs in found.items() for run in runs],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(ok for _, ok, _ in demands) else 1


if __name__ == "__main__":
    sys.exit(main())
