"""Starting the guard of a migration (``guard.py``), and ending what is left of one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

from emp.host.processes import Process, spawn
from emp.hypervisor.qemu import guard
from emp.hypervisor.qemu.run_directory import RunDirectory
from emp.model.errors import HypervisorError

START_S = 10.0


class Guardian:
    """The agent's hold on one guard; to let go of it does not end it."""

    def __init__(self, process: Process, lifeline: socket.socket) -> None:
        self._lifeline = lifeline
        self._reaper = asyncio.create_task(process.ended(), name=f"end of guard {process.pid}")

    async def close(self) -> None:
        self._lifeline.close()
        self._reaper.cancel()
        await asyncio.wait({self._reaper})


async def start(directory: RunDirectory, *, uid: int, pre_switchover_s: float, device_s: float) -> Guardian:
    """Start a guard over the machine of ``directory``, as ``uid``; return once it watches.

    Raises ``HypervisorError`` if it does not come to that; nothing is left of it then.
    """
    await end(directory)  # of an earlier migration: the monitor serves one client
    ours, theirs = socket.socketpair(type=socket.SOCK_STREAM)
    ours.setblocking(False)
    try:
        with theirs, socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(os.fsencode(directory.socket_path("guard")))
            process = spawn(
                [sys.executable, "-I", "-S", "-B", guard.__file__, str(uid), f"{pre_switchover_s:g}", f"{device_s:g}"],
                log=directory.log,
                stdin=monitor.fileno(),
                stdout=theirs.fileno(),
                env={name: os.environ[name] for name in ("EMP_TEST_ID",) if name in os.environ},
            )
        directory.write_guard(process)
        await _ready(ours)
    except (OSError, TimeoutError, HypervisorError) as error:
        ours.close()
        await end(directory)
        raise HypervisorError(
            f"the guard of {directory.name} does not watch: {str(error) or f'not within {START_S:g} s'}",
            hint="without it the guest could stay paused if this node's agent died in the switchover",
        ) from error
    except BaseException:
        ours.close()
        raise
    return Guardian(process, ours)


async def end(directory: RunDirectory) -> None:
    """End the guard of ``directory``, if there is one; one that has ended by itself, as its QEMU did, is reaped."""
    process = directory.guard_process()
    if process is not None:
        process.send(signal.SIGKILL)
        await process.ended()


async def _ready(lifeline: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    said = b""
    async with asyncio.timeout(START_S):
        while said != guard.READY:
            data = await loop.sock_recv(lifeline, 64)
            if not data:
                raise HypervisorError("it ended at once")
            said += data
