"""The history of who could write to which volume: one line of JSON per change, for people and for checkers.

It decides nothing; ``state.json`` does. ``attach`` is written before an export can be reached, ``close`` once nothing
can be written through it any more, ``claim`` and ``fence`` once they are on disk and before they close anything. So the
intervals from ``attach`` to ``close`` hold every write, and between a ``claim`` and the next one only ``tag`` holds the
volume: an older export is closing, a newer one is a candidate whose guest does not run yet.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)

EPOCH_LOG = "epochs.log"
"""in the directory of the service's state"""
LONGEST_BYTES = 4 << 20
"""then it becomes ``epochs.log.1``, in the place of the one before"""


class EpochLog:
    """Appends to ``path``. What cannot be written is lost, and said in the daemon's own log."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, event: str, volume: str, **what: str | int) -> None:
        """Append ``event`` with the wall clock (``at_s``) and the monotonic one of this boot (``monotonic_s``)."""
        times = {"at_s": round(time.time(), 6), "monotonic_s": round(time.monotonic(), 6)}
        line = json.dumps(times | {"event": event, "volume": volume} | what) + "\n"
        try:
            if self._path.exists() and self._path.stat().st_size > LONGEST_BYTES:
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            log.error("%s: %s", self._path, error)
