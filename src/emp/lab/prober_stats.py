"""The arithmetic of the client-side checker: what was sent, what came back, and what that says. No socket, no clock.

A *stream* is a numbered sequence of requests to one target. A *window* is a part of it, by send number, so that each
migration gets figures of its own. Times are nanoseconds of one clock that does not step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_BUCKETS_PER_E = 20  # round trips are kept as a histogram with buckets 5 % wide
_ANSWERS_KEPT = 4096  # replies whose counter is remembered, to tell a doubled reply from a second answer


@dataclass
class Window:
    """Counters of the requests numbered ``first`` and up, until the next window's ``first``."""

    name: str
    first: int
    begun_ns: int
    sent: int = 0
    received: int = 0
    duplicated: int = 0
    answered_twice: int = 0
    reordered: int = 0
    counter_breaks: int = 0
    mismatched: int = 0
    errors: int = 0
    gap_ns: int = 0
    gap_at_ns: int = 0
    stall_ns: int = 0
    stall_at_ns: int = 0
    rtt_max_ns: int = 0
    boot_ids: dict[str, int] = field(default_factory=dict)
    rtt: dict[int, int] = field(default_factory=dict)
    seen: bytearray = field(default_factory=bytearray)


def quantile_ms(histogram: dict[int, int], q: float) -> float | None:
    """Return the round trip time that the share ``q`` of the replies did not exceed, or None without replies."""
    rank = q * sum(histogram.values())
    for bucket in sorted(histogram):
        rank -= histogram[bucket]
        if rank <= 0:
            return round(math.exp((bucket + 0.5) / _BUCKETS_PER_E) / 1e6, 3)
    return None


class Stream:
    """One stream of requests, cut into windows. ``interval_ns`` is the time between two sends.

    A reply that is late by up to ``grace_ns`` is not called lost yet; one that comes even later counts as received.
    """

    def __init__(self, interval_ns: int, begun_ns: int, *, grace_ns: int = 500_000_000) -> None:
        self.interval_ns = interval_ns
        self.grace_ns = grace_ns
        self.windows = [Window("start", 0, begun_ns)]
        self.sent_count = 0
        self._firsts = [0]
        self._recent: deque[tuple[int, int]] = deque()
        self._answers: dict[int, tuple[str, int]] = {}
        self._last_ns = begun_ns
        self._last_window = 0
        self._highest = -1
        self._highest_answer = ("", 0)

    def mark(self, name: str, now_ns: int) -> None:
        """Begin a new window with the next request."""
        self.windows.append(Window(name, self.sent_count, now_ns))
        self._firsts.append(self.sent_count)

    def sent(self, now_ns: int, due_ns: int) -> int:
        """Count a request sent now that was due at ``due_ns``, and return its number."""
        window = self.windows[-1]
        window.sent += 1
        window.seen.append(0)
        if now_ns - due_ns > window.stall_ns:
            window.stall_ns, window.stall_at_ns = now_ns - due_ns, due_ns
        seq = self.sent_count
        self.sent_count += 1
        self._recent.append((seq, now_ns))
        while self._recent[0][1] < now_ns - self.grace_ns:
            self._recent.popleft()
        return seq

    def received(self, seq: int, sent_ns: int, now_ns: int, counter: int, boot_id: str) -> None:
        """Count the reply to request ``seq``, to which the guest ``boot_id`` gave the number ``counter``."""
        if not 0 <= seq < self.sent_count:
            self.mismatched()
            return
        index = len(self._firsts) - 1
        if seq < self._firsts[index]:
            index = bisect_right(self._firsts, seq) - 1
        window, answer = self.windows[index], (boot_id, counter)
        window.boot_ids[boot_id] = window.boot_ids.get(boot_id, 0) + 1
        if window.seen[seq - window.first]:
            window.duplicated += 1
            window.answered_twice += self._answers.get(seq, answer) != answer
            return
        window.seen[seq - window.first] = 1
        window.received += 1
        self._answers[seq] = answer
        if len(self._answers) > _ANSWERS_KEPT:
            del self._answers[next(iter(self._answers))]
        if seq < self._highest:
            window.reordered += 1
        else:
            # In order, so the guest's counter must have grown. If not, two guests answered with one identity.
            if boot_id == self._highest_answer[0] and counter <= self._highest_answer[1]:
                window.counter_breaks += 1
            self._highest, self._highest_answer = seq, answer
        self._gap(now_ns, self._last_window, index)
        self._last_ns, self._last_window = max(self._last_ns, now_ns), index
        rtt_ns = max(now_ns - sent_ns, 1)
        bucket = int(math.log(rtt_ns) * _BUCKETS_PER_E)
        window.rtt[bucket] = window.rtt.get(bucket, 0) + 1
        window.rtt_max_ns = max(window.rtt_max_ns, rtt_ns)

    def mismatched(self) -> None:
        """Count something that is no reply to any request of this stream."""
        self.windows[-1].mismatched += 1

    def error(self) -> None:
        """Count a request that the network refused (port unreachable, no route)."""
        self.windows[-1].errors += 1

    def _gap(self, now_ns: int, *windows: int) -> None:
        """A gap counts in the window where it began, where it ended, and in all between."""
        gap_ns = now_ns - self._last_ns - self.interval_ns
        for window in self.windows[min(windows) : max(windows) + 1]:
            if gap_ns > window.gap_ns:
                window.gap_ns, window.gap_at_ns = gap_ns, self._last_ns

    def unanswered(self) -> int:
        """Return how many of the requests sent within the last grace time have no reply yet."""
        return sum(not self._is_seen(seq) for seq, _ in self._recent)

    def _is_seen(self, seq: int) -> bool:
        window = self.windows[bisect_right(self._firsts, seq) - 1]
        return bool(window.seen[seq - window.first])

    def report(self, now_ns: int, clock_offset_ns: int = 0) -> dict[str, Any]:
        """Return ``{"total": figures, "windows": [figures]}`` as of now. ``clock_offset_ns`` + a time is Unix time.

        A silence that lasts still is a gap already if a request waits for its answer: it counts in the windows since
        the last reply, and once more, longer, when it ends.
        """
        if self._recent and not self._is_seen(self._recent[-1][0]):
            self._gap(now_ns, self._last_window, len(self.windows) - 1)
        pending = [0] * len(self.windows)
        for seq, sent_ns in self._recent:
            if sent_ns >= now_ns - self.grace_ns and not self._is_seen(seq):
                pending[bisect_right(self._firsts, seq) - 1] += 1
        figures = list(zip(self.windows, pending, strict=True))
        return {
            "total": _figures("total", figures, clock_offset_ns),
            "windows": [_figures(window.name, [(window, waits)], clock_offset_ns) for window, waits in figures],
        }


