"""``emp lab demo``: a lab of its own, one EVM that moves there and back under load, and what its clients saw of it.

The pool is used as any user would: its REST API, and ``emp migrate`` itself, whose wall time counts. What must hold is
checked from outside: by the client's prober, by the guest's own verification, and in the volume server's file.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from emp.client import Client
from emp.client.context import invoking_user
from emp.host.run import run_sync
from emp.lab.demo_report import CHECKS, closing_table
from emp.lab.down import down, uninterrupted
from emp.lab.guest_control import Guest
from emp.lab.journal_check import check_journal
from emp.lab.moves import Move, entry, move
from emp.lab.probing import Probing
from emp.lab.residue import Residue
from emp.lab.state import LabFiles, LabState
from emp.lab.topology import CLIENT, VOL, Topology
from emp.lab.up import Options, up
from emp.model.api import EvmCreate
from emp.model.errors import HostError, NotFound
from emp.model.evm import Evm
from emp.model.names import format_size
from emp.model.volume import Volume

NAME = "demo"
EVM = "web"
POD = "shop"
EVM_BYTES = 512 << 20
VOLUME_BYTES = 64 << 20
REWRITTEN_BYTES = 64 << 20
REWRITE_BYTES_PER_S = 20_000_000
JOURNAL_HZ = 200
UDP_HZ = 1000
PAGE_BYTES = 4096
ROUTE = ("n1", "n2", "n1")


@dataclass
class Demo:
    """One run: what has been measured and checked so far."""

    console: Console
    began_s: float = field(default_factory=time.monotonic)
    qemu: str = ""
    accel: str = ""
    checks: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(CHECKS, False))
    moves: list[Move] = field(default_factory=list)

    def say(self, what: str, text: str) -> None:
        """Print one line of the story, with the seconds since the start."""
        self.console.print(f"{time.monotonic() - self.began_s:5.1f} s  {what:<9} {text}", markup=False)

    def result(self) -> dict[str, Any]:
        return {
            "ok": all(self.checks.values()) and len(self.moves) == 2,
            "qemu": self.qemu,
            "accel": self.accel,
            "checks": self.checks,
            "migrations": [entry(move) for move in self.moves],
        }


def run(output: Path | None = None, *, name: str = NAME) -> bool:
    """Run the demo and return whether every check held; the result goes to ``output`` as JSON.

    Raises ``AlreadyExists`` when a lab of that name is up. Nothing is left, whatever happens.
    """
    if output is not None:
        output.unlink(missing_ok=True)
    demo = Demo(Console(highlight=False, soft_wrap=True))
    residue = Residue.watch(Topology(name, 2))
    demo.say("lab", "two nodes, a controller, a volume server and a client")
    began_at = time.time()
    try:
        with _lab(Options(name, 2), demo) as state:
            _there_and_back(state, demo)
    except BaseException:
        _clear_ours(name, began_at)  # in case that Ctrl-C came just as the lab was being cleared
        raise
    left = residue.left()
    demo.checks["nothing_left"] = not left
    _conclude(demo, left)
    result = demo.result()
    if output is not None:
        _write(output, result)
    return bool(result["ok"])


@contextmanager
def _lab(options: Options, demo: Demo) -> Iterator[LabState]:
    state = up(options, lambda line: demo.say("", line))
    try:
        yield state
    finally:
        with uninterrupted():
            down(LabFiles(options.name))


def _clear_ours(name: str, began_at: float) -> None:
    """Clear the lab if it is the one that this run made, and not another one that made this run fail."""
    files = LabFiles(name)
    with uninterrupted(), contextlib.suppress(NotFound):
        if files.load().created_at >= began_at:
            down(files)


def _there_and_back(state: LabState, demo: Demo) -> None:
    with Client.from_context(state.name) as client:
        versions = client.nodes.get(ROUTE[0]).report.versions
        demo.qemu, demo.accel = versions.qemu, versions.accelerator
        evm = _create(client, state, demo)
        volume = client.volumes.get(evm.spec.volumes[0])
        guests = {"evm": Guest(state.topology, evm.spec.nics[0].address)}
        guests["pod"] = Guest(state.topology, evm.spec.pods[0].address)
        _load(guests["evm"], volume, demo)
        before = _addresses(evm, state)
        boots = {name: guest.ask("status")["boot_id"] for name, guest in guests.items()}
        with Probing(
            LabFiles(state.name), {name: guest.address for name, guest in guests.items()}, rate_hz=UDP_HZ
        ) as probing:
            for target in ROUTE[1:]:
                demo.say("migrate", f"{EVM} to {target}")
                demo.moves.append(move(client, probing, EVM, target))
            report = probing.stop()
        for done in demo.moves:
            done.read_windows(report)
        after = _addresses(client.evms.get(EVM), state)
        demo.checks |= {
            "same_addresses": before == after and len(before) == 4,
            "same_boot": all(_same_boot(report["targets"][name], boots[name]) for name in guests),
            "memory_intact": memory_intact(guests["evm"]),
            "tcp_alive": all(_tcp_alive(report["targets"][name]["tcp"]) for name in guests),
            "volume_intact": volume_intact(guests["evm"], LabFiles(state.name), volume),
        }


def _load(guest: Guest, volume: Volume, demo: Demo) -> None:
    guest.ask(f"memory {REWRITTEN_BYTES} {REWRITE_BYTES_PER_S}")
    guest.start_journal(volume.serial, JOURNAL_HZ)
    demo.say("load", f"{format_size(REWRITTEN_BYTES)} of memory rewritten at {REWRITE_BYTES_PER_S / 1e6:.0f} MB/s")
    demo.say("", f"{JOURNAL_HZ} records a second to its io2 volume of {format_size(volume.size_bytes)}")
    demo.say("", f"UDP at {UDP_HZ} Hz and a TCP connection, to EVM and pod")


def _create(client: Client, state: LabState, demo: Demo) -> Evm:
    began_s = time.monotonic()
    wanted = EvmCreate(name=EVM, memory_bytes=EVM_BYTES, node=ROUTE[0], pods=(POD,), volumes=(f"io2:{VOLUME_BYTES}",))
    evm = client.evms.create(wanted)
    for address in (evm.spec.nics[0].address, evm.spec.pods[0].address):
        Guest(state.topology, address).wait_first_packet()
    demo.say("EVM", f"{EVM}, {format_size(EVM_BYTES)}, on {ROUTE[0]}: answers after {time.monotonic() - began_s:.1f} s")
    demo.say("", f"{evm.spec.nics[0].address} is its own, {evm.spec.pods[0].address} its pod's ({POD})")
    return evm


def _addresses(evm: Evm, state: LabState) -> frozenset[tuple[str, str, str]]:
    """Return (where it was seen, IP, MAC): as the controller has them, and as the client's neighbour table does."""
    wanted = {address for _, address in evm.spec.addresses}
    neighbours = json.loads(run_sync("ip", "-n", state.topology.namespace(CLIENT.name), "-json", "neigh", "show"))
    return frozenset(
        [("controller", address, mac) for mac, address in evm.spec.addresses]
        + [("wire", one["dst"], one["lladdr"]) for one in neighbours if one["dst"] in wanted and "lladdr" in one]
    )


