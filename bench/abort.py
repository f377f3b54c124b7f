"""How soon an aborted EVM runs on its source again, in each stage before the commit: ``make bench-abort``.

A migration is held in a stage by the daemons' fault points and aborted there through the controller, as with ``emp
migration abort``. ``back_ms`` is from that order to the source's RESUME (0 where the guest was never paused),
``answered_ms`` until the answer. The report's ``abort_pause_ms`` also holds the time for which this bench kept the
guest in the stage. ``left_bytes`` is of the source's last look at QEMU before the pause.
Writes ``build/bench/abort.json``.

==================  ===============================================================================================
pre-copy            memory is being sent, at a low rate
pre-switchover      the guest is paused, the source has not yet been told to go on
device              the target's QEMU is stopped (SIGSTOP); the little that is left fits the sockets' buffers
completed           all is sent and loaded, and the source has not heard so: only ``cont`` brings the guest back
hung target         as ``device``, with more left than the buffers take: QEMU hears nothing but an out-of-band ``yank``
==================  ===============================================================================================
"""

from __future__ import annotations

import argparse
import json
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
from emp.client.local import LocalAgent
from emp.host.schedule import before_others
from emp.lab import places, verbs
from emp.lab.down import down
from emp.lab.guest_control import Guest
from emp.lab.state import LabFiles, LabState
from emp.lab.up import Options, up
from emp.model.api import EvmCreate
from emp.model.errors import EmpError, HostError
from emp.model.migration import Migration, Outcome
from emp.model.orders import RoleStatus

NAME = "bench-abort"
EVM = "aborted"
SOURCE, TARGET = "n1", "n2"
RUNS = 10
MEMORY_BYTES = 256 << 20
REWRITTEN_BYTES, REWRITE_BYTES_PER_S = 128 << 20, 800_000_000
"""so that a stream which may go over at once does so with more left than the sockets' buffers take"""
STAGES = {"pre-copy": 200.0, "pre-switchover": 200.0, "device": 200.0, "completed": 200.0, "hung target": 500.0}
"""upper bounds of the medians, in ms"""
SLOW_BYTES_PER_S = 4_000_000
HELD_S = 60.0
PATIENCE_S = 60.0
CONTINUE, LOADED = "source.continue-stream", "link.loaded.send"


