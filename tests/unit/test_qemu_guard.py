"""The guard process against a monitor of the test's: what it says to QEMU, when, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from emp.hypervisor.qemu import guard

PATIENCE_S = 20.0
SHORT_S, LONG_S = 0.2, 300.0


class Fake:
    """QEMU's and the agent's ends of a running guard."""

    def __init__(self, *, pre_switchover_s: float, device_s: float) -> None:
        self.monitor, monitor = socket.socketpair()
        self.lifeline, lifeline = socket.socketpair()
        self.monitor.settimeout(PATIENCE_S)
        self.lifeline.settimeout(PATIENCE_S)
        argv = [sys.executable, "-I", "-S", "-B", guard.__file__, str(os.getuid())]
        argv += [str(pre_switchover_s), str(device_s)]
        with monitor, lifeline:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                argv, stdin=monitor.fileno(), stdout=lifeline.fileno(), stderr=subprocess.DEVNULL
            )
        self._lines = self.monitor.makefile("r")

    def tell(self, **message: Any) -> None:
        self.monitor.sendall(json.dumps(message).encode() + b"\r\n")

    def moved(self, *statuses: str) -> None:
        for status in statuses:
            self.tell(event="MIGRATION", data={"status": status}, timestamp={"seconds": 0, "microseconds": 0})

    def heard(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._lines.readline())
        return message

    def begin(self, status: str = "none") -> None:
        """Answer until the guard says that it watches."""
        self.tell(QMP={"version": {}, "capabilities": ["oob"]})
        asked = self.heard()
        assert asked["arguments"] == {"enable": ["oob"]}
        self.tell(**{"return": {}, "id": asked["id"]})
        asked = self.heard()
        assert asked["execute"] == "query-migrate"
        self.tell(**{"return": {} if status == "none" else {"status": status}, "id": asked["id"]})
        assert self.lifeline.recv(64) == guard.READY

    def silent(self, for_s: float) -> bool:
        return not select.select([self.monitor], [], [], for_s)[0]

    def answers_again(self) -> None:
        """Be mute although the migration has ended, as while a target reads nothing: cut until there is an answer."""
        last = self.heard()
        assert last["execute"] == "query-status"
        assert self.heard()["exec-oob"] == "yank"
        assert self.process.poll() is None
        self.tell(**{"return": {"status": "running"}, "id": last["id"]})

    def ends(self) -> int:
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._lines.close()
        self.monitor.close()
        self.lifeline.close()


@contextlib.contextmanager
def fake(*, pre_switchover_s: float = LONG_S, device_s: float = LONG_S) -> Iterator[Fake]:
    made = Fake(pre_switchover_s=pre_switchover_s, device_s=device_s)
    try:
        yield made
    finally:
        made.close()


def test_cancels_what_stays_in_pre_switchover_and_cuts_only_what_does_not_answer() -> None:
    """Cut there, QEMU 10.0 fails the migration and goes on waiting: a cancel does nothing any more."""
    with fake(pre_switchover_s=SHORT_S) as qemu:
        qemu.begin()
        began = time.monotonic()
        qemu.moved("setup", "active", "pre-switchover")
        assert qemu.heard()["execute"] == "migrate_cancel"
        assert time.monotonic() - began >= SHORT_S
        yank = qemu.heard()
        assert (yank["exec-oob"], yank["arguments"]) == ("yank", {"instances": [{"type": "migration"}]})
        qemu.moved("cancelling", "cancelled")
        qemu.answers_again()
        assert qemu.ends() == 0


def test_cuts_what_stays_in_device_and_leaves_one_cancel_in_the_queue_of_a_hung_qemu() -> None:
    """QEMU's monitor stops reading when eight commands wait for its main loop: no yank would be heard any more."""
    with fake(device_s=SHORT_S) as qemu:
        qemu.begin()
        qemu.moved("active", "pre-switchover", "device")
        assert [qemu.heard()["id"] for _ in range(4)] == ["cancel", "yank", "yank", "yank"]
        qemu.moved("cancelling", "cancelled")
        qemu.answers_again()
        assert qemu.ends() == 0


