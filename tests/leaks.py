"""Fails a test that leaves something behind: an asyncio task or connection, a process, a network namespace, a link, a
mount.

Everything that the session starts inherits the mark ``EMP_TEST_ID`` in its environment, so that a process is known for
ours even when it has left its parent; one whose environment was replaced is known by its parent instead.
What is there when a test starts is not held against it, so a fixture of wider scope may keep a lab. Such a fixture
starts it inside ``outliving``: daemons of that lab may then start and replace processes (a QEMU on the other node, say)
during a test. When the session ends, all of it must be gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import select
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import pytest_asyncio

LoopScope = Literal["function", "class", "module", "session"]

MARK = "EMP_TEST_ID"
NETNS = Path("/run/netns")
_outliving: set[str] = set()
"""network namespaces that were made inside ``outliving``"""
GRACE_S = 1.0
"""How long a process that has been told to end may take."""
TASK_GRACE_S = 0.1
"""How long a task that has been cancelled may take, and a connection that has been closed."""


@dataclass(frozen=True)
class Process:
    """A process as /proc shows it; ``mark`` is None where its environment has none or cannot be read."""

    pid: int
    parent: int
    is_zombie: bool
    mark: str | None
    command: str

    def __str__(self) -> str:
        if self.is_zombie:
            return f"process {self.pid}, dead and never waited for"
        return f"process {self.pid}: {self.command[:160]}"


@dataclass(frozen=True)
class Machine:
    """What there was at one moment, in this process's network and mount namespaces."""

    pids: frozenset[int]
    namespaces: frozenset[str]
    links: frozenset[str]
    mounts: frozenset[str]

    @classmethod
    def now(cls) -> Machine:
        return cls(
            frozenset(int(name) for name in os.listdir("/proc") if name.isdigit()),  # noqa: PTH208 - four times faster
            frozenset(os.listdir(NETNS) if NETNS.exists() else ()),  # noqa: PTH208
            frozenset(name for _, name in socket.if_nameindex()),
            frozenset(_mounts()),
        )

    def left_since(self, before: Machine) -> list[str]:
        """Return in words what is here, not counting processes, and was not there before."""
        return [
            *(f"network namespace {name}" for name in sorted(self.namespaces - before.namespaces)),
            *(f"network link {name}" for name in sorted(self.links - before.links)),
            *(f"mount {place}" for place in sorted(self.mounts - before.mounts)),
        ]


def _mounts() -> Iterator[str]:
    """Yield each mount point but those of named network namespaces, which are told of by their names."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = line.split(" ", 5)[4]
        if not place.startswith(str(NETNS)):
            yield place


def _process(pid: int) -> Process | None:
    """Read one process; None when it is gone."""
    directory = Path("/proc") / str(pid)
    try:
        state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
        command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    mark = None
    with contextlib.suppress(OSError):
        wanted = MARK.encode() + b"="
        for entry in (directory / "environ").read_bytes().split(b"\0"):
            if entry.startswith(wanted):
                mark = entry[len(wanted) :].decode(errors="replace")
    return Process(pid, int(parent), state in "ZX", mark, command)


def processes_since(before: Machine, belongs: Callable[[str], bool]) -> list[Process]:
    """Return the processes started since ``before`` with a mark that ``belongs``: their own, else their parent's.

    Someone else's zombie is not ours to wait for: where PID 1 reaps nothing, those stay for good.
    """
    own = os.environ[MARK]
    found: dict[int, Process] = {}
    marks: dict[int, str | None] = {os.getpid(): own}
    for pid in sorted(Machine.now().pids - before.pids - {os.getpid()}):
        process = _process(pid)
        if process is None or (process.is_zombie and process.parent != os.getpid()):
            continue
        marks[pid] = process.mark or marks.get(process.parent)
        if belongs(marks[pid] or ""):
            found[pid] = process
    return list(found.values())


def _await_end(processes: list[Process]) -> None:
    """Wait until all of them have ended, for at most ``GRACE_S``."""
    deadline = time.monotonic() + GRACE_S
    with contextlib.ExitStack() as stack:
        waiting = set()
        poll = select.poll()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(process.pid)
                stack.callback(os.close, descriptor)
                poll.register(descriptor, select.POLLIN)
                waiting.add(descriptor)
        while waiting and (rest_s := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(rest_s * 1000):
                poll.unregister(descriptor)
                waiting.discard(descriptor)


def _end(process: Process) -> None:
    """Kill what was left, so that it disturbs no later test."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    if process.parent == os.getpid():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, 0)