class Bench:
    """One lab, one EVM on its source, and the migrations that do not come about."""

    def __init__(self, state: LabState, client: Client, guest: Guest) -> None:
        self._files = LabFiles(state.name)
        self._client = client
        self._guest = guest
        root = Path(f"/proc/{places.init_of(self._files, SOURCE).pid}/root")
        self._local = LocalAgent(root / "run/emp/agent.sock")

    def abort_in(self, stage: str) -> dict[str, Any]:
        """Hold a migration in ``stage``, abort it there, and return the run's figures."""
        policy: dict[str, Any] = {"blackout_deadline_s": HELD_S}
        if stage == "pre-copy":
            policy["max_bandwidth_bytes_per_s"] = SLOW_BYTES_PER_S
        elif stage == "pre-switchover":
            self._arm(SOURCE, f"{CONTINUE}.before", "drop")
        elif stage == "completed":
            self._arm(TARGET, LOADED, "drop", times=0)
        else:
            self._arm(SOURCE, f"{CONTINUE}.before", "delay:1000")  # time to stop the target's QEMU
            if stage == "hung target":
                policy["max_blackout_ms"] = 60_000
        rewrites = stage == "hung target"
        self._guest.ask(f"memory {REWRITTEN_BYTES} {REWRITE_BYTES_PER_S}" if rewrites else "memory 0 0")
        moving = self._client.migrations.start(EVM, target=TARGET, policy=policy)
        left_bytes = self._reach(stage, moving)
        run = self._abort(moving)
        for node in (SOURCE, TARGET):
            faults.disarm(self._files.faults(node))
            (self._files.faults(node) / faults.HITS).write_text("")
        return {"stage": stage, "left_bytes": left_bytes, **run}

    def _reach(self, stage: str, moving: Migration) -> int | None:
        """Return once the migration stands in ``stage``; with what its source's QEMU had left to send."""
        match stage:
            case "pre-copy":
                self._wait(lambda: self._client.migrations.get(moving.id).progress.sent_bytes, stage)
            case "pre-switchover":
                self._wait(lambda: self._reached(SOURCE, f"{CONTINUE}.after"), stage)
            case "completed":
                self._wait(lambda: self._reached(TARGET, LOADED), stage)
                time.sleep(0.1)  # the source's own ``completed`` comes within milliseconds of it, and shows nowhere
            case _:
                self._wait(lambda: self._reached(SOURCE, f"{CONTINUE}.before"), "pre-switchover")
                verbs.stop(self._files, TARGET, f"qemu:{EVM}")
                self._wait(lambda: self._reached(SOURCE, f"{CONTINUE}.after"), stage)
                time.sleep(0.2)  # QEMU fills the buffers
        return self._role(moving).progress.remaining_bytes

    def _abort(self, moving: Migration) -> dict[str, Any]:
        began_s = time.time()
        self._client.migrations.abort(moving.id, reason="bench")
        answered_s = time.time()
        resumed_at_s = self._role(moving).figures.resumed_at_s
        self._wait(lambda: self._client.migrations.get(moving.id).ended_at, "the report")
        ended = self._client.migrations.get(moving.id)
        if ended.outcome is not Outcome.ABORTED:
            raise HostError(f"migration {ended.id} ended {ended.outcome}: {ended.cause}")
        return {
            "back_ms": round(max(0.0, resumed_at_s - began_s) * 1000, 3) if resumed_at_s else 0.0,
            "answered_ms": round((answered_s - began_s) * 1000, 3),
            "abort_pause_ms": ended.report.abort_pause_ms,
        }

    def _role(self, moving: Migration) -> RoleStatus:
        (role,) = (role for role in self._local.status().roles if role.migration == moving.id)
        return role

    def _arm(self, node: str, point: str, action: str, *, times: int = 1) -> None:
        faults.arm(self._files.faults(node), point, action, times=times)

    def _reached(self, node: str, point: str) -> bool:
        return any(hit.point == point for hit in faults.hits(self._files.faults(node)))

    @staticmethod
    def _wait(condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > deadline:
                raise HostError(f"{what} did not come in {PATIENCE_S:.0f} s")
            time.sleep(0.005)


def measure(state: LabState, runs: int, console: Console) -> list[dict[str, Any]]:
    """Return one entry per aborted migration, the stages in turn."""
    done: list[dict[str, Any]] = []
    with Client.from_context(state.name) as client:
        spec = client.evms.create(EvmCreate(name=EVM, memory_bytes=MEMORY_BYTES, node=SOURCE)).spec
        guest = Guest(state.topology, spec.nics[0].address)
        guest.wait_first_packet()
        bench = Bench(state, client, guest)
        for number in range(1, runs + 1):
            for stage in STAGES:
                run = bench.abort_in(stage)
                done.append(run)
                console.print(
                    f"{number:3} of {runs}: {stage:15} back in {run['back_ms']:7.1f} ms, answered in"
                    f" {run['answered_ms']:7.1f} ms, paused {run['abort_pause_ms'] or 0:7.1f} ms"
                )
    return done


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return median and worst per stage, and whether the bound was held."""
    found: dict[str, Any] = {}
    for stage, bound_ms in STAGES.items():
        mine = [run for run in runs if run["stage"] == stage]
        back = [run["back_ms"] for run in mine]
        median = statistics.median(back)
        found[stage] = {
            "runs": len(mine),
            "back_ms": {"median": round(median, 3), "worst": max(back)},
            "answered_ms": {"median": round(statistics.median(run["answered_ms"] for run in mine), 3)},
            "bound_ms": bound_ms,
            "held": median <= bound_ms,
        }
    return found


def terminated(number: int, frame: object) -> None:
    """Unwind as for Ctrl-C, so that the lab is cleared."""
    sys.exit(128 + number)


def main() -> int:
    """Measure, print, write; the exit status says whether every abort led back, not how fast it was."""
    parser = argparse.ArgumentParser(description="Measure aborts.")
    parser.add_argument("--output", type=Path, default=Path("build/bench/abort.json"))
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, terminated)
    console = Console(highlight=False, soft_wrap=True)
    options.output.unlink(missing_ok=True)
    first = before_others()
    try:
        state = up(Options(NAME, 2, faults=True), console.print)
        try:
            runs = measure(state, options.runs, console)
        finally:
            down(LabFiles(NAME))
    except EmpError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    record = {"before_others": first, "stages": summary(runs), "runs": runs}
    console.print_json(json.dumps(record["stages"]))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