def test_goes_on_cutting_what_is_cancelled_and_does_not_end() -> None:
    """QEMU says goodbye on each of its TLS connections: its main loop waits there for a target that reads nothing."""
    with fake(pre_switchover_s=SHORT_S) as qemu:
        qemu.begin()
        qemu.moved("active", "pre-switchover")
        cancel = qemu.heard()
        qemu.tell(**{"return": {}, "id": cancel["id"]})
        qemu.moved("cancelling")
        assert {qemu.heard()["id"] for _ in range(5)} == {"cancel", "yank"}
        qemu.moved("cancelled")
        qemu.answers_again()
        assert qemu.ends() == 0


def test_lets_go_of_a_migration_that_fails_in_pre_switchover_and_waits_for_the_answer() -> None:
    with fake() as qemu:
        qemu.begin()
        qemu.moved("active", "pre-switchover", "failed")
        said = qemu.heard()
        assert (said["execute"], said["arguments"]) == ("migrate-continue", {"state": "failed"})
        assert qemu.process.poll() is None
        qemu.tell(**{"return": {}, "id": said["id"]})
        assert qemu.ends() == 0


def test_the_time_of_a_status_is_its_own() -> None:
    with fake(pre_switchover_s=SHORT_S) as qemu:
        qemu.begin()
        qemu.moved("active", "pre-switchover", "device")
        assert qemu.silent(3 * SHORT_S)
        qemu.moved("completed")
        assert qemu.ends() == 0


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_what_an_earlier_migration_came_to_is_not_the_end(status: str) -> None:
    with fake() as qemu:
        qemu.begin(status)
        assert qemu.silent(SHORT_S)
        assert qemu.process.poll() is None
        qemu.moved("setup", "active", status)
        assert qemu.ends() == 0


def test_goes_on_without_its_agent() -> None:
    with fake(pre_switchover_s=SHORT_S) as qemu:
        qemu.begin()
        qemu.moved("setup", "active")
        qemu.lifeline.shutdown(socket.SHUT_RDWR)
        assert qemu.silent(SHORT_S)
        qemu.moved("pre-switchover")
        assert qemu.heard()["execute"] == "migrate_cancel"


def test_ends_when_its_agent_has_died_before_the_migration_began() -> None:
    with fake() as qemu:
        qemu.begin()
        qemu.lifeline.shutdown(socket.SHUT_RDWR)
        assert qemu.ends() == 0
        assert qemu.silent(0) or qemu.monitor.recv(1) == b""


def test_carries_on_with_what_a_dead_agent_had_left_in_the_socket() -> None:
    with fake(device_s=SHORT_S) as qemu:
        qemu.begin()
        qemu.lifeline.shutdown(socket.SHUT_RDWR)
        qemu.moved("setup", "active", "device")
        assert {qemu.heard()["id"], qemu.heard()["id"]} == {"cancel", "yank"}


def test_ends_with_qemu() -> None:
    with fake() as qemu:
        qemu.begin()
        qemu.moved("active")
        qemu.monitor.shutdown(socket.SHUT_RDWR)
        assert qemu.ends() == 0


def test_events_that_come_before_the_first_answer_are_heard() -> None:
    with fake(device_s=SHORT_S) as qemu:
        qemu.tell(QMP={"version": {}, "capabilities": ["oob"]})
        qemu.tell(**{"return": {}, "id": qemu.heard()["id"]})
        asked = qemu.heard()
        qemu.moved("setup", "active", "device")
        qemu.tell(**{"return": {"status": "setup"}, "id": asked["id"]})
        assert {qemu.heard()["id"], qemu.heard()["id"]} == {"cancel", "yank"}


def test_holds_nothing_but_its_three_descriptors() -> None:
    with fake() as qemu:
        qemu.begin()
        held = os.listdir(f"/proc/{qemu.process.pid}/fd")  # noqa: PTH208 - names alone
        assert sorted(held) == ["0", "1", "2"]
