"""What is monitored while memory is copied, and when it is a reason to go back.

Each check has a threshold in the policy, a line in the report with the worst that was seen, and an abort that says the
figures. ``look`` takes one sample after another and returns the first verdict; after that nothing changes any more, so
that what an abort brings about is not taken for its cause. What is no sample but an event (the connection to the
target's agent is lost, the stream breaks) the protocol decides by itself: ``blame`` only notes which check it was.

All of this is of the source brownout. In the blackout nothing is looked at: its one deadline is a timer of the
protocol's own, and noted here when it has passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from emp.migration.convergence import forecast, switchover_limit_ms
from emp.model.migration import Policy, WatchLine
from emp.model.names import format_size

HOPELESS_RATIO = 0.9
"""Dirty rate by bandwidth from which a pass counts as no progress. A guest that rewrites all of its working set within
each pass shows about 1, on either side, however little bandwidth there is."""


class Check(StrEnum):
    CONVERGENCE = "convergence"
    DEADLINE = "deadline"
    STREAM = "stream"
    BANDWIDTH = "bandwidth"
    STORAGE = "source-storage"
    AGENT = "target-agent"
    QEMU = "target-qemu"
    MEMORY = "target-memory"
    VOLUMES = "target-volumes"
    PORTS = "target-ports"
    BLACKOUT = "blackout"


_ADVICE = {
    Check.CONVERGENCE: "allow a longer pause (--max-blackout) or more bandwidth, or migrate when the guest is quieter",
    Check.DEADLINE: "allow more time (--deadline) or more bandwidth",
    Check.STREAM: "see whether QEMU on the target and the network between the nodes are well",
    Check.BANDWIDTH: "allow more time (--deadline) or more bandwidth, or migrate when the network is quieter",
    Check.STORAGE: "see whether the source reaches the volume server; the guest goes on when its I/O does",
    Check.AGENT: "see whether the target's agent runs and the nodes reach each other",
    Check.QEMU: "see what keeps QEMU on the target from answering, or choose another target",
    Check.MEMORY: "free memory on the target, or choose another target",
    Check.VOLUMES: "see whether the target reaches the volume server",
    Check.PORTS: "see who has removed the EVM's taps on the target",
    Check.BLACKOUT: "see whether the target's node and QEMU are well",
}


@dataclass(frozen=True)
class Sample:
    """What is known at one moment. Times are monotonic seconds of the source."""

    at_s: float
    sent_bytes: int = 0
    remaining_bytes: int = 0
    bandwidth_bytes_per_s: float = 0.0
    dirty_bytes_per_s: float = 0.0
    passes: int = 0
    io_error: str | None = None
    """of one of the EVM's volumes on the source"""
    qemu_silent_s: float = 0.0
    """since QEMU on the target was last known to answer"""
    volumes_silent_s: Mapping[str, float] = field(default_factory=dict)
    """volume -> since the target was last known to have read it"""
    free_memory_bytes: int | None = None
    """of the target's host; None: not told yet"""
    ports_gone: bool = False
    """of the EVM, on the target"""


@dataclass(frozen=True)
class Verdict:
    """Why the migration must be aborted."""

    check: Check
    cause: str

    def __str__(self) -> str:
        return f"{self.check}: {self.cause}"


@dataclass(frozen=True)
class Watch:
    """What has been seen so far."""

    policy: Policy
    began_s: float
    sent_bytes: int = 0
    sent_at_s: float = 0.0
    slow_since_s: float | None = None
    passes: int = 0
    hopeless_passes: int = 0
    worst: Mapping[Check, float] = field(default_factory=dict)
    worst_text: Mapping[Check, str] = field(default_factory=dict)
    failed: Check | None = None

    @property
    def lines(self) -> tuple[WatchLine, ...]:
        """The report's lines, one per check."""
        return tuple(
            WatchLine(check=c, threshold=text, worst=self.worst_text.get(c), ok=c is not self.failed)
            for c, text in thresholds(self.policy).items()
        )


def begin(policy: Policy, at_s: float) -> Watch:
    """Pre-copy begins."""
    return Watch(policy, at_s, sent_at_s=at_s)


