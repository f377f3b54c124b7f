"""A guest's wall clock as seen over its network, by its control port; EMP sets it by its agent, over a serial port."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

from emp.lab.guest_control import CONTROL_PORT, Guest, socket_in
from emp.model.clock import RIGHT_MS, GuestClock
from tests.lab.pool import Subject, until

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


def settle(evm: Subject) -> None:
    """Return once the clock is right. One that boots ahead is not set back: a pause of a second takes that away."""
    if not until_told(evm, lambda clock: clock.is_right or clock.is_ahead, "has been looked at").is_right:
        evm.tell_qemu(str(evm.record.owner), "stop")
    until_right(evm)
