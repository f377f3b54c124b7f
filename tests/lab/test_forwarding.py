"""Not one packet is lost: to the EVM and to its pods, over migrations that succeed and over one that goes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from emp.lab.probing import Probing
from emp.model.migration import Outcome
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, subject

RATE_HZ = 200
"""to each of the two; the bench has the fast ones"""


@pytest.fixture(scope="module")
def evm(pool: Pool) -> Iterator[Subject]:
    with subject(pool, pods=["shop"]) as made:
        yield made


@pytest.fixture
def probing(pool: Pool, evm: Subject) -> Iterator[Probing]:
    targets = {"evm": evm.spec.nics[0].address, "pod": evm.spec.pods[0].address}
    with Probing(pool.files, targets, rate_hz=RATE_HZ) as made:
        yield made


def check_lost(probing: Probing) -> None:
    """Fail if a UDP packet was lost or came twice, or anything happened to the TCP connections."""
    seen = probing.stop()["targets"]
    for target in ("evm", "pod"):
        udp, tcp = seen[target]["udp"]["total"], seen[target]["tcp"]
        assert (udp["lost"], udp["duplicated"], udp["answered_twice"]) == (0, 0, 0), target
        assert (tcp["resets"], tcp["reconnects"], tcp["total"]["lost"]) == (0, 0, 0), target
        assert udp["received"] > 0


def test_not_one_packet_is_lost_over_migrations(evm: Subject, probing: Probing) -> None:
    ends = [evm.migrate() for _ in range(4)]
    check_lost(probing)
    held = [end.report.frames_held for end in ends]
    forwarded = [end.report.frames_forwarded for end in ends]
    assert all(f is not None and h is not None and f >= h for h, f in zip(held, forwarded, strict=True))
    assert sum(filter(None, held)) > 0, "so that it was really needed"


def test_an_abort_in_the_blackout_loses_none(evm: Subject, probing: Probing) -> None:
    ended = evm.end_of(evm.begin(blackout_deadline_s=0.0005))
    assert ended.outcome is Outcome.ABORTED and ended.report.abort_pause_ms is not None
    assert not ended.report.frames_forwarded
    check_lost(probing)
    evm.migrate()
