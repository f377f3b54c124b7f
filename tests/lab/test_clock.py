"""A guest's wall clock is right after everything that has stopped it, and never goes back.

After an abort too: that is in ``test_network_faults``, whose lab has fault points.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.lab.clocks import check_right, clock, offset_ms, settle, until_right, until_told
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, subject, until


@contextmanager
def begun(pool: Pool) -> Iterator[Subject]:
    """An EVM on n1 whose clock is right."""
    with subject(pool, node="n1") as evm:
        settle(evm)
        yield evm


def test_a_guests_clock_is_right_after_a_move_there_and_back_and_never_goes_back(pool: Pool) -> None:
    with begun(pool) as evm:
        check_right(evm)
        boot_id, random = evm.boot_id, evm.guest().ask("random")
        before = clock(evm, "clock watch")
        pauses_ms = 0.0
        for target in ("n2", "n1"):
            ended = evm.migrate(target)
            pauses_ms += ended.report.vcpu_pause_ms or 0.0
            told = until_right(evm)
            assert told.is_set
            assert told.found_ms is not None
            assert told.found_ms < 0
            check_right(evm)
        after = clock(evm)
        assert after["watched"]
        assert after["samples"] > before["samples"] + 100
        assert after["stepped_back_us"] == 0
        stepped_ms = (after["stepped_ahead_us"] - before["stepped_ahead_us"]) / 1000
        assert stepped_ms > pauses_ms / 2, "nobody has set it: this pool's guests lose no time in a pause"
        assert "of its node's" in pool.emp("evm", "show", evm.name).stdout
        # Not a clone: one guest, and one generator, whose numbers are not given out twice.
        assert evm.boot_id == boot_id
        assert evm.guest().ask("random") != random


def test_a_guests_clock_is_right_after_a_pause(pool: Pool) -> None:
    with begun(pool) as evm:
        clock(evm, "clock watch")
        before_s = evm.client.evms.clock(evm.name).at_s
        evm.tell_qemu("n1", "stop")  # its node lets it run again, after a second
        told = until_told(evm, lambda clock: clock.is_right and clock.at_s > before_s, "is right again")
        assert told.found_ms is not None
        assert told.found_ms < -500
        check_right(evm)
        assert clock(evm)["stepped_back_us"] == 0


def test_a_guest_whose_agent_does_not_answer_is_behind_by_the_pause(pool: Pool) -> None:
    """Planted, so that the checks above can fail: nobody sets the clock, and then it is set back."""
    with begun(pool) as evm:
        clock(evm, "clock watch")
        evm.shell()
        evm.type("killall emp-agent")
        evm.migrate("n2")
        evm.tell_qemu("n2", "stop")
        until(lambda: offset(evm) < -500, "the guest runs again, and is behind by the second it stood")
        with pytest.raises(AssertionError):
            check_right(evm)
        assert not evm.client.evms.clock(evm.name).is_right
        assert clock(evm)["stepped_back_us"] == 0
        back_ns = clock(evm)["realtime_ns"] - 50_000_000
        clock(evm, f"clock set {back_ns}")
        assert clock(evm)["stepped_back_us"] > 20_000


def offset(evm: Subject) -> float:
    with contextlib.suppress(OSError):
        return offset_ms(evm.guest())[0]
    return 0.0