def thresholds(policy: Policy) -> dict[Check, str]:
    """Return what each check allows, in words."""
    return {
        Check.CONVERGENCE: f"{policy.no_convergence_passes} passes without progress",
        Check.DEADLINE: f"{policy.deadline_s:g} s",
        Check.STREAM: f"{policy.stall_s:g} s without a byte sent",
        Check.BANDWIDTH: f"{policy.slow_stream_s:g} s too slow for the deadline",
        Check.STORAGE: "no I/O error",
        Check.AGENT: f"{policy.target_silence_s:g} s of silence",
        Check.QEMU: f"{policy.target_qemu_s:g} s without an answer",
        Check.MEMORY: f"{format_size(policy.target_free_memory_bytes)} available",
        Check.VOLUMES: f"{policy.target_volume_s:g} s without a read",
        Check.PORTS: "there",
        Check.BLACKOUT: f"{policy.blackout_deadline_s:g} s until the commit",
    }


def look(watch: Watch, sample: Sample) -> tuple[Watch, Verdict | None]:
    """Fold one sample in; the first check that it fails is the verdict."""
    if watch.failed:
        return watch, None
    watch = _progress(watch, sample)
    for measure in _MEASURES:
        watch, cause = measure(watch, sample)
        if cause:
            check = _MEASURES[measure]
            return replace(watch, failed=check), Verdict(check, cause)
    return watch, None


def blame(watch: Watch, check: Check, what: str) -> Watch:
    """Note that the migration goes back because of ``check``, unless it does so for another reason already."""
    if watch.failed:
        return watch
    return replace(watch, failed=check, worst_text={**watch.worst_text, check: what})


def advice(lines: Iterable[WatchLine]) -> str | None:
    """Return what a person can do about the check that failed, if one did."""
    return next((_ADVICE[Check(line.check)] for line in lines if not line.ok), None)


# ------------------------------------------------------------------ the checks


def _progress(watch: Watch, sample: Sample) -> Watch:
    if sample.sent_bytes > watch.sent_bytes:
        watch = replace(watch, sent_bytes=sample.sent_bytes, sent_at_s=sample.at_s)
    if sample.passes > watch.passes:
        count = watch.hopeless_passes + 1 if _hopeless(watch.policy, sample) else 0
        watch = replace(watch, passes=sample.passes, hopeless_passes=count)
    if not _too_slow(watch, sample):
        return replace(watch, slow_since_s=None)
    return watch if watch.slow_since_s is not None else replace(watch, slow_since_s=sample.at_s)


def _hopeless(policy: Policy, sample: Sample) -> bool:
    """A pass at the longest pause that is allowed, in which hardly less was dirtied than sent."""
    if switchover_limit_ms(sample.passes, policy.max_blackout_ms) < policy.max_blackout_ms:
        return False
    guess = forecast(
        remaining_bytes=sample.remaining_bytes,
        bandwidth_bytes_per_s=sample.bandwidth_bytes_per_s,
        dirty_bytes_per_s=sample.dirty_bytes_per_s,
        max_blackout_ms=policy.max_blackout_ms,
    )
    fits = guess.passes == 0
    return not fits and 0 < sample.bandwidth_bytes_per_s * HOPELESS_RATIO <= sample.dirty_bytes_per_s


def _needed_bytes_per_s(watch: Watch, sample: Sample) -> float:
    left_s = watch.began_s + watch.policy.deadline_s - sample.at_s
    return sample.remaining_bytes / left_s if left_s > 0 else 0.0


def _too_slow(watch: Watch, sample: Sample) -> bool:
    return 0 < sample.bandwidth_bytes_per_s < _needed_bytes_per_s(watch, sample)


def _seen(watch: Watch, check: Check, value: float, text: str) -> Watch:
    """Keep ``text`` if ``value`` is the worst so far."""
    if value <= watch.worst.get(check, float("-inf")):
        return watch
    return replace(watch, worst={**watch.worst, check: value}, worst_text={**watch.worst_text, check: text})


def _convergence(watch: Watch, sample: Sample) -> tuple[Watch, str | None]:
    count, allowed = watch.hopeless_passes, watch.policy.no_convergence_passes
    watch = _seen(watch, Check.CONVERGENCE, count, f"{count} passes")
    if count < allowed:
        return watch, None
    return watch, (
        f"{count} passes in a row dirtied memory about as fast as it was sent ({_rates(sample)}) at the longest pause"
        f" allowed, {watch.policy.max_blackout_ms} ms"
    )


