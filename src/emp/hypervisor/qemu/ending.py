"""How a machine's process ended: the one thing that its log cannot tell when it crashed."""

from __future__ import annotations

import asyncio
import os
import signal

from emp.host.processes import Process


async def ending(process: Process) -> str | None:
    """Wait until it has ended, reap it, and return how it went, in words; None if it is not our child."""
    try:
        descriptor = process.pidfd()
    except ProcessLookupError:
        return None
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    loop.add_reader(descriptor, over.set)
    try:
        await over.wait()
        result = os.waitid(os.P_PIDFD, descriptor, os.WEXITED | os.WNOHANG)  # noqa: ASYNC222 - does not wait
    except ChildProcessError:
        return None
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    if result is None:
        return None
    if result.si_code == os.CLD_EXITED:
        return f"exit code {result.si_status}"
    return f"killed by {signal.Signals(result.si_status).name}"
