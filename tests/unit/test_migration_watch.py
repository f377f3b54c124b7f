"""The watch over a source brownout: each check at its threshold, what it says, and what is left in the report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from emp.migration.watch import Check, Sample, Verdict, Watch, advice, begin, blame, look, thresholds
from emp.model.migration import Policy

MIB = 1 << 20
POLICY = Policy(
    max_blackout_ms=30,
    deadline_s=600,
    no_convergence_passes=3,
    stall_s=5,
    slow_stream_s=20,
    target_qemu_s=4,
    target_volume_s=3,
    target_free_memory_bytes=100 * MIB,
)
FULLY_OPEN = 7
"""passes after which the pause that the policy allows is open in full: 5, 10, 20, 30 ms, one step every second pass"""


def healthy(at_s: float, **what: Any) -> Sample:
    """A sample in which everything is as it should be, but for ``what``."""
    usual: dict[str, Any] = {
        "sent_bytes": int(at_s * 100 * MIB) + 1,
        "remaining_bytes": 500 * MIB,
        "bandwidth_bytes_per_s": 100.0 * MIB,
        "dirty_bytes_per_s": 10.0 * MIB,
        "passes": 1,
        "volumes_silent_s": {"vol-a": 1.0, "vol-b": 0.5},
        "free_memory_bytes": 2048 * MIB,
    }
    return Sample(at_s, **(usual | what))


def run(samples: Iterable[Sample], watch: Watch | None = None) -> tuple[Watch, Verdict | None]:
    """Return the first verdict and what was seen until then."""
    watch = watch or begin(POLICY, 0.0)
    for sample in samples:
        watch, verdict = look(watch, sample)
        if verdict:
            return watch, verdict
    return watch, None


def line(watch: Watch, check: Check) -> tuple[str | None, bool]:
    (found,) = [line for line in watch.lines if line.check == check]
    return found.worst, found.ok


def test_a_healthy_migration_has_a_line_for_each_check_and_no_verdict() -> None:
    watch, verdict = run(healthy(at_s / 5) for at_s in range(50))
    assert verdict is None
    assert [line.check for line in watch.lines] == list(Check)
    assert all(line.ok and line.threshold for line in watch.lines)
    assert line(watch, Check.VOLUMES) == ("1.0 s, vol-a", True)
    assert line(watch, Check.MEMORY) == ("2 GiB", True)
    assert line(watch, Check.AGENT) == (None, True)  # an event, not a sample
    assert advice(watch.lines) is None


BREACHES: dict[Check, tuple[dict[str, Any], dict[str, Any], str]] = {
    Check.STORAGE: ({}, {"io_error": "disk0: write: EIO"}, "disk0: write: EIO"),
    Check.QEMU: ({"qemu_silent_s": 3.9}, {"qemu_silent_s": 4.0}, "4.0 s, 4 s are allowed"),
    Check.VOLUMES: ({"volumes_silent_s": {"v": 2.9}}, {"volumes_silent_s": {"u": 0, "v": 3.5}}, "read v for 3.5 s"),
    Check.PORTS: ({}, {"ports_gone": True}, "ports are gone"),
    Check.MEMORY: ({"free_memory_bytes": 100 * MIB}, {"free_memory_bytes": 100 * MIB - 1}, "less than 100 MiB"),
    Check.STREAM: ({"sent_bytes": 1}, {"sent_bytes": 1}, "nothing was sent for 5.0 s, 5 s are allowed"),
    Check.DEADLINE: ({}, {}, "deadline of 600 s"),
}
"""check -> just inside, just outside, what the abort says"""
AT_S = {Check.STREAM: (4.9, 5.0), Check.DEADLINE: (599.9, 600.0)}


@pytest.mark.parametrize("check", BREACHES)
def test_each_check_at_its_threshold(check: Check) -> None:
    inside, outside, says = BREACHES[check]
    before_s, after_s = AT_S.get(check, (1.0, 1.2))
    first = [healthy(0.0)] if check is Check.STREAM else []
    watch, verdict = run([*first, healthy(before_s, **inside)])
    assert verdict is None and line(watch, check)[1]
    watch, verdict = run([healthy(after_s, **outside)], watch)
    assert verdict is not None and verdict.check is check
    assert says in str(verdict)
    assert [line.check for line in watch.lines if not line.ok] == [check]
    assert line(watch, check)[0]
    assert advice(watch.lines)


def hopeless(number: int, **what: Any) -> Sample:
    rates = {"dirty_bytes_per_s": 98.0 * MIB, "remaining_bytes": 64 * MIB}
    return healthy(number * 1.0, passes=number, **(rates | what))


def test_no_convergence_counts_passes_in_a_row_at_the_longest_pause_alone() -> None:
    watch, verdict = run(hopeless(number) for number in range(1, FULLY_OPEN + 2))
    assert verdict is None and watch.hopeless_passes == 2
    better, verdict = run([hopeless(FULLY_OPEN + 2, dirty_bytes_per_s=50.0 * MIB)], watch)
    assert verdict is None and better.hopeless_passes == 0
    watch, verdict = run([hopeless(FULLY_OPEN + 2)], watch)
    assert verdict is not None and verdict.check is Check.CONVERGENCE
    assert "3 passes in a row" in str(verdict) and "98 MiB/s" in str(verdict) and "30 ms" in str(verdict)
    assert line(watch, Check.CONVERGENCE) == ("3 passes", False)


def test_looking_often_at_one_pass_counts_it_once() -> None:
    watch, verdict = run(replace(hopeless(FULLY_OPEN), at_s=at_s / 5, sent_bytes=at_s) for at_s in range(1, 100))
    assert verdict is None and watch.hopeless_passes == 1


def test_what_fits_the_pause_is_not_hopeless_however_fast_it_is_dirtied() -> None:
    _, verdict = run(hopeless(number, remaining_bytes=2 * MIB) for number in range(1, 30))
    assert verdict is None


def test_nothing_is_hopeless_before_rates_are_known() -> None:
    _, verdict = run(hopeless(n, bandwidth_bytes_per_s=0.0, dirty_bytes_per_s=0.0) for n in range(1, 30))
    assert verdict is None


def test_a_stream_too_slow_for_the_deadline_is_given_up_long_before_it() -> None:
    slow = {"remaining_bytes": 10_000 * MIB, "bandwidth_bytes_per_s": 10.0 * MIB}
    watch, verdict = run(healthy(at_s, **slow) for at_s in range(20))
    assert verdict is None
    recovered, verdict = run([healthy(20.0)], watch)
    assert verdict is None and recovered.slow_since_s is None
    watch, verdict = run([healthy(20.0, **slow)], watch)
    assert verdict is not None and verdict.check is Check.BANDWIDTH
    assert "17.24 MiB/s" in str(verdict) and "sent 10 MiB/s" in str(verdict)


def test_what_explains_the_others_is_blamed() -> None:
    """A target whose QEMU hangs takes no bytes either."""
    _, verdict = run([healthy(0.0), healthy(9.0, sent_bytes=1, qemu_silent_s=9.0)])
    assert verdict is not None and verdict.check is Check.QEMU


def test_after_a_verdict_nothing_changes() -> None:
    watch, _ = run([healthy(1.0, ports_gone=True)])
    after, verdict = look(watch, healthy(700.0, qemu_silent_s=99.0))
    assert (after, verdict) == (watch, None)
    assert blame(watch, Check.STREAM, "broke") == watch


def test_an_event_is_noted_at_its_check() -> None:
    watch = blame(begin(POLICY, 0.0), Check.AGENT, "connection lost")
    assert line(watch, Check.AGENT) == ("connection lost", False)
    assert "agent" in (advice(watch.lines) or "")


def test_thresholds_are_the_policys() -> None:
    said = thresholds(POLICY.model_copy(update={"stall_s": 77.0, "blackout_deadline_s": 8.0}))
    assert said[Check.STREAM].startswith("77 s")
    assert said[Check.BLACKOUT] == "8 s until the commit"
    assert list(said) == list(Check)
