"""What ``bench.network`` makes of its runs: a row per case, a verdict, a table. No lab, no clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

L2, VPC = "l2", "vpc"
ECHO, ONE_WAY, BULK, CONNECTIONS, PODS = "echo", "one-way", "bulk", "connections", "pods"
PROBE_HZ = 1000
GAP_OVER_PAUSE_MS = 100.0
"""of the median gap, under TCG"""
REST_MS = 5.0
"""of the gap: what neither the pause nor the emulator takes, in the median"""
REORDERED = 0.001
"""share of a fast stream's packets"""
REMAP_S = 2.0
"""what the cloud of ``vpc`` takes to send an address to its new interface"""
IPV6_LOST_S = 0.5
"""of an IPv6 address, beyond ``REMAP_S`` and the time in which it is nobody's"""
STALL_OVER_GAP_MS = 250.0
"""of a bulk transfer, in each run"""
FEW_PODS, MANY_PODS, BROWNOUT_RATIO = 1, 100, 1.5
ASKED_RUNS = 100
"""of the stream at 1 kHz"""
SLOWEST_HZ = 5000
"""the least that is measured as a fast stream"""


@dataclass(frozen=True)
class Case:
    name: str
    kind: str
    number: int = 1
    """of connections or pods"""
    rates_hz: tuple[int, ...] = (PROBE_HZ,)
    """of the UDP stream: the first at which nothing is lost at rest, or the last"""
    ipv6: bool = False
    """to an IPv6 address"""

    @property
    def pods(self) -> int:
        """How many its EVM has."""
        return self.number if self.kind == PODS else 0

    @property
    def fast(self) -> bool:
        return self.kind in (ECHO, ONE_WAY) and self.rates_hz[0] > PROBE_HZ

    @property
    def fills(self) -> bool:
        """Whether its load alone leaves two processors no time to idle."""
        return self.fast or self.kind == BULK


def cases(driver: str) -> tuple[Case, ...]:
    """Return every case of a driver. ``l2`` has fixed rates, ``vpc`` those that the machine bears at rest. IPv6 is a
    case where it goes another way than IPv4: a cloud does not reassign its addresses in one step."""
    bearable = (20_000, 10_000, SLOWEST_HZ)
    return (
        Case("udp-1k", ECHO),
        *([Case("udp-1k-ipv6", ECHO, ipv6=True)] if driver == VPC else []),
        Case("udp-one-way", ONE_WAY, rates_hz=bearable if driver == VPC else (20_000,)),
        Case("udp-echo", ECHO, rates_hz=bearable if driver == VPC else (10_000,)),
        Case("tcp-bulk", BULK),
        *(Case(f"tcp-{number}", CONNECTIONS, number) for number in (1, 100, 1000)),
        *(Case(f"pods-{number}", PODS, number) for number in (FEW_PODS, 10, MANY_PODS)),
    )


@dataclass(frozen=True)
class Stream:
    """What became of numbered packets. ``reordered``: RFC 4737, numbered lower than one that came before."""

    sent: int
    lost: int
    duplicated: int = 0
    reordered: int = 0


@dataclass(frozen=True)
class Run:
    """One migration. Figures that a case does not have are None."""

    rate_hz: int
    stream: Stream
    at_rest: Stream
    gap_ms: float
    pause_ms: float
    target_brownout_s: float
    emulator_ms: float | None
    """from RESUME on the target, or the first request on the tap if later, to the guest's first UDP frame there"""
    late_ms: float = 0.0
    """at worst, of a packet that the client sent: its own delay, not the network's"""
    lost_at_ms: tuple[float, ...] = ()
    """from RESUME on: when the first packets that were lost were due to be sent; of the stream one way"""
    violations: tuple[str, ...] = ()
    capture_dropped: int = 0
    frames_held: int | None = None
    frames_forwarded: int | None = None
    resets: int | None = None
    stall_ms: float | None = None
    bulk_bytes_per_s: tuple[float, ...] | None = None
    """to the guest, and from it; the migration is in it"""
    unanswered: int = 0
    """connections or pods, after the migration"""
    wrong: int = 0
    """answers or pieces of a transfer that were not what they should be"""
    ipv6_gap_s: float | None = None
    """for so long its IPv6 addresses were nobody's, by the report"""

    @property
    def rest_ms(self) -> float | None:
        return None if self.emulator_ms is None else self.gap_ms - self.pause_ms - self.emulator_ms


