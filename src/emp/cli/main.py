"""The entry point ``emp``, and ``python -m emp.cli.main``: what is set before anything else is imported."""

from __future__ import annotations

import gc
import signal
import sys
from types import FrameType
from typing import NoReturn

SELDOM = 100_000
"""new objects between two searches for garbage: what a start makes stays, and to search it is a fifth of the time"""


def main() -> None:
    gc.set_threshold(SELDOM)
    signal.signal(signal.SIGTERM, _terminated)
    from emp.cli.root import run

    code = run(sys.argv[1:])
    gc.freeze()  # nor is there anything to be found at the end
    sys.exit(code)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind as for Ctrl-C, so that a terminal is left as it was."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