def _deadline(watch: Watch, sample: Sample) -> tuple[Watch, str | None]:
    took_s = sample.at_s - watch.began_s
    watch = _seen(watch, Check.DEADLINE, took_s, f"{took_s:.1f} s")
    if took_s < watch.policy.deadline_s:
        return watch, None
    return watch, f"the source brownout passed its deadline of {watch.policy.deadline_s:g} s ({_rates(sample)})"


def _stream(watch: Watch, sample: Sample) -> tuple[Watch, str | None]:
    still_s = sample.at_s - watch.sent_at_s
    watch = _seen(watch, Check.STREAM, still_s, f"{still_s:.1f} s")
    if still_s < watch.policy.stall_s:
        return watch, None
    return watch, f"nothing was sent for {still_s:.1f} s, {watch.policy.stall_s:g} s are allowed ({_rates(sample)})"


def _bandwidth(watch: Watch, sample: Sample) -> tuple[Watch, str | None]:
    slow_s = sample.at_s - watch.slow_since_s if watch.slow_since_s is not None else 0.0
    watch = _seen(watch, Check.BANDWIDTH, slow_s, f"{slow_s:.1f} s")
    if slow_s < watch.policy.slow_stream_s:
        return watch, None
    needed = format_size(_needed_bytes_per_s(watch, sample))
    return watch, (
        f"for {slow_s:.0f} s the stream has been too slow to be done by the deadline of {watch.policy.deadline_s:g} s:"
        f" it needs {needed}/s ({_rates(sample)})"
    )


def _storage(watch: Watch, sample: Sample) -> tuple[Watch, str | None]:
    if sample.io_error is None:
        return _seen(watch, Check.STORAGE, 0, "none"), None
    return _seen(watch, Check.STORAGE, 1, sample.io_error), f"a volume failed on the source: {sample.io_error}"


def _qemu(watch: Watch, sample: Sample) -> tuple[Watch, str | None]:
    silent_s, allowed_s = sample.qemu_silent_s, watch.policy.target_qemu_s
    watch = _seen(watch, Check.QEMU, silent_s, f"{silent_s:.1f} s")
    if silent_s < allowed_s:
        return watch, None
    return watch, f"QEMU on the target has not answered for {silent_s:.1f} s, {allowed_s:g} s are allowed"


def _memory(watch: Watch, sample: Sample) -> tuple[Watch, str | None]:
    if sample.free_memory_bytes is None:
        return watch, None
    free, floor = sample.free_memory_bytes, watch.policy.target_free_memory_bytes
    watch = _seen(watch, Check.MEMORY, -free, format_size(free))
    if free >= floor:
        return watch, None
    return watch, f"the target's host has {format_size(free)} of memory available, less than {format_size(floor)}"


def _volumes(watch: Watch, sample: Sample) -> tuple[Watch, str | None]:
    if not sample.volumes_silent_s:
        return watch, None
    volume, silent_s = max(sample.volumes_silent_s.items(), key=lambda item: item[1])
    allowed_s = watch.policy.target_volume_s
    watch = _seen(watch, Check.VOLUMES, silent_s, f"{silent_s:.1f} s, {volume}")
    if silent_s < allowed_s:
        return watch, None
    return watch, f"the target has not read {volume} for {silent_s:.1f} s, {allowed_s:g} s are allowed"


def _ports(watch: Watch, sample: Sample) -> tuple[Watch, str | None]:
    watch = _seen(watch, Check.PORTS, sample.ports_gone, "gone" if sample.ports_gone else "there")
    return watch, "the EVM's ports are gone on the target" if sample.ports_gone else None


def _rates(sample: Sample) -> str:
    return (
        f"dirty {format_size(sample.dirty_bytes_per_s)}/s, sent {format_size(sample.bandwidth_bytes_per_s)}/s,"
        f" {format_size(sample.remaining_bytes)} left, pass {sample.passes}"
    )


_MEASURES = {
    _storage: Check.STORAGE,
    _qemu: Check.QEMU,
    _volumes: Check.VOLUMES,
    _ports: Check.PORTS,
    _memory: Check.MEMORY,
    _stream: Check.STREAM,
    _convergence: Check.CONVERGENCE,
    _bandwidth: Check.BANDWIDTH,
    _deadline: Check.DEADLINE,
}
"""in the order in which they are blamed: what explains the others comes first"""
