"""What a report shows of what was monitored."""

from __future__ import annotations

import pytest

from emp.cli.report import address_line, report_lines, watch_lines
from emp.controller.tally import Tally
from emp.migration.watch import Check, advice, begin, blame
from emp.model.addresses import AddressMove
from emp.model.migration import Migration, Outcome, Policy, Report, Stage
from emp.model.orders import Role, RolePhase, RoleStatus

WELL = begin(Policy(), 0.0)
BROKEN = blame(WELL, Check.STREAM, "Cannot read from TLS channel: The TLS connection was non-properly terminated.")


def test_what_went_well_is_one_line_and_each_check_when_asked_for() -> None:
    report = Report(watch=WELL.lines)
    assert watch_lines(report) == [f"monitored: {len(Check)} checks, all well"]
    assert [line.split()[0] for line in watch_lines(report, all_checks=True)] == ["MONITORED", *Check]
    assert watch_lines(Report()) == []


@pytest.mark.parametrize("all_checks", [False, True])
def test_the_check_that_failed_is_shown_in_80_columns(all_checks: bool) -> None:
    lines = watch_lines(Report(watch=BROKEN.lines), all_checks=all_checks)
    assert max(map(len, lines)) <= 80
    (failed,) = [line for line in lines if " NO " in line]
    assert failed.startswith("stream") and "Cannot read from" in failed and "10 s without a byte sent" in failed


def test_the_record_of_an_abort_has_the_lines_and_what_to_do() -> None:
    tally = Tally(Migration(id="m-1", evm="web", source="n1", target="n2", epoch_target=2, epoch_source=3))
    tally.heard(
        RoleStatus(
            migration="m-1",
            evm="web",
            role=Role.SOURCE,
            phase=RolePhase.ABORTED,
            stage=Stage.CLOSED,
            watch=BROKEN.lines,
        )
    )
    closed = tally.closed(Outcome.ABORTED, "stream: broke", 1.0)
    assert closed.report.watch == BROKEN.lines
    assert closed.hint == advice(BROKEN.lines)
    assert "NO" in report_lines(closed)[-1]


def test_the_report_says_what_the_cloud_took_for_the_addresses() -> None:
    moved = AddressMove(addresses=3, reassign_s=2.25, calls=2, tries=2, ipv6_gap_s=0.5)
    assert address_line(moved) == (
        "the cloud reassigned 3 addresses within 2.25 s in 2 tries; those of IPv6 were nobody's for 0.5 s"
    )
    unseen = moved.model_copy(update={"ipv6_gap_is_least": True})
    assert address_line(unseen).endswith("those of IPv6 were nobody's for at least 0.5 s")
    assert address_line(moved.model_copy(update={"tries": 1, "ipv6_gap_s": None})).endswith("within 2.25 s")
