"""What every daemon does as a process: it logs, runs until it is told to end, and exits by the code of its error."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from emp.model.errors import EmpError


def main(
    prog: str,
    description: str,
    run: Callable[[Path], Coroutine[Any, Any, None]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run the daemon whose configuration ``--config`` names; its exit code: 0, or that of the error on stderr."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", type=Path, required=True, help="JSON file")
    parser.add_argument("--verbose", action="store_true", help="log more")
    options = parser.parse_args(arguments)
    level = logging.DEBUG if options.verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for chatty in ("httpx2", "httpcore2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        asyncio.run(run(options.config))
    except EmpError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def told_to_end() -> asyncio.Event:
    """Return what SIGTERM and SIGINT set from now on, in the loop that runs."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    return told
