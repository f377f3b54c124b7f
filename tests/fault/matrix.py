"""The fault matrix: which fault in which column ends how. Data; ``test_matrix`` makes a test of each cell.

Columns: **B** preparation and pre-copy, **P** pre-switchover, **D** device transfer, **H** completed, before GIVEN,
**M** GIVEN until ``cont`` is confirmed, **T** target brownout. Ends: **A** runs on the source as before, **C** runs on
the target, **R** rescued to the source after the commit, **K** a cold restart (the guest sees a crash). With several
letters, each is right. A cell is named ``F<row>.<column>``, with its case where a row has several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from emp.lab.partition import How
from tests.fault import breaks, holds
from tests.fault.breaks import Break
from tests.fault.holds import COLUMNS, Hold
from tests.fault.stage import Stage

ROWS = range(1, 32)
Setup = Callable[[Stage], AbstractContextManager[None]]


def _none(stage: Stage) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Cell:
    """One fault at one moment, and how it has to end."""

    row: int
    column: str
    expected: str
    hold: Hold
    breaks: Break
    case: str = ""
    policy: Mapping[str, Any] = field(default_factory=dict)
    waits: bool = False
    """until the pool is healed the migration must not come to an end"""
    note: str = ""
    quick: bool = False
    setup: Setup = _none
    """round the migration's order"""
    pending: str = ""
    """what the product lacks for it; the cell is played all the same, and counts as failed until it passes"""

    @property
    def name(self) -> str:
        return f"F{self.row}.{self.column}" + (f"-{self.case}" if self.case else "")


def _row(
    row: int,
    script: Break,
    ends: Mapping[str, str],
    *,
    case: str = "",
    hold: Mapping[str, Hold] | None = None,
    policy: Mapping[str, Any] | None = None,
    waits: str = "",
    quick: str = "",
    note: str = "",
    setup: Setup = _none,
    pending: Mapping[str, str] | None = None,
) -> Iterator[Cell]:
    """Yield a row's cells; ``ends``: columns -> letters, ``"BP": "A"`` for several columns that end alike."""
    for columns, expected in ends.items():
        for column in columns:
            yield Cell(
                row, column, expected, (hold or {}).get(column, COLUMNS[column]), script, case, policy or {},
                column in waits, note, column in quick, setup, (pending or {}).get(column, ""),
            )  # fmt: skip


def cells() -> list[Cell]:
    singles = [*_crashes(), *_partitions(), *_stops(), *_storage(), *_messages(), *_people(), *_journals()]
    return [*singles, *_pairs()]


_SCALED = f"the matrix's 60 s are {breaks.LATE_S:.0f} s here, past every timer of the cell's policy"
_GIVEN = {"M": holds.GIVEN}
_HESITATING = {"P": holds.HESITATING}
_COMPLETED = {"H": holds.COMPLETED}


def _crashes() -> Iterator[Cell]:
    for case, again_s in (("1s", 1.0), ("60s", breaks.LATE_S), ("never", None)):
        yield from _row(
            1, breaks.kill("C", again_s), {"BPDHMT": "C"}, case=case, note=_SCALED, quick="H" if case == "1s" else ""
        )
        ends = {"B": "AC", "PD": "A", "H": "AC", "MT": "C"}
        yield from _row(2, breaks.kill("S", again_s), ends, case=case, note=_SCALED, hold=_GIVEN | _COMPLETED)
    yield from _row(1, breaks.at("C", "controller.prepare.after", "kill9"), {"B": "A"}, case="prepare", hold={
        "B": holds.BEGUN})  # fmt: skip
    yield from _row(3, breaks.kill("T", 1.0), {"BPD": "A", "H": "AC", "M": "C", "T": "C"}, quick="M")
    yield from _row(4, breaks.kill_qemu("S"), {"BPD": "K", "HMT": "C"}, hold=_COMPLETED, quick="H")
    ends = {"BPD": "A", "H": "A", "M": "R", "T": "K"}
    yield from _row(5, breaks.kill_qemu("T"), ends, hold=_GIVEN, quick="M")
    yield from _row(5, breaks.kill_qemu("T"), {"M": "K"}, case="activated", hold={"M": holds.ACTIVATED})
    asked = "5 s are 2 s here; until it says that it is loaded the target asks V, so H may go back as P and D may"
    yield from _row(6, breaks.kill_volumes, {"BPDH": "AC", "MT": "C"}, note=asked)
    yield from _row(25, breaks.reboot("S"), {"BPDH": "K", "MT": "C"}, case="S")
    yield from _row(25, breaks.reboot("T"), {"BPDH": "A", "M": "RK", "T": "K"}, case="T")