def _same_boot(target: dict[str, Any], boot_id: str) -> bool:
    totals = (target["udp"]["total"], target["tcp"]["total"])
    return all(total["boot_ids"].keys() == {boot_id} and total["counters_monotone"] for total in totals)


def _tcp_alive(tcp: dict[str, Any]) -> bool:
    return bool(tcp["connected"] and not tcp["resets"] and not tcp["reconnects"] and tcp["total"]["received"])


def memory_intact(guest: Guest) -> bool:
    verified = guest.ask("verify")
    return bool(verified["mismatches"] == 0 and verified["pages"] * PAGE_BYTES == REWRITTEN_BYTES)


def volume_intact(guest: Guest, files: LabFiles, volume: Volume) -> bool:
    """Whether the volume server's own file holds every record that the guest was told is safe, and all of one boot."""
    journal = guest.ask(f"journal stop {volume.serial}")[0]
    found = check_journal(volume_file(files, volume))
    return found.ok and not found.missing(journal["acked_seq"]) and not journal["errors"] and len(found.boot_ids) == 1


def volume_file(files: LabFiles, volume: Volume) -> Path:
    """Return the file in which the lab's volume server keeps a volume; ``HostError`` if there is none."""
    for path in files.data(VOL.name).rglob(f"*{volume.id}*"):
        if path.is_file() and path.stat().st_size == volume.size_bytes:
            return path
    raise HostError(f"the volume server has no file of {volume.id}")


def _conclude(demo: Demo, left: list[str]) -> None:
    demo.console.print()
    demo.console.print(closing_table(demo.moves))
    demo.console.print()
    for name, meaning in CHECKS.items():
        verdict = "ok    " if demo.checks[name] else "FAILED"
        demo.console.print(f"{verdict} {name:<15} {meaning}", style=None if demo.checks[name] else "red", markup=False)
    for thing in left:
        demo.console.print(f"       left: {thing}", markup=False)
    demo.say("", "done" if demo.result()["ok"] else "FAILED")


def _write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")
    user = invoking_user()
    if user.pw_uid != os.geteuid():
        os.chown(path, user.pw_uid, user.pw_gid)