def _figures(name: str, parts: Iterable[tuple[Window, int]], clock_offset_ns: int) -> dict[str, Any]:
    """Return the figures of one window, or of several together."""
    windows, pending = [window for window, _ in parts], sum(waits for _, waits in parts)
    rtt: dict[int, int] = {}
    boot_ids: dict[str, int] = {}
    for window in windows:
        for bucket, count in window.rtt.items():
            rtt[bucket] = rtt.get(bucket, 0) + count
        for boot_id, count in window.boot_ids.items():
            boot_ids[boot_id] = boot_ids.get(boot_id, 0) + count
    gap = max(windows, key=lambda window: window.gap_ns)
    stall = max(windows, key=lambda window: window.stall_ns)
    sent, received = sum(window.sent for window in windows), sum(window.received for window in windows)

    def at_s(time_ns: int) -> float | None:
        return round((time_ns + clock_offset_ns) / 1e9, 6) if time_ns else None

    return {
        "name": name,
        "begun_at_s": at_s(windows[0].begun_ns),
        "sent": sent,
        "received": received,
        "pending": pending,
        "lost": sent - received - pending,
        "duplicated": sum(window.duplicated for window in windows),
        "answered_twice": sum(window.answered_twice for window in windows),
        "reordered": sum(window.reordered for window in windows),
        "counters_monotone": not any(window.counter_breaks for window in windows),
        "mismatched": sum(window.mismatched for window in windows),
        "errors": sum(window.errors for window in windows),
        "gap_ms": round(gap.gap_ns / 1e6, 3),
        "gap_at_s": at_s(gap.gap_at_ns),
        "rtt_median_ms": quantile_ms(rtt, 0.5),
        "rtt_p99_ms": quantile_ms(rtt, 0.99),
        "rtt_max_ms": round(max(window.rtt_max_ns for window in windows) / 1e6, 3),
        "prober_stall_ms": round(stall.stall_ns / 1e6, 3),
        "prober_stall_at_s": at_s(stall.stall_at_ns),
        "boot_ids": boot_ids,
    }