def _partitions() -> Iterator[Cell]:
    yield from _row(7, breaks.cut("CS"), {"BPDHMT": "C"})
    yield from _row(8, breaks.cut("CT"), {"BPDHMT": "C"})
    for how in How:
        yield from _row(
            9, breaks.cut("ST", how=how, for_s=None), {"BPDH": "A", "M": "C", "T": "C"}, case=how.value, hold=_GIVEN,
            quick="DM" if how is How.DROP else "",
        )  # fmt: skip
    yield from _row(9, breaks.cut("ST", "CS", for_s=None), {"M": "C"}, case="courier too", hold=_GIVEN, waits="M")
    flushed = "by D the source's QEMU has flushed and let go of its disks: nothing of it asks the volume any more"
    flushed += (
        "; the target's last look at a volume that one node alone can have is by way of the source, and may still fail"
    )
    yield from _row(10, breaks.cut("SV"), {"PDH": "AC", "M": "C", "T": "C"}, note=flushed)
    yield from _row(11, breaks.cut("TV"), {"BPDH": "A", "MT": "C"})
    yield from _row(12, breaks.cut("CV"), {"BPDHMT": "C"})
    everybody = ("CT", "ST", "TV")
    yield from _row(13, breaks.cut(*everybody), {"BPDH": "A", "T": "C"})
    yield from _row(13, breaks.cut(*everybody, for_s=None), {"M": "C"}, hold=_GIVEN, waits="M")
    everybody = ("CS", "ST", "SV")
    yield from _row(14, breaks.cut(*everybody), {"BPDH": "A", "MT": "C"})
    yield from _row(14, breaks.cut(*everybody, for_s=None), {"M": "C"}, case="before GO", hold=_GIVEN, waits="M")


def _stops() -> Iterator[Cell]:
    late = f"30 s are {breaks.LATE_S:.0f} s here, past every timer of the cell's policy"
    short = {"deadline_s": 4.0}
    yield from _row(15, breaks.stop_qemu("S"), {"BPD": "A", "HMT": "C"}, policy=short, note=late, hold=_COMPLETED)
    yield from _row(16, breaks.stop_qemu("T"), {"BPD": "A", "H": "A", "MT": "C"}, policy=short, note=late, quick="D",
        hold={"M": holds.ACTIVATED})  # fmt: skip
    yield from _row(17, breaks.stop("C"), {"BPDHMT": "C"}, case="C", note=late)
    yield from _row(
        17, breaks.stop("S"), {"B": "AC", "PD": "A", "H": "AC", "MT": "C"}, case="S", note=late, hold=_GIVEN
    )
    yield from _row(17, breaks.stop("T"), {"B": "AC", "PD": "A", "H": "AC", "MT": "C"}, case="T", note=late)
    yield from _row(20, breaks.slow_link, {"B": "A", "D": "A", "T": "C"}, case="link", policy={"deadline_s": 3.0})
    yield from _row(20, breaks.at("T", "target.send-loaded.before", "delay:5000"), {"H": "A"}, case="slow T",
        hold={"H": holds.PRE_SWITCHOVER})  # fmt: skip
    yield from _row(20, breaks.at("T", "target.write-record-activated.before", "delay:4000"), {"M": "C"}, case="slow T",
        hold={"M": holds.GIVEN})  # fmt: skip
    yield from _row(21, breaks.clocks, {"BPDHMT": "C"})


