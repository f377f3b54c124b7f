"""The guard of one outgoing migration (rule R12): a process of its own, so that it outlives the agent.

QEMU waits in ``pre-switchover`` for ever, the guest paused, if the agent dies there; in ``device`` it hangs for as long
as the target does; and a stream that breaks in ``pre-switchover`` fails the migration without ending that wait. The
guard hears every change of the migration's status on a monitor of its own. What lasts too long it cancels, cutting the
connection (``yank``) where QEMU is stuck in it, and a failed migration it lets go of: QEMU then resumes the guest by
itself. It can do nothing else: none of its commands does anything to a migration that goes well or has completed.
While it waits it costs no processor time.

Run as a script by the interpreter alone (``-I -S``), so that it starts in milliseconds and imports nothing that can
break. Descriptor 0 is a connected QMP socket (``oob``), 1 the agent's lifeline: ``ready`` is written there, and its
end means that the agent is gone. It ends by itself with the migration or with QEMU, or with an agent that died before
the migration began.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
from collections import deque
from typing import Any

READY = b"ready\n"
OVER = frozenset({"completed", "failed", "cancelled"})
NOT_BEGUN = OVER | {"none"}
AGAIN_S = 1.0
"""pause before a switchover that still hangs is yanked again"""
ORPHAN_S = 5.0
"""QEMU may still carry out a ``migrate`` that a dead agent has left in its socket: wait for it that long"""
YANK = {"exec-oob": "yank", "arguments": {"instances": [{"type": "migration"}]}, "id": "yank"}
CANCEL = {"execute": "migrate_cancel", "id": "cancel"}
RELEASE = {"execute": "migrate-continue", "arguments": {"state": "failed"}, "id": "release"}
"""QEMU 10.0: ends the wait of ``pre-switchover``, and is refused unless the migration has failed"""

LAST = {"execute": "query-status", "id": "last"}
"""answered once QEMU's main loop is free: after a cancel it may wait for a stream that the target does not read"""


class Monitor:
    """QEMU's side: lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._buffer = b""
        self._messages: deque[dict[str, Any]] = deque()

    def send(self, message: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    @property
    def waiting(self) -> bool:
        """Something has been read that nobody has taken."""
        return bool(self._messages)

    def received(self) -> list[dict[str, Any]]:
        """Return what has come, waiting for something; raise ``EOFError`` when QEMU is gone."""
        self._read()
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the reply, told by its id; what comes before it is kept."""
        self.send(message)
        earlier: list[dict[str, Any]] = []
        while True:
            for reply in self.received():
                if reply.get("id") == message["id"]:
                    self._messages.extendleft(reversed(earlier))
                    return reply
                earlier.append(reply)

    def _read(self) -> None:
        while not self._messages:
            data = self.connection.recv(65536)
            if not data:
                raise EOFError
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            self._messages.extend(json.loads(line) for line in lines if line.strip())


class Guard:
    """What is known of the migration, and what has to be said to QEMU (monotonic seconds)."""

    def __init__(self, limits_s: dict[str, float]) -> None:
        self._limits_s = limits_s
        self.status = "none"
        self.due_s: float | None = None
        self._begun = False
        self._acted = False
        self._unanswered: set[str] = set()

    @property
    def over(self) -> bool:
        return self._begun and self.status in NOT_BEGUN and not self._unanswered & {"release", "last"}

    def moved(self, status: str, now_s: float) -> list[dict[str, Any]]:
        """The migration is in ``status``; return what is to be sent."""
        self._begun = self._begun or status not in NOT_BEGUN
        if status == self.status:
            return []
        earlier, self.status = self.status, status
        limit_s = AGAIN_S if self._acted else self._limits_s.get(status)
        self.due_s = None if limit_s is None else now_s + limit_s
        said = self._once(RELEASE) if (earlier, status) == ("pre-switchover", "failed") else []
        if self._acted and status in OVER:
            said += self._once(LAST)
        return said

    def answered(self, command: str) -> None:
        self._unanswered.discard(command)

    def orphaned(self, now_s: float) -> None:
        """The agent is gone: what has not begun will hardly begin any more."""
        if not self._begun:
            self.due_s = now_s + ORPHAN_S

    def due(self, now_s: float) -> list[dict[str, Any]] | None:
        """``due_s`` has passed: return what is to be sent; None if there is nothing to guard."""
        if not self._begun:
            return None
        self.due_s = now_s + AGAIN_S
        self._acted = True
        if self.status in OVER:  # it has ended, and QEMU does not answer yet
            return [YANK]
        # Where QEMU is stuck in a write nothing but ``yank`` gets through; elsewhere cancelling alone is cleaner.
        stuck = self.status != "pre-switchover" or "cancel" in self._unanswered
        return [*self._once(CANCEL), *([YANK] if stuck else [])]

    def _once(self, command: dict[str, Any]) -> list[dict[str, Any]]:
        """QEMU reads no further, out-of-band commands included, while eight others wait: one of a kind is enough."""
        if command["id"] in self._unanswered:
            return []
        self._unanswered.add(command["id"])
        return [command]


def watch(monitor: Monitor, lifeline: socket.socket, guard: Guard) -> None:
    """Return when there is nothing left to guard; raise ``EOFError`` or ``OSError`` when QEMU is gone."""
    monitor.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": "capabilities"})
    status = monitor.ask({"execute": "query-migrate", "id": "status"})["return"].get("status", "none")
    guard.moved(status, time.monotonic())
    lifeline.sendall(READY)
    heard = [monitor.connection, lifeline]
    while not guard.over:
        wait_s = 0.0 if monitor.waiting else None if guard.due_s is None else max(0.0, guard.due_s - time.monotonic())
        readable, _, _ = select.select(heard, [], [], wait_s)
        if lifeline in readable:  # the agent sends nothing: this is its end
            heard.remove(lifeline)
            guard.orphaned(time.monotonic())
        if monitor.waiting or monitor.connection in readable:
            for message in monitor.received():
                if message.get("event") == "MIGRATION":
                    tell(monitor, guard, guard.moved(message["data"]["status"], time.monotonic()))
                else:
                    guard.answered(message.get("id", ""))
        elif guard.due_s is not None and time.monotonic() >= guard.due_s:
            commands = guard.due(time.monotonic())
            if commands is None:
                return
            tell(monitor, guard, commands)


def tell(monitor: Monitor, guard: Guard, commands: list[dict[str, Any]]) -> None:
    for command in commands:
        print(f"guard: the switchover hangs ({guard.status}): {command['id']}", file=sys.stderr, flush=True)
        monitor.send(command)


def main(uid: int, pre_switchover_s: float, device_s: float) -> None:
    if os.geteuid() == 0:  # everything that needed root is open by now
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    os.chdir("/")
    monitor, lifeline = socket.socket(fileno=0), socket.socket(fileno=1)
    guard = Guard({"pre-switchover": pre_switchover_s, "device": device_s})
    with contextlib.suppress(EOFError, OSError):  # QEMU is gone, and with it everything that there was to guard
        watch(Monitor(monitor), lifeline, guard)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
