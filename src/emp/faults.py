"""Named points in the daemons at which a test lets something go wrong. Off unless the environment asks for it.

``EMP_FAULTS=DIR`` in a daemon's environment turns its points on; without it ``board`` is None and a point costs that
one look. A daemon that reaches a point appends a line to ``DIR/hits``, so that a test can tell that its point was
reached, and then does what ``DIR/POINT`` says, if there is such a file (``arm`` makes it, ``disarm`` takes it away, at
any time)::

    kill9      SIGKILL to the daemon itself           delay:MS     go on after MS milliseconds
    stop       SIGSTOP to the daemon itself           raise:EIO    fail as the operating system does (any errno name)
    drop       what is done at this point is not done  dup          it is done twice
    clock:S    the daemon's wall clock is S seconds off from now on (0: right again)

``any`` stands for whatever point is reached next.

Points are named where they are: each action of a role or of the supervisor is one by its type (``name_of``), so a new
step cannot be without. ``docs/faults.md`` lists the families.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

VARIABLE = "EMP_FAULTS"
HITS = "hits"
ACTIONS = ("kill9", "stop", "delay", "raise", "drop", "dup", "clock")
ANY = "any"
DROPPED, ONCE, TWICE = 0, 1, 2
_wall_clock = time.time


@dataclass(frozen=True)
class Arm:
    """What is to happen at a point: ``action``, from the ``nth`` time on, ``times`` times (0: each time)."""

    action: str
    nth: int = 1
    times: int = 1

    def __post_init__(self) -> None:
        verb, _, argument = self.action.partition(":")
        number = argument.removeprefix("-").isdigit()
        fit = {"delay": argument.isdigit(), "raise": hasattr(errno, argument), "clock": number}.get(verb, not argument)
        if verb not in ACTIONS or not fit or self.nth < 1 or self.times < 0:
            raise ValueError(f"{self} cannot be done at a point; actions: {', '.join(ACTIONS)}")


@dataclass(frozen=True)
class Hit:
    """A point was reached at ``at_s`` (CLOCK_MONOTONIC, the same for all processes of a machine)."""

    at_s: float
    point: str
    action: str
    """what was done, ``-`` for nothing"""


class Board:
    """One daemon's points. What is armed is read at each hit, and an arm is used up before it acts: by whoever dies."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._hits = os.open(directory / HITS, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def hit(self, point: str) -> int:
        """Be at ``point``; return how often that which is done there is to be done. Raises the ``OSError`` armed."""
        times, pause_s = self._meet(point)
        if pause_s:
            time.sleep(pause_s)
        return times

    async def reach(self, point: str) -> int:
        """Like ``hit``, where an event loop must not be held up by a delay."""
        times, pause_s = self._meet(point)
        if pause_s:
            await asyncio.sleep(pause_s)
        return times

    async def around(self, name: str, act: Callable[[], Awaitable[None]]) -> None:
        """Do ``act`` between the points ``NAME.before`` and ``NAME.after``; not, or twice, if the first one says so."""
        for _ in range(await self.reach(f"{name}.before")):
            await act()
        await self.reach(f"{name}.after")

    def _meet(self, point: str) -> tuple[int, float]:
        action = self._take(point)
        os.write(self._hits, f"{time.monotonic():.6f} {point} {action}\n".encode())
        verb, _, argument = action.partition(":")
        match verb:
            case "kill9":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raise":
                number = getattr(errno, argument)
                raise OSError(number, os.strerror(number))
            case "delay":
                return ONCE, int(argument) / 1000
            case "clock":
                offset_s = int(argument)
                time.time = lambda: _wall_clock() + offset_s
            case "drop":
                return DROPPED, 0.0
            case "dup":
                return TWICE, 0.0
        return ONCE, 0.0

    def _take(self, point: str) -> str:
        action = self._take_from(self._directory / point)
        return action if action != "-" else self._take_from(self._directory / ANY)

    def _take_from(self, path: Path) -> str:
        try:
            arm = Arm(**json.loads(path.read_text()))
            if arm.nth > 1:
                _write(path, Arm(arm.action, arm.nth - 1, arm.times))
                return "-"
            if arm.times == 1:
                path.unlink()
            elif arm.times > 1:
                _write(path, Arm(arm.action, 1, arm.times - 1))
        except FileNotFoundError:
            return "-"
        return arm.action


def arm(directory: Path, point: str, action: str, *, nth: int = 1, times: int = 1) -> None:
    """Let ``action`` happen at ``point`` of the daemon whose points are at ``directory``. Raises ``ValueError``."""
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / point, Arm(action, nth, times))


def disarm(directory: Path) -> None:
    """Take back what is armed; what has been hit stays."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name != HITS:
            path.unlink(missing_ok=True)


def hits(directory: Path) -> list[Hit]:
    """Return every point that was reached, in order."""
    try:
        lines = (directory / HITS).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [Hit(float(at_s), point, action) for at_s, point, action in (line.split() for line in lines)]


def name_of(action: object) -> str:
    """Return the name of a step from its type and what it chooses: ``WriteRecord(Record(GIVEN, ...))`` is
    ``write-record-given``, ``Watch(Role.SOURCE)`` is ``watch-source``."""
    return "-".join([re.sub(r"(?<!^)(?=[A-Z])", "-", type(action).__name__).lower(), *_choices(action)])


def _choices(value: Any) -> list[str]:
    found: list[str] = []
    for field in fields(value) if is_dataclass(value) else ():
        part = getattr(value, field.name)
        found += [part.value] if isinstance(part, StrEnum) else _choices(part)
    return found


def _write(path: Path, content: Arm) -> None:
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(asdict(content)))
    draft.replace(path)


board: Board | None = Board(Path(os.environ[VARIABLE])) if os.environ.get(VARIABLE) else None
