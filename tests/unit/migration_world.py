"""The core's own functions for source and target in a small world: two journals, two QEMUs, messages, faults.

A world is a frozen value, ``moves`` yields every next one. Messages stay deliverable for ever once sent: late, twice or
never. Agents are killed between any two actions and come back by ``emp.migration.recovery``; each QEMU may die, the
stream may break, the link may be lost, a journal write may fail with the record on disk or not, an abort may be asked
for at any time. QEMU does what was measured of it (the numbers are the design's facts about QEMU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from emp.migration import events as e
from emp.migration import source, target
from emp.migration.events import Action, Event, Stream, StreamMoved, Timer, TimerFired
from emp.migration.records import Record, RecordKind
from emp.migration.recovery import resume_source, resume_target
from emp.migration.states import Source, SourcePhase, Target, TargetPhase

K = RecordKind
SourceStep = Callable[[Source, Event], tuple[Source, tuple[Action, ...]]]
TargetStep = Callable[[Target, Event], tuple[Target, tuple[Action, ...]]]


@dataclass(frozen=True)
class Faults:
    """How many of each may still happen."""

    kill_source: int = 0
    kill_target: int = 0
    qemu_source: int = 0
    qemu_target: int = 0
    stream: int = 0
    write: int = 0
    link: int = 0


@dataclass(frozen=True)
class World:
    s: Source | None
    t: Target | None
    """None: that agent is dead"""
    sj: Record
    tj: Record | None
    """the last record on each disk"""
    sq: str = "run"
    """run, copy (runs, pre-copy), pre, dev, comp, dead"""
    tq: str = "none"
    """none, inc, late (cut off, still loading), load, refused (its cont was), run, dead"""
    s_stale: bool = False
    t_stale: bool = False
    """that copy is older than what the other has run since"""
    t_port: bool = False
    s_inbox: tuple[Event, ...] = ()
    t_inbox: tuple[Event, ...] = ()
    """results of actions, in order"""
    to_s: frozenset[Event] = frozenset()
    to_t: frozenset[Event] = frozenset()
    """messages over the link, deliverable for ever"""
    left: Faults = Faults()
    given: bool = False
    """GIVEN has been on disk"""

    def __hash__(self) -> int:
        """Made once: a search looks every world up many times."""
        cached: int | None = self.__dict__.get("_hash")
        if cached is None:
            cached = hash(tuple(self.__dict__.values()))
            object.__setattr__(self, "_hash", cached)
        return cached


def beginning(faults: Faults) -> World:
    s = Source("web", "m", "n2", "p", epoch=1, epoch_target=2, epoch_back=3)
    t = Target("web", "m", "n1", "p", 2, TargetPhase.PREPARED, pid=7, start_ticks=7)
    own = Record(K.OWN, "web", 1)
    prepared = t.record(K.PREPARED)
    return World(s, t, own, prepared, tq="inc", s_inbox=(e.Ordered(),), left=faults)


def moves(w: World, s_step: SourceStep = source.step, t_step: TargetStep = target.step) -> Iterator[tuple[str, World]]:
    """Yield (what happens, the next world). Names that begin with ``fault`` need not happen."""
    if w.s is not None:
        if w.s_inbox:
            yield from _source(replace(w, s_inbox=w.s_inbox[1:]), w.s_inbox[0], s_step, "")
        for message in w.to_s:
            yield from _source(w, message, s_step, "message: ")
        if w.s.phase not in (SourcePhase.DONE, SourcePhase.ABORTED, SourcePhase.LOST):
            yield from _source(w, e.AbortAsked("asked"), s_step, "fault: ")
            yield from _source(w, TimerFired(Timer.BLACKOUT), s_step, "fault: ")
            if not w.s_inbox:  # a timer is set when nothing else is under way
                for timer in (Timer.REPEAT, Timer.RETRY, Timer.ANSWER):
                    yield from _source(w, TimerFired(timer), s_step, "")
    if w.t is not None:
        if w.t_inbox:
            yield from _target(replace(w, t_inbox=w.t_inbox[1:]), w.t_inbox[0], t_step, "")
        for message in w.to_t:
            yield from _target(w, message, t_step, "message: ")
        yield from _target(w, e.AbortAsked("asked"), t_step, "fault: ")
        if not w.t_inbox:
            yield from _target(w, TimerFired(Timer.REPEAT), t_step, "")
    yield from _qemu(w)
    yield from _faults(w)
    yield from _restarts(w)


# ---------------------------------------------------------------- roles


def _source(w: World, event: Event, s_step: SourceStep, kind: str) -> Iterator[tuple[str, World]]:
    assert w.s is not None
    state, actions = s_step(w.s, event)
    if state == w.s and not actions and kind:
        return
    yield from _carried_out(replace(w, s=state), actions, f"{kind}S {event}", _source_act, "kill_source")


def _target(w: World, event: Event, t_step: TargetStep, kind: str) -> Iterator[tuple[str, World]]:
    assert w.t is not None
    state, actions = t_step(w.t, event)
    if state == w.t and not actions and kind:
        return
    yield from _carried_out(replace(w, t=state), actions, f"{kind}T {event}", _target_act, "kill_target")


Act = Callable[[World, Action], Iterator[tuple[str, World]]]


def _carried_out(w: World, actions: tuple[Action, ...], name: str, act: Act, kill: str) -> Iterator[tuple[str, World]]:
    """Every way that the actions can go, and the agent killed after each of them."""
    worlds = [(name, w)]
    for action in actions:
        after: list[tuple[str, World]] = []
        for before_name, before in worlds:
            if getattr(before.left, kill):
                yield f"fault: {before_name}, killed before {type(action).__name__}", _killed(before, kill)
            after += [(before_name + suffix, done) for suffix, done in act(before, action)]
        worlds = after
    yield from worlds


def _killed(w: World, kill: str) -> World:
    left = replace(w.left, **{kill: getattr(w.left, kill) - 1})
    if kill == "kill_source":
        return replace(w, s=None, s_inbox=(), left=left)
    return replace(w, t=None, t_inbox=(), left=left)


def _source_act(w: World, action: Action) -> Iterator[tuple[str, World]]:
    match action:
        case e.WriteRecord(record):
            given = w.given or record.kind is K.GIVEN
            yield "", _s(replace(w, sj=record, given=given), e.Written(record.kind))
            if w.left.write:
                failing = replace(w, left=replace(w.left, write=0))
                failed = e.WriteFailed(record.kind, "EIO")
                yield ", fault: write failed, on disk", _s(replace(failing, sj=record, given=given), failed)
                yield ", fault: write failed", _s(failing, failed)
        case e.StartStream() if w.sq == "run":
            yield "", replace(w, sq="copy")
        case e.ContinueStream() if w.sq == "pre":
            yield "", replace(w, sq="dev")
        case e.CancelStream():
            if w.sq == "comp":  # fact 1: a no-op after completed
                yield "", _s(w, StreamMoved(Stream.COMPLETED))
            elif w.sq in ("copy", "pre", "dev", "run"):
                for broken in _broken(w):
                    yield "", broken
            else:
                yield "", w
        case e.Run() if w.sq in ("comp", "run"):
            yield "", _s(_source_runs(w), e.GuestRuns())
        case e.AwaitGuest() if w.sq == "run":
            yield "", _s(w, e.GuestRuns())
        case e.KillMachine():
            yield "", _s(replace(w, sq="dead"), e.MachineGone())
        case e.SendGo():
            yield "", replace(w, to_t=w.to_t | {e.GoArrived(2, "p")})
        case e.SendAborted():
            yield "", replace(w, to_t=w.to_t | {e.SourceAborted()})
        case e.Ask():
            yield "", replace(w, to_t=w.to_t | {e.PeerAsks("p")})
        case _:
            yield "", w


def _target_act(w: World, action: Action) -> Iterator[tuple[str, World]]:
    match action:
        case e.WriteRecord(record):
            yield "", _t(replace(w, tj=record), e.Written(record.kind))
            if w.left.write:
                failing = replace(w, left=replace(w.left, write=0))
                failed = e.WriteFailed(record.kind, "EIO")
                yield ", fault: write failed, on disk", _t(replace(failing, tj=record), failed)
                yield ", fault: write failed", _t(failing, failed)
        case e.SendLoaded():
            yield "", replace(w, to_s=w.to_s | {e.TargetLoaded("p")})
        case e.SendAnswer(word):
            yield "", replace(w, to_s=w.to_s | {e.TargetAnswered(word, "p")})
        case e.Ask():
            yield "", replace(w, to_s=w.to_s | {e.PeerAsks("p")})
        case e.SendFailed():
            yield "", replace(w, to_s=w.to_s | {e.TargetFailed("x")})
        case e.OpenPorts():
            yield "", replace(w, t_port=True)
        case e.BlockPorts():
            yield "", replace(w, t_port=False)
        case e.Run() if w.tq == "load":
            yield "", _t(_target_runs(w), e.GuestRuns())
            yield ", fault: cont refused", _t(replace(w, tq="refused"), e.RunRefused("lock"))
        case e.KillMachine():
            yield "", _t(replace(w, tq="dead", t_port=False), e.MachineGone())
        case _:
            yield "", w


def _s(w: World, event: Event) -> World:
    return replace(w, s_inbox=(*w.s_inbox, event)) if w.s is not None else w


def _t(w: World, event: Event) -> World:
    return replace(w, t_inbox=(*w.t_inbox, event)) if w.t is not None else w


# ---------------------------------------------------------------- QEMU by itself, faults, restarts


def _source_runs(w: World) -> World:
    return replace(w, sq="run", t_stale=w.t_stale or w.tq in ("load", "late", "refused", "run"))


def _target_runs(w: World) -> World:
    return replace(w, tq="run", s_stale=True)


def _broken(w: World) -> Iterator[World]:
    """The source resumes the guest by itself (fact 1); the target dies, or loads late and stands there (fact 7)."""
    back = _s(replace(_source_runs(w), sq="run"), StreamMoved(Stream.BROKEN))
    if w.tq == "inc":
        yield _t(replace(back, tq="dead"), e.MachineGone())
        if w.sq == "dev":
            yield replace(back, tq="late")
    else:
        yield back


def _qemu(w: World) -> Iterator[tuple[str, World]]:
    if w.sq == "copy" and w.tq == "inc":
        yield "qemu S: pre-switchover", _s(replace(w, sq="pre"), StreamMoved(Stream.PRE_SWITCHOVER))
    if w.sq == "dev" and w.tq == "inc":
        yield "qemu T: loaded", _t(replace(w, tq="load"), StreamMoved(Stream.COMPLETED))
    if w.tq == "late":
        yield "qemu T: loaded late", _t(replace(w, tq="load", t_stale=True), StreamMoved(Stream.COMPLETED))
    if w.sq == "dev" and w.tq in ("load", "run", "refused"):  # fact 2: return-path
        yield "qemu S: completed", _s(replace(w, sq="comp"), StreamMoved(Stream.COMPLETED))
    if w.sq in ("copy", "pre", "dev") and w.tq in ("dead", "none"):
        for broken in _broken(w):
            yield "qemu S: the target is gone", broken


def _faults(w: World) -> Iterator[tuple[str, World]]:
    left = w.left
    if left.stream and w.sq in ("copy", "pre", "dev"):
        for broken in _broken(replace(w, left=replace(left, stream=0))):
            yield "fault: the stream breaks", broken
    if left.qemu_source and w.sq != "dead":
        dead = replace(w, sq="dead", left=replace(left, qemu_source=0))
        if w.tq == "inc" and w.sq in ("copy", "pre", "dev"):
            dead = _t(replace(dead, tq="dead"), e.MachineGone())
        yield "fault: QEMU S dies", _s(dead, e.MachineGone())
    if left.qemu_target and w.tq not in ("none", "dead"):
        dead = replace(w, tq="dead", t_port=False, left=replace(left, qemu_target=0))
        yield "fault: QEMU T dies", _t(dead, e.MachineGone())
    if left.link:
        lost = replace(w, left=replace(left, link=0))
        yield "fault: the link is lost", _t(_s(lost, e.LinkLost()), e.LinkLost())
    if left.kill_source and w.s is not None:
        yield "fault: agent S killed", _killed(w, "kill_source")
    if left.kill_target and w.t is not None:
        yield "fault: agent T killed", _killed(w, "kill_target")


def _restarts(w: World) -> Iterator[tuple[str, World]]:
    """As ``emp.agent.adoption`` does it."""
    if w.s is None and w.sj.kind in (K.HANDOVER, K.GIVEN):
        state, event = resume_source(w.sj, alive=w.sq != "dead", completed=w.sq == "comp")
        inbox: tuple[Event, ...] = (event,) if w.sq != "dead" else (e.MachineGone(), event)
        yield "agent S back", replace(w, s=state, s_inbox=inbox)
    if w.s is None and w.sj.kind is K.OWN and w.sq == "comp":
        yield "agent S back, runs it", _source_runs(w)
    if w.t is None and w.tj is not None:
        if w.tj.kind is K.PREPARED:
            waiting, event = resume_target(w.tj, alive=w.tq != "dead", loaded=w.tq == "load")
            yield "agent T back", replace(w, t=waiting, t_inbox=(event,))
        elif w.tj.kind is K.ACTIVATED:
            ran = w.tq == "run"
            here = Target("web", "m", "n1", "p", 2, TargetPhase.RUNNING if w.tq != "dead" else TargetPhase.LOST)
            back = replace(w, t=here, t_port=w.tq != "dead")
            if w.tq == "load":
                back, ran = _target_runs(back), True
            yield f"agent T back, {'runs' if ran else 'lost'}", back
        elif w.tj.kind is K.WITHDRAWN:
            gone = Target("web", "m", "n1", "p", 2, TargetPhase.WITHDRAWN)
            yield "agent T back, withdrawn", replace(w, t=gone, tq="dead", t_port=False)
