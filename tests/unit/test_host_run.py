"""External commands: output, failure, deadline and cancellation."""

# ruff: noqa: ASYNC110, ASYNC240 - a test waits for files and counters, and blocks nobody

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from emp.host.run import run, run_sync
from emp.model.errors import CommandFailed, MissingDependency


async def test_output_and_input_pass_unchanged() -> None:
    assert await run("cat", stdin="äöü\n") == "äöü\n"
    assert run_sync("cat", stdin="äöü\n") == "äöü\n"
    assert await run("cat") == ""
    assert run_sync("cat") == ""


async def test_a_failure_says_what_was_run_the_code_and_what_it_said() -> None:
    argv = ("sh", "-c", "echo no such luck >&2; exit 7")
    with pytest.raises(CommandFailed, match="code 7: no such luck") as caught:
        await run(*argv)
    with pytest.raises(CommandFailed) as caught_sync:
        run_sync(*argv)
    for error in (caught.value, caught_sync.value):
        assert error.details == {"argv": list(argv), "returncode": 7, "stderr": "no such luck"}


async def test_a_command_that_does_not_end_is_killed(tmp_path: Path) -> None:
    argv = ("sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60")
    with pytest.raises(CommandFailed, match="in time") as caught:
        await run(*argv, timeout_s=0.2)
    assert caught.value.details["returncode"] is None
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
    with pytest.raises(CommandFailed, match="in time"):
        run_sync(*argv, timeout_s=0.2)
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


async def test_a_cancelled_caller_leaves_no_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    task = asyncio.create_task(run("sh", "-c", f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60"))
    async with asyncio.timeout(10):
        while not pid.exists():
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path("/proc", pid.read_text().strip()).exists()


async def test_a_missing_command_is_a_missing_dependency() -> None:
    with pytest.raises(MissingDependency, match="no-such-command"):
        await run("no-such-command")
    with pytest.raises(MissingDependency, match="no-such-command"):
        run_sync("no-such-command")
