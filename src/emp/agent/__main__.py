"""``python -m emp.agent --config FILE``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

from emp.agent import config, daemon
from emp.model.errors import EmpError

_NICE = -10


def main() -> int:
    parser = argparse.ArgumentParser(prog="emp agent", description="The daemon of one bare-metal node.")
    parser.add_argument("--config", type=Path, required=True, help="JSON file, see docs/daemons.md")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    with contextlib.suppress(PermissionError):
        # A paused guest waits for this process and for QEMU, which inherits it: both go before whatever else runs here.
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
    try:
        asyncio.run(daemon.run(config.load(arguments.config)))
    except EmpError as error:
        print(f"emp agent: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
