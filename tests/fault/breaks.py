"""What breaks in the cells. Each is a script in two parts: up to its ``yield`` the migration is held at its point.

What comes after the ``yield`` happens while the migration goes on: how long the fault lasts, who comes back. What a
script leaves broken at its end stays so until the migration has come to rest or ``LASTING_S`` are over; then the pool
is healed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from emp import faults
from emp.client.client import Client
from emp.host.run import run_sync
from emp.lab import daemons, places, power, scan
from emp.lab.partition import How
from emp.lab.power import Power
from emp.lab.topology import FABRIC, VOL
from emp.model.errors import Conflict, EmpError, NotFound
from emp.model.evm import EvmState
from tests.fault.holds import Hold
from tests.fault.stage import Stage, until
from tests.leaks import outliving

Script = Iterator[None]
Break = Callable[[Stage], Script]

BLACKOUT_DEADLINE_S = 3.0
"""of the cells' policies, as R12's T_d: whoever is stopped or cut off is so for longer"""
LATE_S = 5.0
"""longer than every timer of the cells: stands for the matrix's 30 and 60 seconds"""


def lasts(duration_s: float) -> None:
    """Let a fault go on for a while; nothing is awaited by it."""
    time.sleep(duration_s)  # the length of the fault itself


def kill(party: str, again_s: float | None) -> Break:
    """SIGKILL a daemon; it comes back after ``again_s``, or never (until the pool is healed)."""

    def script(stage: Stage) -> Script:
        stage.kill(party)
        yield
        if again_s is not None:
            lasts(again_s)
            stage.start(party)

    return script


def kill_qemu(party: str) -> Break:
    def script(stage: Stage) -> Script:
        stage.kill_qemu(party)
        yield

    return script


def kill_volumes(stage: Stage) -> Script:
    """The daemon and its exports, as when their machine is reset."""
    init = places.init_of(stage.files, VOL.name)
    scan.kill(
        one.process for one in daemons.daemons(stage.files, stage.pool.topology.place("vol")) if one.pid != init.pid
    )
    yield
    lasts(2.0)
    stage.start("V")


def cut(*pairs: str, how: How = How.DROP, for_s: float | None = LATE_S) -> Break:
    """Cut the wires between parties, written ``"ST"``; mended after ``for_s``, or with the pool."""

    def script(stage: Stage) -> Script:
        for pair in pairs:
            stage.cut(pair[0], pair[1], how)
        yield
        if for_s is not None:
            lasts(for_s)
            for pair in pairs:
                stage.mend(pair[0], pair[1])

    return script


def stop_qemu(party: str) -> Break:
    def script(stage: Stage) -> Script:
        stage.stop_qemu(party)
        stage.keep_frozen(f"QEMU of {party}")
        yield
        lasts(LATE_S)
        stage.cont_qemu(party)

    return script


def stop(party: str) -> Break:
    """SIGSTOP a daemon past all timers. One that is held at its point is frozen already, and stays so."""

    def script(stage: Stage) -> Script:
        stage.stop(party)
        stage.keep_frozen(party)
        yield
        lasts(LATE_S)
        stage.thaw(party)

    return script


def at(party: str, point: str, action: str, times: int = 1, *, also: str | None = None) -> Break:
    """Arm a point that lies ahead, and perhaps another; the cell fails if the first is not reached."""

    def script(stage: Stage) -> Script:
        for armed in filter(None, (point, also)):
            stage.arm(party, armed, action, times=times)
        yield
        stage.wait_point(party, point, action)

    return script


def also_at(party: str, point: str, action: str) -> Break:
    """The migration is aborted, and on the way back something is wrong at a point."""

    def script(stage: Stage) -> Script:
        stage.arm(party, point, action)
        yield from abort(stage)
        stage.wait_point(party, point, action)

    return script


def clocks(stage: Stage) -> Script:
    """Wall clocks jump: an hour on at the source, back at the target, a day on at the controller and the volumes."""
    for party, jump_s in (("S", 3600), ("T", -3600), ("C", 86400), ("V", 86400)):
        stage.arm(party, faults.ANY, f"clock:{jump_s}")
    yield
    for node in (stage.source, stage.target):
        until(lambda node=node: _clock_has_jumped(stage, node), f"the clock of {node} jumps")  # type: ignore[misc]
    with contextlib.suppress(AssertionError):
        until(lambda: not stage.settled(), "the end")
    for party in "STCV":
        stage.arm(party, faults.ANY, "clock:0")


def _clock_has_jumped(stage: Stage, node: str) -> bool:
    return any(hit.action.startswith("clock") for hit in stage.hits(node))


def abort(stage: Stage) -> Script:
    """A user asks for an abort. The answer comes with the decision: not while an agent is frozen."""
    assert stage.migration is not None
    asking = threading.Thread(target=_ask_abort, args=(stage, stage.migration.id), name="abort")
    asking.start()
    until(
        lambda: stage.ended is not None and (stage.ended.abort_asked or stage.ended.outcome), "the abort is asked for"
    )
    yield
    asking.join()


