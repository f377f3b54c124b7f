"""How the set-up speaks and how it gives up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

TAIL_LINES = 25


class Refusal(Exception):
    """The set-up cannot go on; the text says why, and what to do about it."""


def say(text: str) -> None:
    """Print one line of what is being done."""
    print(f"setup: {text}", flush=True)


def quietly(command: Sequence[str], *, doing: str, env: Mapping[str, str] | None = None) -> str:
    """Run ``command`` and return what it printed; only when it fails is that shown.

    :raises Refusal: it could not be started or did not succeed; ends with the last lines that it printed
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        )
    except OSError as exc:
        raise Refusal(f"{doing} failed: {command[0]}: {exc.strerror}") from exc
    if done.returncode != 0:
        tail = "\n".join(f"    {line}" for line in done.stdout.splitlines()[-TAIL_LINES:])
        raise Refusal(f"{doing} failed ({command[0]}, exit status {done.returncode}):\n{tail}")
    return done.stdout


def refuse(refusal: Refusal) -> int:
    """Print the refusal on stderr and return the exit status that goes with it."""
    print(f"setup: {refusal}", file=sys.stderr, flush=True)
    return 1
