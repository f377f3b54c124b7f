"""Forecast and report: arithmetic that a user reads off a screen."""

from __future__ import annotations

import pytest

from emp.migration.convergence import forecast, switchover_limit_ms
from emp.migration.report import build_report
from emp.model.orders import RoleFigures


def test_an_idle_guest_is_done_after_one_pass() -> None:
    idle = forecast(remaining_bytes=1000, bandwidth_bytes_per_s=100, dirty_bytes_per_s=0, max_blackout_ms=30)
    assert (idle.converges, idle.eta_s, idle.passes) == (True, 10.0, 1)


def test_a_busy_guest_is_the_sum_of_its_passes() -> None:
    busy = forecast(remaining_bytes=1000, bandwidth_bytes_per_s=100, dirty_bytes_per_s=50, max_blackout_ms=1300)
    # 1000 -> 500 -> 250 -> 125 left; 130 fit the blackout: passes of 10, 5 and 2.5 seconds
    assert busy.passes == 3
    assert busy.eta_s == pytest.approx(17.5)


@pytest.mark.parametrize("dirty", [100.0, 250.0])
def test_a_guest_that_writes_as_fast_as_the_link_does_not_converge(dirty: float) -> None:
    never = forecast(remaining_bytes=1000, bandwidth_bytes_per_s=100, dirty_bytes_per_s=dirty, max_blackout_ms=30)
    assert (never.converges, never.eta_s) == (False, None)


def test_nothing_known_promises_nothing() -> None:
    assert (
        forecast(remaining_bytes=1000, bandwidth_bytes_per_s=0, dirty_bytes_per_s=0, max_blackout_ms=30).eta_s is None
    )


def test_what_fits_the_blackout_is_due_now() -> None:
    assert forecast(remaining_bytes=2, bandwidth_bytes_per_s=100, dirty_bytes_per_s=99, max_blackout_ms=30).eta_s == 0


def test_report_of_a_completed_migration_takes_the_clock_difference_out() -> None:
    source = RoleFigures(
        precopy_began_at_s=100.0,
        stopped_at_s=101.0,
        given_at_s=101.010,
        clock_offset_ms=500.0,  # the target's clock is half a second ahead
        clock_error_ms=0.2,
        qemu_downtime_ms=9,
        qemu_total_ms=1010,
        sent_bytes=5,
        passes=2,
    )
    target = RoleFigures(resumed_at_s=101.520, port_open_at_s=101.518)
    report = build_report(source, target, memory_bytes=7, closed_at_s=101.120)
    assert report.vcpu_pause_ms == pytest.approx(20.0)
    assert report.stages.blackout_ms == pytest.approx(20.0)
    assert report.stages.source_brownout_s == pytest.approx(1.0)
    assert report.stages.target_brownout_s == pytest.approx(0.1)
    assert report.commit_ms == pytest.approx(10.0)
    assert report.clock_error_ms == 0.2
    assert report.abort_pause_ms is None


def test_blackout_lasts_until_the_port_is_open_too() -> None:
    source = RoleFigures(stopped_at_s=1.0)
    late_port = RoleFigures(resumed_at_s=1.020, port_open_at_s=1.035)
    report = build_report(source, late_port, memory_bytes=1, closed_at_s=None)
    assert report.vcpu_pause_ms == pytest.approx(20.0)
    assert report.stages.blackout_ms == pytest.approx(35.0)


def test_an_abort_reports_how_long_the_guest_stood_still() -> None:
    source = RoleFigures(precopy_began_at_s=1.0, stopped_at_s=2.0, resumed_at_s=2.004)
    report = build_report(source, None, memory_bytes=1, closed_at_s=3.0)
    assert report.abort_pause_ms == pytest.approx(4.0)
    assert report.vcpu_pause_ms is None
    assert report.stages.target_brownout_s is None


def test_the_switchover_limit_opens_step_by_step_up_to_the_policy() -> None:
    assert [switchover_limit_ms(passes, 30) for passes in (0, 1, 2, 3, 5, 7, 100)] == [5, 5, 5, 10, 20, 30, 30]
    assert switchover_limit_ms(0, 2) == 2
