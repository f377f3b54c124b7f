"""What QEMU does by itself, and how it fails. The numbers are the design's facts about QEMU (docs/design/0001)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from emp.migration import events as e
from emp.migration.events import Event, Stream, StreamMoved
from tests.search.world import Qemu, World, put, runs, spent, with_qemu

STREAMING = ("copy", "pre", "dev")
EXECUTES = ("run", "copy")

GUARDED = {"pre": "pre-switchover", "dev": "device", "comp": "completed"}
"""a migration's status, as QEMU tells its guard"""

Guarding = Callable[[str], list[str]]
"""migration status -> the commands that the guard sends when that has lasted too long"""
Tell = Callable[[World, int, int, Event], World]
"""(world, node, migration, event): into the inbox of that role"""
Way = tuple[bool, tuple[Any, ...], World]


def target_of(w: World, i: int) -> int | None:
    """The node whose machine the one on node ``i`` streams to, if that still is there."""
    qemu = w.nodes[i].qemu
    assert qemu is not None
    for j, node in enumerate(w.nodes):
        if j != i and node.qemu and node.qemu.made == qemu.to:
            return j
    return None


def broken(w: World, i: int, tell: Tell) -> Iterator[World]:
    """The source resumes the guest by itself (fact 1); the target dies, or loads late and stands there (fact 7)."""
    qemu = w.nodes[i].qemu
    assert qemu is not None
    m, j = qemu.to // 10, target_of(w, i)
    there = w.nodes[j].qemu if j is not None else None

    def back(w: World) -> World:
        return tell(runs(w, i), i, m, StreamMoved(Stream.BROKEN))

    if j is not None and there is not None and there.status == "inc":
        yield back(tell(with_qemu(w, j, None), j, m, e.MachineGone()))
        if qemu.status == "dev":
            yield back(with_qemu(w, j, there._replace(status="late", stale=True)))
    else:
        yield back(w)


def _guarded(w: World, i: int, qemu: Qemu, tell: Tell, guard: Guarding) -> Iterator[Way]:
    """The agent is gone and the switchover takes too long: what the guard sends, and what QEMU makes of it (R12)."""
    for command in guard(GUARDED[qemu.status]):
        if command in ("yank", "migrate_cancel") and qemu.status in STREAMING:
            for back in broken(w, i, tell):
                yield False, ("guard sends", command), back
            return  # once it is cancelled nothing is left to be guarded; after completed both do nothing (fact 1)
        if command == "cont" and qemu.status == "comp":
            yield False, ("guard sends", command), runs(w, i)


def moves(w: World, i: int, tell: Tell, guard: Guarding) -> Iterator[Way]:
    """What may happen to the machine of node ``i``."""
    qemu = w.nodes[i].qemu
    if qemu is None:
        return
    if qemu.status in STREAMING:
        yield from _streams(w, i, qemu, tell)
    if not w.nodes[i].up and qemu.status in GUARDED:
        yield from _guarded(w, i, qemu, tell, guard)
    if qemu.status == "late":
        loaded = with_qemu(w, i, qemu._replace(status="load"))
        yield False, ("QEMU has loaded late", i), tell(loaded, i, qemu.made // 10, StreamMoved(Stream.COMPLETED))
    if qemu.status == "cont":
        ran = runs(w, i)
        yield False, ("QEMU runs the cont in its socket", i), tell(ran, i, qemu.made // 10, e.GuestRuns())
        if not w.nodes[i].up:  # fact 9: with the agent that sent it gone, it may be dropped
            yield False, ("QEMU drops the cont in its socket", i), with_qemu(w, i, qemu._replace(status="load"))
    if qemu.status == "run" and w.left.io:
        yield True, ("storage error stops the guest", i), with_qemu(spent(w, "io"), i, qemu._replace(status="iostop"))
    if qemu.status in ("run", "copy") and w.left.halt:
        yield True, ("the guest shuts down", i), _halts(spent(w, "halt"), i, qemu, tell)
    if w.left.die:
        for dead in _dies(spent(w, "die"), i, qemu, tell):
            yield True, ("QEMU dies", i), dead


def _streams(w: World, i: int, qemu: Qemu, tell: Tell) -> Iterator[Way]:
    m, j = qemu.to // 10, target_of(w, i)
    there = w.nodes[j].qemu if j is not None else None
    if j is None or there is None or w.c.cut:
        for back in broken(w, i, tell):
            yield False, ("QEMU finds its target gone", i), back
        return
    if qemu.status == "copy" and there.status == "inc":
        paused = with_qemu(w, i, qemu._replace(status="pre"))
        yield False, ("QEMU pre-switchover", i), tell(paused, i, m, StreamMoved(Stream.PRE_SWITCHOVER))
    if qemu.status == "dev" and there.status == "inc":
        loaded = with_qemu(w, j, there._replace(status="load", stale=qemu.stale))
        yield False, ("QEMU loaded", j), tell(loaded, j, m, StreamMoved(Stream.COMPLETED))
    if qemu.status == "dev" and there.status in ("load", "refused", "cont", "run"):  # fact 2: return-path
        sent = with_qemu(w, i, qemu._replace(status="comp"))
        yield False, ("QEMU completed", i), tell(sent, i, m, StreamMoved(Stream.COMPLETED))
    if w.left.stream:
        for back in broken(spent(w, "stream"), i, tell):
            yield True, ("stream broken, or yanked by the guard", i), back


def _halts(w: World, i: int, qemu: Qemu, tell: Tell) -> World:
    halted = with_qemu(w, i, qemu._replace(status="halt", to=0))
    for role in w.nodes[i].roles:
        halted = tell(halted, i, role.m, e.AbortAsked("the guest has shut itself down"))
    j = target_of(w, i) if qemu.status in STREAMING else None
    if j is not None:
        there = w.nodes[j].qemu
        assert there is not None
        halted = tell(with_qemu(halted, j, None), j, there.made // 10, e.MachineGone())
    return halted


def _dies(w: World, i: int, qemu: Qemu, tell: Tell) -> Iterator[World]:
    gone = put(w, i, w.nodes[i]._replace(qemu=None))
    for role in w.nodes[i].roles:
        gone = tell(gone, i, role.m, e.MachineGone())
    j = target_of(w, i) if qemu.status in STREAMING else None
    there = w.nodes[j].qemu if j is not None else None
    if j is None or there is None or there.status != "inc":
        yield gone
        return
    yield tell(with_qemu(gone, j, None), j, there.made // 10, e.MachineGone())
    if qemu.status == "dev":  # all of it was on its way already
        yield with_qemu(gone, j, there._replace(status="late"))
