"""``python -m emp.agent --config FILE``."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from emp.agent import daemon
from emp.agent.config import AgentConfig
from emp.wire import process
from emp.wire.config import read_config

_NICE = -10


async def run(path: Path) -> None:
    with contextlib.suppress(PermissionError):
        # A paused guest waits for this process and for QEMU, which inherits it: both go before whatever else runs here.
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    await daemon.run(read_config(AgentConfig, path))


def main() -> int:
    return process.main("emp agent", "The daemon of one bare-metal node.", run)


if __name__ == "__main__":
    sys.exit(main())
