"""Keeps one daemon of a lab running, as systemd does a real one's: ``Restart=always``, ``RestartSec=1``, no limit.

``python -S -m emp.lab.keeper RESTARTS COMMAND...`` is the parent of one run of the daemon. When that has ended, however
it ended, it waits and becomes the keeper of the next run: how often it did so is on its command line, for everybody to
read. It is the daemon's parent in the daemon's own place, so it dies with the place, and the listening socket that it
hands on stays open meanwhile: who connects to a controller that is being restarted waits and is not refused.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

MODULE = "emp.lab.keeper"
PAUSE_S = 1.0


def command(argv: Sequence[str], *, restarts: int = 0) -> list[str]:
    """Return the command line of the keeper of ``argv``, which has been started again ``restarts`` times."""
    return [sys.executable, "-S", "-m", MODULE, str(restarts), *argv]


def restarts_of(argv: Sequence[str]) -> int:
    """Return how often the daemon of a keeper with this command line has been started again."""
    return int(argv[argv.index(MODULE) + 1])


def main(restarts: int, argv: Sequence[str]) -> NoReturn:
    """Run ``argv`` to its end, then go on as the keeper of its next run."""
    ended = _run(argv)
    print(f"{MODULE}: {ended}; it is started again in {PAUSE_S:g} s", file=sys.stderr, flush=True)
    time.sleep(PAUSE_S)
    os.execv(sys.executable, command(argv, restarts=restarts + 1))


def _run(argv: Sequence[str]) -> str:
    """Run a daemon in a session of its own, with our descriptors; return how it ended."""
    try:
        status = subprocess.call(argv, start_new_session=True, close_fds=False)
    except OSError as error:
        return f"the daemon cannot be run: {error}"
    return (
        f"the daemon was killed by {signal.Signals(-status).name}" if status < 0 else f"the daemon ended with {status}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