def _storage() -> Iterator[Cell]:
    for what in ("EIO", "ENOSPC"):
        bad = f"raise:{what}"
        handover, prepared = ("journal.handover.before_fsync", "journal.prepared.before_fsync")
        early = {"B": holds.BEGUN}
        yield from _row(18, breaks.at("S", handover, bad), {"B": "A"}, case=f"{what} S", hold=early)
        yield from _row(18, breaks.at("T", prepared, bad), {"B": "A"}, case=f"{what} T", hold=early)
        yield from _row(18, breaks.at("S", "journal.given.before_fsync", bad), {"H": "A"}, case=what, hold=_COMPLETED)
        yield from _row(18, breaks.at("T", "journal.activated.before_fsync", bad), {"M": "C"}, case=what)
        yield from _row(18, breaks.at("S", "journal.done.before_fsync", bad), {"T": "C"}, case=what)
        yield from _row(
            18, breaks.also_at("S", "journal.own.before_fsync", bad), {"PD": "A"}, case=what, hold=_HESITATING
        )
    yield from _row(18, breaks.at("S", "journal.given.before_fsync", "raise:EIO", 0, also="journal.own.before_fsync"),
        {"H": "AR"}, case="never again", waits="H", hold=_COMPLETED)  # fmt: skip

    yield from _row(19, breaks.no_flush, {"P": "A"}, case="at the stop", hold={"P": holds.PRECOPY})
    flushed = "nothing has been written since the flush at the stop: QEMU asks the volume no more, and nothing is lost"
    yield from _row(19, breaks.no_flush, {"D": "AC"}, case="as the disks are let go", note=flushed,
        hold={"D": holds.PRE_SWITCHOVER})  # fmt: skip
    begun = Hold("S", "source.start-stream.before", frozen=False)
    other_memory = partial(breaks.target_differs, memory_bytes=160 << 20)
    yield from _row(24, breaks.nothing, {"B": "A"}, case="memory", hold={"B": begun}, setup=other_memory)
    no_volumes = partial(breaks.target_differs, volumes=())
    yield from _row(24, breaks.nothing, {"D": "A"}, case="device", hold={"D": begun}, setup=no_volumes)


def _messages() -> Iterator[Cell]:
    lost = (
        ("B", "T", "agent.prepare.answered"), ("B", "S", "agent.hand_over.answered"),
        ("B", "V", "volumes.attach.answered"),
        ("B", "S", "agent.lend.answered"),
        ("M", "T", "link.answer.send"), ("M", "S", "link.go.send"), ("T", "V", "volumes.fence.answered"),
        ("T", "T", "agent.hold.answered"), ("T", "S", "agent.take_back.answered"), ("T", "T", "agent.go_on.answered"),
        ("T", "V", "volumes.detach.answered"),
    )  # fmt: skip
    begun = {"B": holds.BEGUN}
    for column, party, point in (("B", "T", "agent.prepare.received"), ("B", "S", "agent.hand_over.received")):
        yield from _row(22, breaks.at(party, point, "raise:EIO"), {column: "AC"}, case=f"500 {point}", hold=begun)
    for column, party, point in lost:
        yield from _row(22, breaks.at(party, point, "drop"), {column: "C"}, case=point, hold={**begun, **_GIVEN})
    twice = (
        ("B", "T", "agent.prepare.received"), ("B", "S", "agent.hand_over.received"),
        ("B", "V", "volumes.attach.received"),
        ("D", "T", "link.loaded.send"), ("M", "S", "link.go.send"), ("M", "T", "link.answer.send"),
        ("T", "V", "volumes.fence.received"), ("B", "S", "agent.lend.received"),
        ("T", "T", "agent.hold.received"), ("T", "S", "agent.take_back.received"), ("T", "T", "agent.go_on.received"),
    )  # fmt: skip
    for column, party, point in twice:
        yield from _row(23, breaks.at(party, point, "dup"), {column: "C"}, case=point, hold={**begun, **_GIVEN})
    yield from _row(23, breaks.abort_twice, {"P": "A", "H": "A"}, case="abort", hold=_HESITATING)


