"""Processes named by pid and start time."""

# ruff: noqa: ASYNC110, ASYNC240 - a test waits for files and counters, and blocks nobody

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from emp.host.processes import Process, find, spawn, take_descriptor
from emp.model.errors import CommandFailed, MissingDependency


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


async def test_a_spawned_process_has_a_session_of_its_own_and_writes_its_log(log: Path) -> None:
    process = spawn(["sh", "-c", "echo out; echo err >&2; exec sleep 60"], log=log)
    assert process.alive
    assert find(process.pid) == process
    assert os.getsid(process.pid) == process.pid
    async with asyncio.timeout(10):
        while log.read_text() != "out\nerr\n":
            await asyncio.sleep(0.01)
    await process.stop(grace_s=5)
    assert not process.alive
    assert not Path(f"/proc/{process.pid}").exists(), "it was our child, and is reaped"


async def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period(log: Path) -> None:
    process = spawn(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], log=log)
    async with asyncio.timeout(10):
        while not log.read_text():
            await asyncio.sleep(0.01)
    began_s = time.monotonic()
    await process.stop(grace_s=0.3)
    assert 0.3 <= time.monotonic() - began_s < 10
    assert not process.alive


async def test_a_later_process_with_the_same_pid_is_another_one(log: Path) -> None:
    process = spawn(["sleep", "60"], log=log)
    earlier = replace(process, start_ticks=process.start_ticks - 1)
    assert not earlier.alive
    assert earlier.send(signal.SIGKILL) is False
    with pytest.raises(ProcessLookupError):
        earlier.pidfd()
    async with asyncio.timeout(20):
        await earlier.ended()
        await earlier.stop(grace_s=60)
    assert process.alive, "it was not the one that was meant"
    await process.stop(grace_s=0)


async def test_the_end_is_noticed_at_once(log: Path) -> None:
    process = spawn(["sleep", "60"], log=log)
    waiter = asyncio.create_task(process.ended())
    await asyncio.sleep(0.05)  # nothing tells that nothing happens
    assert not waiter.done()
    began_s = time.monotonic()
    assert process.send(signal.SIGKILL)
    await waiter
    assert time.monotonic() - began_s < 10
    assert find(process.pid) is None
    await process.stop(grace_s=5)


async def test_a_zombie_is_not_alive(log: Path) -> None:
    process = spawn(["true"], log=log)
    descriptor = process.pidfd()
    try:
        os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - wait, but leave the zombie
    finally:
        os.close(descriptor)
    assert not process.alive
    assert find(process.pid) is None
    await process.ended()


async def test_a_descriptor_of_another_process_can_be_taken(tmp_path: Path, log: Path) -> None:
    shared = tmp_path / "shared"
    descriptor = os.open(shared, os.O_RDWR | os.O_CREAT)
    process = spawn(["sleep", "60"], log=log, pass_fds=[descriptor])
    os.close(descriptor)
    copy = take_descriptor(process, descriptor)
    assert os.path.samestat(os.fstat(copy), shared.stat())
    assert not os.get_inheritable(copy)
    os.close(copy)
    with pytest.raises(CommandFailed, match="Bad file descriptor"):
        take_descriptor(process, 999)
    await process.stop(grace_s=0)
    with pytest.raises(ProcessLookupError):
        take_descriptor(process, descriptor)


def test_a_missing_program_is_a_missing_dependency(log: Path) -> None:
    with pytest.raises(MissingDependency, match="no-such-program"):
        spawn(["no-such-program"], log=log)


def test_names_of_commands_cannot_confuse_the_start_time(tmp_path: Path, log: Path) -> None:
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to("/bin/sleep")
    process = spawn([str(odd), "60"], log=log)
    assert find(process.pid) == process
    os.kill(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)


def test_no_process_has_this_pid() -> None:
    assert find(2**22 + 1) is None
    assert not Process(2**22 + 1, 5).alive
