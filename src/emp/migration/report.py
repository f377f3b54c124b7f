"""What a migration cost, from what its two ends measured.

Pauses that span the two hosts (the source's STOP, the target's RESUME) are read off two wall clocks. The link between
the agents measures their offset as NTP does (RFC 5905 section 8: offset = ((t2 - t1) + (t3 - t4)) / 2); it is taken
out, and what it may be wrong by, half the round trip, is reported beside the figures.
"""

from __future__ import annotations

from emp.model.migration import Report, StageTimes, WatchLine
from emp.model.orders import RoleFigures


def build_report(
    source: RoleFigures | None,
    target: RoleFigures | None,
    *,
    memory_bytes: int,
    closed_at_s: float | None,
    watch: tuple[WatchLine, ...] = (),
) -> Report:
    """Return the report; figures whose stage was not reached stay None.

    ``closed_at_s`` is the controller's wall clock when everything was finalised (seconds since the Unix epoch).
    """
    s, t = source or RoleFigures(), target or RoleFigures()
    offset_s = (s.clock_offset_ms or 0.0) / 1000
    resumed_at_s = t.resumed_at_s - offset_s if t.resumed_at_s is not None else None
    open_at_s = t.port_open_at_s - offset_s if t.port_open_at_s is not None else None
    both_at_s = max(resumed_at_s, open_at_s) if resumed_at_s is not None and open_at_s is not None else None
    aborted = resumed_at_s is None
    return Report(
        stages=StageTimes(
            source_brownout_s=_span(s.precopy_began_at_s, s.stopped_at_s),
            blackout_ms=_ms(_span(s.stopped_at_s, both_at_s)),
            target_brownout_s=_span(both_at_s, closed_at_s),
        ),
        vcpu_pause_ms=_ms(_span(s.stopped_at_s, resumed_at_s)),
        resumed_at_s=resumed_at_s,
        clock_error_ms=s.clock_error_ms,
        qemu_downtime_ms=s.qemu_downtime_ms,
        qemu_total_ms=s.qemu_total_ms,
        memory_bytes=memory_bytes,
        sent_bytes=s.sent_bytes,
        passes=s.passes,
        dirty_bytes_per_s=s.dirty_bytes_per_s,
        bandwidth_bytes_per_s=s.bandwidth_bytes_per_s,
        abort_pause_ms=_ms(_span(s.stopped_at_s, s.resumed_at_s)) if aborted else None,
        watch=watch,
        frames_held=s.frames_held,
        frames_forwarded=s.frames_forwarded,
        frames_lost=s.frames_lost,
        connections_carried=s.connections_carried,
        commit_ms=_ms(_span(s.given_at_s, resumed_at_s)),
    )


def _span(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else max(0.0, end_s - start_s)


def _ms(span_s: float | None) -> float | None:
    return None if span_s is None else round(span_s * 1000, 3)