def _ask_abort(stage: Stage, migration: str) -> None:
    with Client(stage.pool.context) as client, contextlib.suppress(Conflict):
        client.migrations.abort(migration)


def abort_twice(stage: Stage) -> Script:
    yield from abort(stage)
    assert stage.migration is not None
    _ask_abort(stage, stage.migration.id)


def abort_refused(stage: Stage) -> Script:
    """Committed, and the controller knows: an abort is answered so."""
    assert stage.migration is not None
    yield
    until(lambda: stage.ended is not None and stage.ended.committed, "the controller knows of the commit")
    with pytest.raises(Conflict):
        stage.client.migrations.abort(stage.migration.id)


def second_migration(stage: Stage) -> Script:
    """Both directions, while the first is open."""
    for target in (stage.third, stage.source):
        with pytest.raises((Conflict, EmpError)):
            stage.subject.begin(target)
    yield


def reboot(party: str) -> Break:
    """The plug is pulled and put back: memory, /run and the network's state are gone, the disk is as it was."""

    def script(stage: Stage) -> Script:
        node = stage.place_of(party)
        power.switch(stage.files, node, Power.OFF)
        yield
        lasts(1.0)
        with outliving(f"the lab {stage.pool.name}"):
            power.switch(stage.files, node, Power.ON)

    return script


def no_flush(stage: Stage) -> Script:
    """The source's volume fails under it: its export is gone, and nobody starts another."""
    exports = daemons.daemons(stage.files, stage.pool.topology.place("vol"))
    stage.stop("V")
    scan.kill(one.process for one in exports if any(f".{stage.source}." in word for word in one.argv))
    yield


def recovered_elsewhere(stage: Stage) -> Script:
    """A person takes the source for lost while the migration goes on, fences both ends, and has the EVM started."""
    stage.cut("C", "S")
    yield
    with contextlib.suppress(AssertionError):
        until(lambda: not stage.client.nodes.get(stage.source).ready, "the source is found down")
    stage.fence(stage.source, "taken for lost")
    with contextlib.suppress(EmpError):
        stage.fence(stage.target, "an end of the open migration")
    with outliving(f"the lab {stage.pool.name}"):
        stage.client.evms.recover(stage.subject.name)


def slow_link(stage: Stage) -> Script:
    """What goes to the target crawls: 8 kB/s through its port of the switch."""
    port = ("dev", stage.target)
    command = ("ip", "netns", "exec", stage.pool.topology.namespace(FABRIC), "tc", "qdisc")
    run_sync(*command, "replace", *port, "root", "tbf", "rate", "64kbit", "burst", "1600", "latency", "5s")
    yield
    lasts(LATE_S)
    run_sync(*command, "del", *port, "root")


def nothing(stage: Stage) -> Script:
    """What is wrong was wrong before."""
    yield


def shut_down(stage: Stage) -> Script:
    """The guest shuts itself down: it stays down until somebody starts it."""
    with contextlib.suppress(EmpError):
        stage.subject.guest().ask("poweroff", timeout_s=1.0)
    yield
    until(lambda: stage.subject.record.state is EvmState.STOPPED, "it is stopped")
    with outliving(f"the lab {stage.pool.name}"):
        stage.client.evms.start(stage.subject.name)


def delete(stage: Stage) -> Script:
    """A user deletes the EVM. The cell ends with another one."""
    evm = stage.subject
    stage.client.evms.delete(evm.name, grace_s=0)
    yield
    with pytest.raises(NotFound):
        stage.client.evms.get(evm.name)
    assert not [node.name for node in stage.pool.topology.node_places if stage.qemu(node.name)]
    stage.evm = None
    stage.ready()


def guest_reboots(stage: Stage) -> Script:
    with contextlib.suppress(EmpError):
        stage.subject.guest().ask("reboot", timeout_s=1.0)
    yield


def journal_swapped(party: str, old: bytes | None) -> Break:
    """The agent comes back with an older journal (``b""``: the one from before the migration), or with none."""

    def script(stage: Stage) -> Script:
        path = stage.files.data(stage.place_of(party)) / "journal"
        stage.kill(party)
        stage.set_aside(path)
        if old is None:
            path.unlink()
        else:
            path.write_bytes(stage.journals[stage.place_of(party)])
        yield
        stage.start(party)

    return script


def followed_by(first: Break, hold: Hold, second: Break) -> Break:
    """Two faults: the migration is held again after the first, and then the second comes."""

    def script(stage: Stage) -> Script:
        hold.arm(stage)
        one = first(stage)
        next(one)
        yield
        next(one, None)
        hold.wait(stage)
        two = second(stage)
        next(two)
        hold.release(stage)
        next(two, None)

    return script


# ---------------------------------------------------------------- what a cell needs before its migration begins


@contextmanager
def target_differs(stage: Stage, **fields: Any) -> Iterator[None]:
    """The record from which a target is made says something else than the source was made from."""
    with stage.forged_spec(**fields):
        yield