def row(driver: str, case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the figures of one case: counts are sums, times medians unless they say otherwise.

    ``tcp_stall_ms``, ``client_late_ms`` and ``tcp_stall_over_gap_ms`` (of each run's stall less its gap) are the worst,
    and so is ``ipv6_lost_over_gap_s``: what a run lost, as the time that it takes to send it, less ``ipv6_gap_s``.
    """
    stalls = [run.stall_ms for run in runs if run.stall_ms is not None]
    over = [run.stall_ms - run.gap_ms for run in runs if run.stall_ms is not None]
    held = [run.frames_held for run in runs if run.frames_held is not None]
    forwarded = [run.frames_forwarded for run in runs if run.frames_forwarded is not None]
    bulk = [run.bulk_bytes_per_s for run in runs if run.bulk_bytes_per_s]
    resets = [run.resets for run in runs if run.resets is not None]
    nobodys = [run.ipv6_gap_s for run in runs if run.ipv6_gap_s is not None]
    lost_s = [run.stream.lost / run.rate_hz - run.ipv6_gap_s for run in runs if run.ipv6_gap_s is not None]
    return {
        "driver": driver,
        "case": case.name,
        "runs": len(runs),
        "rate_hz": min(run.rate_hz for run in runs),
        **_sums([run.stream for run in runs]),
        "gap_ms": spread([run.gap_ms for run in runs]),
        "tcp_resets": sum(resets) if resets else None,
        "tcp_stall_ms": round(max(stalls), 1) if stalls else None,
        "target_brownout_s": _median([run.target_brownout_s for run in runs]),
        "frames_held": sum(held) if held else None,
        "frames_forwarded": sum(forwarded) if forwarded else None,
        "vcpu_pause_ms": _median([run.pause_ms for run in runs]),
        "split_ms": {
            "pause": _median([run.pause_ms for run in runs]),
            "emulator": _median([run.emulator_ms for run in runs]),
            "rest": _median([run.rest_ms for run in runs]),
        },
        "at_rest": _sums([run.at_rest for run in runs]),
        "client_late_ms": round(max(run.late_ms for run in runs), 1),
        "tcp_stall_over_gap_ms": round(max(over), 1) if over else None,
        "bulk_bytes_per_s": [round(statistics.median(way)) for way in zip(*bulk, strict=True)] if bulk else None,
        "ipv6_gap_s": spread(nobodys, digits=3) if nobodys else None,
        "ipv6_lost_over_gap_s": round(max(lost_s), 3) if lost_s else None,
        "unanswered": sum(run.unanswered for run in runs),
        "wrong": sum(run.wrong for run in runs),
        "violations": [f"run {at}: {wrong}" for at, run in enumerate(runs, 1) for wrong in run.violations],
        "capture_dropped": sum(run.capture_dropped for run in runs),
    }


def _sums(streams: Sequence[Stream]) -> dict[str, int]:
    names = ("sent", "lost", "duplicated", "reordered")
    return {name: sum(getattr(stream, name) for stream in streams) for name in names}


def spread(figures: Sequence[float], *, digits: int = 1) -> dict[str, float]:
    """Return median, 99th percentile (nearest rank) and worst."""
    ordered = sorted(figures)
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    found = {"median": statistics.median(ordered), "p99": p99, "worst": ordered[-1]}
    return {name: round(figure, digits) for name, figure in found.items()}


def _median(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return round(statistics.median(known), 3) if known else None


Demand = tuple[str, bool, str]
"""what is demanded, whether it is so, the figures"""


def verdict(rows: Sequence[dict[str, Any]], chosen: Sequence[Case]) -> list[Demand]:
    """Return what the chosen cases have to meet. What was not measured does not hold."""
    found: list[Demand] = []
    for case in chosen:
        mine = next((each for each in rows if each["case"] == case.name), None)
        if mine is None:
            found.append((f"{case.name}: measured", False, "not measured"))
            continue
        if case.ipv6:
            found += _ipv6(case, mine)
        else:
            found += _udp(case, mine) if case.kind in (ECHO, ONE_WAY) else _tcp(case, mine)
        if case.kind == PODS:
            found += _pods(mine)
        wrong, missed = mine["violations"], mine["capture_dropped"]
        what = f"{len(wrong)} violations: {wrong[0]}" if wrong else "0 violations"
        found.append((f"{case.name}: who spoke when", not wrong, f"{what}; {missed} frames not captured"))
    numbers = {case.number for case in chosen if case.kind == PODS}
    if {FEW_PODS, MANY_PODS} <= numbers and rows and rows[0]["driver"] == L2:
        found.append(_brownout(rows))
    return found


def _udp(case: Case, mine: dict[str, Any]) -> list[Demand]:
    rest = mine["at_rest"]
    counts = f"{mine['lost']} lost, {mine['duplicated']} duplicated of {mine['sent']}"
    if case.fast:
        late = mine["reordered"] / max(mine["sent"], 1)
        rate = f"at {mine['rate_hz'] / 1000:g} kHz; at rest {rest['lost']} of {rest['sent']}"
        return [
            (f"{case.name}: lost 0", mine["lost"] == 0 < mine["sent"], f"{counts} {rate}"),
            (f"{case.name}: reordered <= {REORDERED:.1%}", late <= REORDERED, f"{late:.3%}"),
        ]
    over_ms = mine["gap_ms"]["median"] - mine["vcpu_pause_ms"]
    rest_ms = mine["split_ms"]["rest"]
    migrations = f"{counts} in {mine['runs']} migrations (asked: {ASKED_RUNS})"
    return [
        (f"{case.name}: lost 0, duplicated 0", mine["lost"] == mine["duplicated"] == 0 < mine["sent"], migrations),
        (f"{case.name}: median gap <= pause + {GAP_OVER_PAUSE_MS:g} ms", over_ms <= GAP_OVER_PAUSE_MS,
         f"{mine['gap_ms']['median']:.1f} = {mine['vcpu_pause_ms']:.1f} + {over_ms:.1f} ms"),
        (f"{case.name}: rest of the gap <= {REST_MS:g} ms", rest_ms is not None and rest_ms <= REST_MS,
         "not measured" if rest_ms is None else f"{rest_ms:.1f} ms; emulator {mine['split_ms']['emulator']:.1f} ms"),
    ]  # fmt: skip


def _ipv6(case: Case, mine: dict[str, Any]) -> list[Demand]:
    """What is lost while the address is nobody's, and until the order to assign it takes effect, is told and may be: no
    more, and connections live through it."""
    over_s = mine["ipv6_lost_over_gap_s"]
    nobodys, resets = mine["ipv6_gap_s"], mine["tcp_resets"]
    counts = f"{mine['lost']} lost, {mine['duplicated']} duplicated of {mine['sent']}"
    told = "not measured" if nobodys is None else f"{nobodys['median']:g} s, at worst {nobodys['worst']:g} s"
    return [
        (f"{case.name}: nobody's for", nobodys is not None, f"{told}; {counts}"),
        (f"{case.name}: lost <= that + {REMAP_S:g} + {IPV6_LOST_S:g} s",
         over_s is not None and over_s <= REMAP_S + IPV6_LOST_S,
         "not measured" if over_s is None else f"at worst {over_s:.3f} s more"),
        (f"{case.name}: duplicated 0", mine["duplicated"] == 0 < mine["sent"], counts),
        (f"{case.name}: TCP resets 0", resets == 0 == mine["unanswered"],
         f"{resets}, {mine['unanswered']} unanswered"),
    ]  # fmt: skip


def _tcp(case: Case, mine: dict[str, Any]) -> list[Demand]:
    resets, over_ms = mine["tcp_resets"], mine["tcp_stall_over_gap_ms"]
    found = [(f"{case.name}: TCP resets 0", resets == 0, "not measured" if resets is None else str(resets))]
    if case.kind == BULK:
        figures = "not measured" if over_ms is None else f"{mine['tcp_stall_ms']:.0f} ms, gap + {over_ms:.0f} ms"
        ok = over_ms is not None and over_ms <= STALL_OVER_GAP_MS
        found.append((f"{case.name}: stall <= gap + {STALL_OVER_GAP_MS:g} ms", ok, figures))
    unanswered, wrong = mine["unanswered"], mine["wrong"]
    what = f"{unanswered} unanswered, {wrong} wrong"
    return [*found, (f"{case.name}: all answer after it, rightly", unanswered == wrong == 0, what)]


def _pods(mine: dict[str, Any]) -> list[Demand]:
    if mine["driver"] != VPC:
        return []
    return [(f"{mine['case']}: lost 0", mine["lost"] == 0 < mine["sent"], f"{mine['lost']} of {mine['sent']}")]


def _brownout(rows: Sequence[dict[str, Any]]) -> Demand:
    what = f"target brownout of {MANY_PODS} pods <= {BROWNOUT_RATIO:g} x of {FEW_PODS}"
    took = {each["case"]: each["target_brownout_s"] for each in rows}
    few, many = took.get(f"pods-{FEW_PODS}"), took.get(f"pods-{MANY_PODS}")
    if not few or many is None:
        return what, False, "not measured"
    return what, many <= BROWNOUT_RATIO * few, f"{many:.2f} / {few:.2f} s = {many / few:.2f}"


COLUMNS = (
    "runs",
    "kHz",
    "sent",
    "lost",
    "dupl.",
    "reord.",
    "gap ms\nmed/p99/worst",
    "pause\nms",
    "emul.\nms",
    "rest\nms",
    "TCP\nresets",
    "stall\nms",
    "target\nbrownout s",
    "held/\nforwarded",
    "lost\nat rest",
)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table("driver", "case", box=None)
    for name in COLUMNS:
        made.add_column(name, justify="right")
    for each in rows:
        gap, split, rest = each["gap_ms"], each["split_ms"], each["at_rest"]
        made.add_row(
            each["driver"],
            each["case"],
            str(each["runs"]),
            f"{each['rate_hz'] / 1000:g}",
            *(str(each[name]) for name in ("sent", "lost", "duplicated", "reordered")),
            f"{gap['median']:.0f}/{gap['p99']:.0f}/{gap['worst']:.0f}",
            *(_shown(split[name], ".1f") for name in ("pause", "emulator", "rest")),
            _shown(each["tcp_resets"], "d"),
            _shown(each["tcp_stall_ms"], ".0f"),
            _shown(each["target_brownout_s"], ".2f"),
            f"{_shown(each['frames_held'], 'd')}/{_shown(each['frames_forwarded'], 'd')}",
            f"{rest['lost']}/{rest['sent']}",
        )
    return made


def _shown(figure: float | None, how: str) -> str:
    return "-" if figure is None else f"{figure:{how}}"
