"""What the client-side checker makes of traces: lost, late, doubled, reordered, silent, answered by the wrong guest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emp.lab.prober import main, write_atomically
from emp.lab.prober_stats import Stream, quantile_ms

MS = 1_000_000
BOOT = "5ca1ab1e-0000-4000-8000-000000000000"
OTHER = "0ddba11e-0000-4000-8000-000000000000"


class Trace:
    """A stream at 1 kHz whose requests leave on time; ``reply`` answers them in the order in which it is called."""

    def __init__(self, requests: int = 0) -> None:
        self.stream = Stream(MS, 0, grace_ns=100 * MS)
        self.now_ns = 0
        self.counter = 0
        self.send(requests)

    def send(self, requests: int) -> None:
        for _ in range(requests):
            self.stream.sent(self.now_ns, self.now_ns)
            self.now_ns += MS

    def reply(self, seq: int, at_ms: float, *, counter: int | None = None, boot: str = BOOT) -> None:
        self.counter = self.counter + 1 if counter is None else counter
        self.stream.received(seq, seq * MS, int(at_ms * MS), self.counter, boot)

    def total(self, now_ms: float) -> dict[str, Any]:
        figures: dict[str, Any] = self.stream.report(int(now_ms * MS))["total"]
        return figures

    def window(self, index: int, now_ms: float) -> dict[str, Any]:
        figures: dict[str, Any] = self.stream.report(int(now_ms * MS))["windows"][index]
        return figures


def test_a_quiet_stream_has_no_loss_and_no_gap() -> None:
    trace = Trace(100)
    for seq in range(100):
        trace.reply(seq, seq + 0.4)
    total = trace.total(1000)
    assert (total["sent"], total["received"], total["lost"], total["duplicated"], total["reordered"]) == (
        100, 100, 0, 0, 0,
    )  # fmt: skip
    assert total["gap_ms"] == 0
    assert total["rtt_median_ms"] == pytest.approx(0.4, rel=0.06)
    assert total["counters_monotone"]
    assert total["boot_ids"] == {BOOT: 100}


def test_a_request_counts_as_lost_only_after_the_grace_time() -> None:
    trace = Trace(100)
    for seq in range(100):
        if seq not in (10, 95):
            trace.reply(seq, seq + 0.4)
    soon = trace.total(150)
    assert (soon["lost"], soon["pending"]) == (1, 1)
    later = trace.total(300)
    assert (later["lost"], later["pending"]) == (2, 0)


def test_a_reply_later_than_the_grace_time_is_no_loss() -> None:
    trace = Trace(500)
    for seq in range(1, 500):
        trace.reply(seq, seq + 0.4)
    assert trace.total(500)["lost"] == 1
    trace.reply(0, 501)
    assert trace.total(501)["lost"] == 0


def test_the_gap_is_the_longest_silence_less_the_send_interval_with_its_time() -> None:
    trace = Trace(200)
    for seq in range(50):
        trace.reply(seq, seq + 0.5)
    for seq in range(50, 200):  # held for 70 ms, then all at once
        trace.reply(seq, max(seq, 120) + 0.5)
    report = trace.stream.report(1000 * MS, 1_700_000_000_000 * MS)["total"]
    assert report["gap_ms"] == pytest.approx(70)
    assert report["gap_at_s"] == pytest.approx(1_700_000_000.0495)
    assert report["lost"] == 0


def test_a_silence_that_lasts_is_a_gap_before_it_ends() -> None:
    trace = Trace(50)
    for seq in range(20):
        trace.reply(seq, seq + 0.5)
    assert trace.total(49.5)["gap_ms"] == pytest.approx(29)


def test_a_stream_that_stopped_sending_has_no_silence() -> None:
    trace = Trace(20)
    for seq in range(20):
        trace.reply(seq, seq + 0.5)
    assert trace.total(5000)["gap_ms"] == 0


def test_a_doubled_reply_is_told_from_a_second_answer() -> None:
    trace = Trace(10)
    trace.reply(0, 0.5, counter=1)
    trace.reply(0, 0.6, counter=1)  # the network doubled it
    assert (trace.total(1)["duplicated"], trace.total(1)["answered_twice"]) == (1, 0)
    trace.reply(1, 1.5, counter=2)
    trace.reply(1, 1.6, counter=9)  # it was answered again
    assert (trace.total(2)["duplicated"], trace.total(2)["answered_twice"]) == (2, 1)
    trace.reply(2, 2.5, counter=10)
    trace.reply(2, 2.6, counter=10, boot=OTHER)  # by another guest
    total = trace.total(3)
    assert (total["duplicated"], total["answered_twice"], total["received"]) == (3, 2, 3)
    assert set(total["boot_ids"]) == {BOOT, OTHER}


def test_reordered_replies_are_counted_and_are_no_broken_counter() -> None:
    trace = Trace(4)
    trace.reply(0, 0.5, counter=1)
    trace.reply(2, 2.5, counter=3)
    trace.reply(1, 2.6, counter=2)
    trace.reply(3, 3.5, counter=4)
    total = trace.total(4)
    assert (total["reordered"], total["lost"], total["counters_monotone"]) == (1, 0, True)


@pytest.mark.parametrize("counter", [5, 3])
def test_a_counter_that_repeats_or_falls_shows_a_second_guest_of_the_same_boot(counter: int) -> None:
    trace = Trace(2)
    trace.reply(0, 0.5, counter=5)
    trace.reply(1, 1.5, counter=counter)
    assert not trace.total(2)["counters_monotone"]


def test_a_counter_may_begin_anew_with_another_boot() -> None:
    trace = Trace(2)
    trace.reply(0, 0.5, counter=5)
    trace.reply(1, 1.5, counter=1, boot=OTHER)
    assert trace.total(2)["counters_monotone"]
    assert len(trace.total(2)["boot_ids"]) == 2


def test_a_reply_to_no_request_is_a_mismatch() -> None:
    trace = Trace(1)
    trace.reply(1, 0.5)
    trace.reply(-1, 0.5)
    assert (trace.total(1)["mismatched"], trace.total(1)["received"]) == (2, 0)


def test_windows_get_the_replies_of_their_own_requests_whenever_those_come() -> None:
    trace = Trace(50)
    trace.stream.mark("there", 50 * MS)
    trace.send(50)
    trace.stream.mark("back", 100 * MS)
    trace.send(50)
    for seq in (*range(45), *range(60, 150)):
        trace.reply(seq, seq + 0.5)
    for seq in range(45, 50):  # asked in the first window, answered in the last one
        trace.reply(seq, 151)
    windows = trace.stream.report(1000 * MS)["windows"]
    assert [(w["name"], w["sent"], w["received"], w["lost"]) for w in windows] == [
        ("start", 50, 50, 0),
        ("there", 50, 40, 10),
        ("back", 50, 50, 0),
    ]


def test_a_gap_counts_in_its_own_window_alone() -> None:
    trace = Trace(100)
    for seq in range(100):
        trace.reply(seq, seq + 0.5)
    trace.stream.mark("there", trace.now_ns)
    trace.send(100)
    for seq in range(100, 200):
        trace.reply(seq, seq + 0.5 + (40 if seq >= 150 else 0))
    trace.stream.mark("back", trace.now_ns)
    trace.send(100)
    for seq in range(200, 300):
        trace.reply(seq, max(seq, 240) + 0.5)
    assert [trace.window(index, 1000)["gap_ms"] for index in range(3)] == [0, pytest.approx(40), 0]
    assert trace.total(1000)["gap_ms"] == pytest.approx(40)


def test_a_gap_across_a_mark_counts_on_both_sides() -> None:
    trace = Trace(50)
    for seq in range(40):
        trace.reply(seq, seq + 0.5)
    trace.stream.mark("there", trace.now_ns)
    trace.send(50)
    for seq in range(60, 100):
        trace.reply(seq, seq + 0.5)
    assert [trace.window(index, 1000)["gap_ms"] for index in range(2)] == [pytest.approx(20)] * 2


def test_the_probers_own_delay_is_told_apart() -> None:
    trace = Trace(10)
    trace.stream.mark("there", 10 * MS)
    trace.stream.sent(35 * MS, 10 * MS)
    assert trace.window(0, 36)["prober_stall_ms"] == 0
    assert trace.window(1, 36)["prober_stall_ms"] == 25
    assert trace.window(1, 36)["prober_stall_at_s"] == pytest.approx(0.01)


@given(st.lists(st.sampled_from(["once", "never", "twice"]), min_size=1, max_size=300), st.sets(st.integers(1, 299)))
def test_sent_is_received_plus_lost_in_every_window(fates: list[str], marks: set[int]) -> None:
    trace = Trace()
    for seq, fate in enumerate(fates):
        if seq in marks:
            trace.stream.mark(str(seq), trace.now_ns)
        trace.send(1)
        for _ in range({"once": 1, "never": 0, "twice": 2}[fate]):
            trace.reply(seq, seq + 0.5)
    report = trace.stream.report(10_000 * MS)
    assert report["total"]["lost"] == fates.count("never")
    assert report["total"]["duplicated"] == fates.count("twice")
    for figures in (report["total"], *report["windows"]):
        assert figures["sent"] == figures["received"] + figures["lost"]
    for name in ("sent", "received", "lost", "duplicated"):
        assert report["total"][name] == sum(window[name] for window in report["windows"])


def test_quantiles_of_nothing_and_of_a_spread() -> None:
    assert quantile_ms({}, 0.5) is None
    trace = Trace(100)
    for seq in range(100):
        trace.reply(seq, seq + (50 if seq == 7 else 0.5))
    total = trace.total(1000)
    assert total["rtt_median_ms"] == pytest.approx(0.5, rel=0.06)
    assert total["rtt_p99_ms"] < 1
    assert total["rtt_max_ms"] == 50


def test_a_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, {"round": 1})
    write_atomically(path, {"round": 2})
    assert json.loads(path.read_text()) == {"round": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["10.77.1.5"], "NAME=ADDR"),
        (["a=127.0.0.1", "a=127.0.0.2"], "each name once"),
        (["a=127.0.0.1", "--rate", "0"], "--rate"),
        (["a=not-an-address.invalid:1"], "cannot probe"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert complaint in capsys.readouterr().err
