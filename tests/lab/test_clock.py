"""A guest's wall clock is right after everything that has stopped it, and never goes back.

It is measured here by the guest's control port, over its network; EMP sets it by the guest's agent, over a serial port.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from emp.lab.guest_control import CONTROL_PORT, Guest, socket_in
from emp.model.clock import RIGHT_MS, GuestClock
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, subject, until

EXCHANGES = 20


def offset_ms(guest: Guest) -> tuple[float, float]:
    """Return the guest's wall clock less this machine's, and what that may be off by: RFC 5905, section 8."""
    seen: list[tuple[float, float]] = []
    with socket_in(guest._topology, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        connection.connect((guest.address, CONTROL_PORT))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection.makefile() as lines:
            for _ in range(EXCHANGES):
                began_ns, began = time.time_ns(), time.perf_counter_ns()
                connection.sendall(b"clock\n")
                told = json.loads(lines.readline())["realtime_ns"]
                trip = time.perf_counter_ns() - began
                seen.append((trip / 2e6, (told - began_ns - trip / 2) / 1e6))
    error, offset = min(seen)
    return offset, error


def check_right(evm: Subject) -> None:
    offset, error = offset_ms(evm.guest())
    assert abs(offset) <= RIGHT_MS + error, f"{offset:.1f} ms, +- {error:.1f}"


def clock(evm: Subject, command: str = "clock") -> dict[str, Any]:
    answer: dict[str, Any] = evm.guest().ask(command)
    return answer


def until_told(evm: Subject, known: Callable[[GuestClock], bool], what: str) -> GuestClock:
    """Return what its node tells of its clock, once it is ``known``."""

    def told() -> GuestClock | None:
        clock = evm.client.evms.clock(evm.name)
        return clock if known(clock) else None

    return until(told, f"the clock of {evm.name} {what}")


def until_right(evm: Subject) -> GuestClock:
    return until_told(evm, lambda clock: clock.is_right, "is right")


@contextmanager
def begun(pool: Pool) -> Iterator[Subject]:
    """An EVM on n1 whose clock is right. One that boots ahead is not set back: a pause of a second takes that away."""
    with subject(pool, node="n1") as evm:
        if not until_told(evm, lambda clock: clock.is_right or clock.is_ahead, "has been looked at").is_right:
            evm.tell_qemu("n1", "stop")
        until_right(evm)
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