def check(before: Machine, belongs: Callable[[str], bool], who: str, *, but: frozenset[str] = frozenset()) -> None:
    """Fail if something is here that was not there before; of processes, one that ``belongs``. Those are ended.

    ``but``: network namespaces that may stay.
    """
    before = replace(before, namespaces=before.namespaces | but)
    left = Machine.now().left_since(before)
    processes = processes_since(before, belongs)
    if processes:
        _await_end(processes)
        processes = processes_since(before, belongs)
        for process in processes:
            _end(process)
        left = Machine.now().left_since(before)
    left += map(str, processes)
    if left:
        pytest.fail(f"{who} left behind: " + "; ".join(left), pytrace=False)


@contextlib.contextmanager
def outliving(name: str) -> Iterator[None]:
    """Start inside this what belongs to a fixture of wider scope, and may go on after the test that came first.

    ::

        @pytest.fixture(scope="module")
        def lab():
            with leaks.outliving("the module's lab"):
                lab = Lab.up()
            yield lab
            lab.down()
    """
    own, before = os.environ[MARK], Machine.now()
    os.environ[MARK] = f"{own.partition('/')[0]}/{name}"
    try:
        yield
    finally:
        os.environ[MARK] = own
        _outliving.update(Machine.now().namespaces - before.namespaces)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_by_the_session() -> Iterator[None]:
    outer = os.environ.get(MARK)
    session = os.environ[MARK] = secrets.token_hex(8)
    before = Machine.now()
    yield
    try:
        check(before, lambda mark: mark.partition("/")[0] == session, "the session")
    finally:
        if outer is None:
            del os.environ[MARK]
        else:
            os.environ[MARK] = outer


@pytest.fixture(autouse=True)
def nothing_left_by_the_test(nothing_left_by_the_session: None) -> Iterator[None]:
    before = Machine.now()
    session = os.environ[MARK]
    yield
    check(before, lambda mark: mark == session, "the test", but=frozenset(_outliving))


@pytest.fixture(autouse=True)
def no_task_left_by_the_test(request: pytest.FixtureRequest, nothing_left_by_the_test: None) -> None:
    if pytest_asyncio.is_async_test(request.node):
        marker = request.node.get_closest_marker("asyncio")
        scope = marker.kwargs.get("loop_scope", "function") if marker else "function"
        request.getfixturevalue(f"_no_task_left_in_{scope}_loop")


def _connections() -> list[str]:
    """Name the transports of this loop that are open: collected later, one would be held against another test."""
    transports: Any = getattr(asyncio.get_running_loop(), "_transports", {})
    return [f"{one!r} of {one.get_protocol()!r}" for one in transports.values() if one._sock is not None]


def _no_task_left_in(loop_scope: LoopScope) -> Any:
    async def guard() -> AsyncIterator[None]:
        before = asyncio.all_tasks()
        yield
        left = asyncio.all_tasks() - before - {asyncio.current_task()}
        if left:
            _, left = await asyncio.wait(left, timeout=TASK_GRACE_S)
        if left:
            names = "; ".join(f"task {task.get_name()}: {task.get_coro()}" for task in left)
            pytest.fail(f"the test left behind: {names}", pytrace=False)
        deadline_s = time.monotonic() + TASK_GRACE_S
        while (open_still := _connections()) and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # asyncio has no event for the end of a transport
        if open_still:
            pytest.fail(f"the test left behind: {'; '.join(open_still)}", pytrace=False)

    return pytest_asyncio.fixture(guard, loop_scope=loop_scope)


_no_task_left_in_function_loop = _no_task_left_in("function")
_no_task_left_in_class_loop = _no_task_left_in("class")
_no_task_left_in_module_loop = _no_task_left_in("module")
_no_task_left_in_session_loop = _no_task_left_in("session")