def _people() -> Iterator[Cell]:
    yield from _row(26, breaks.abort, {"BPDH": "A"}, case="abort", quick="BP", hold=_HESITATING)
    yield from _row(26, breaks.abort_refused, {"MT": "C"}, case="abort", hold=_GIVEN, quick="T")
    asked = "K: another boot; it was asked for"
    yield from _row(26, breaks.guest_reboots, {"B": "K"}, case="reboot", note=asked)
    yield from _row(26, breaks.shut_down, {"B": "K"}, case="shutdown", note="K: it stays down until it is started")
    yield from _row(26, breaks.delete, {"B": "K"}, case="delete", note="K: it is gone, and the next cell has another")
    yield from _row(27, breaks.second_migration, {"BPDHMT": "C"})


def _journals() -> Iterator[Cell]:
    for party in "ST":
        ends = {"B": "AC", "P": "A", "D": "A", "H": "AC", "M": "C", "T": "C"}
        yield from _row(28, breaks.journal_swapped(party, b""), ends, case=party, hold=_GIVEN)
        yield from _row(29, breaks.journal_swapped(party, None), ends, case=party, hold=_GIVEN)
    yield from _row(30, breaks.recovered_elsewhere, {"BPDHMT": "K"})


def _pairs() -> Iterator[Cell]:
    """Two faults at adjacent columns: one of each kind on real QEMUs, all of them in the simulation."""
    gone = partial(breaks.followed_by, hold=holds.GONE)
    runs = partial(breaks.followed_by, hold=holds.RUNS)
    yield from _row(1, gone(breaks.kill("C", None), second=breaks.kill("T", 1.0)), {"H": "C"}, case="then 3.M")
    yield from _row(
        2, gone(breaks.kill("S", 1.0), second=breaks.kill("T", 1.0)), {"M": "C"}, case="then 3.M", hold=_GIVEN
    )
    yield from _row(3, runs(breaks.kill("T", 1.0), second=breaks.kill("S", 1.0)), {"M": "C"}, case="then 2.T")
    yield from _row(5, breaks.followed_by(breaks.kill_qemu("T"), holds.BACK, breaks.kill("S", 1.0)), {"D": "A"},
        case="then 2")  # fmt: skip
    yield from _row(6, runs(breaks.kill_volumes, second=breaks.kill("T", 1.0)), {"M": "C"}, case="then 3.T")
    yield from _row(9, gone(breaks.cut("ST", for_s=None), second=breaks.kill("C", 1.0)), {"M": "C"}, case="then 1.M",
        hold=_GIVEN)  # fmt: skip


# ---------------------------------------------------------------- what has no cell

_DASHES = {
    19: ("BHMT", "the guest is not being stopped: nothing is flushed"),
    20: ("P", "nothing is transferred in pre-switchover: a slow target or link is not met there"),
    22: ("PDH", "the two agents are between orders: no API is called"),
    24: ("PHMT", "the stream has been taken, or is at rest"),
}


def not_applicable() -> dict[str, str]:
    """Return cell -> why, for what the matrix shows as ``-`` or as a lone ``=``."""
    found = {f"F{row}.{column}": why for row, (columns, why) in _DASHES.items() for column in columns}
    found["F10.B"] = "the source's volume is as slow as without a migration"
    return found | {f"F31.{column}": "post-copy is not offered: no policy asks for it" for column in "BPDHMT"}


def missing() -> list[str]:
    """Return the cells of the matrix that are neither played nor listed as not applicable."""
    here = {f"F{cell.row}.{cell.column}" for cell in cells()} | set(not_applicable())
    every = [f"F{row}.{column}" for row in ROWS for column in COLUMNS]
    return [name for name in every if name not in here]
