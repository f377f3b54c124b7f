"""QMP events -> machine events, and their way to any number of listeners.

``Watcher`` keeps what was last heard of the machine, so that after a lost connection the differences can be given as
the events that nobody heard.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any
from weakref import WeakSet

from emp import faults
from emp.hypervisor.base import MachineEvent, MachineEventKind, RunState, StreamStatus
from emp.hypervisor.qemu import stream

_PLAIN = {
    "STOP": MachineEventKind.STOPPED,
    "RESUME": MachineEventKind.RESUMED,
    "RESET": MachineEventKind.GUEST_RESET,
    "GUEST_PANICKED": MachineEventKind.GUEST_PANICKED,
    "BLOCK_IO_ERROR": MachineEventKind.IO_ERROR,
}
_STANDSTILL = {
    RunState.SHUTDOWN: MachineEventKind.GUEST_SHUTDOWN,
    RunState.GUEST_PANICKED: MachineEventKind.GUEST_PANICKED,
    RunState.IO_ERROR: MachineEventKind.IO_ERROR,
}


def run_state(text: str) -> RunState:
    try:
        return RunState(text)
    except ValueError:
        return RunState.OTHER


class Subscription(AsyncIterator[MachineEvent]):
    """One listener's events, in order; ends when the broadcast has been closed and everything was read."""

    def __init__(self) -> None:
        self._waiting: deque[MachineEvent] = deque()
        self._news = asyncio.Event()
        self._closed = False

    def put(self, event: MachineEvent) -> None:
        self._waiting.append(event)
        self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def __anext__(self) -> MachineEvent:
        while not self._waiting:
            if self._closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()


class Broadcast:
    """Gives each event to every subscription. One that nobody holds any more is forgotten by itself."""

    def __init__(self) -> None:
        self._subscriptions: WeakSet[Subscription] = WeakSet()
        self._last: MachineEvent | None = None
        self._closed = False

    @property
    def listeners(self) -> int:
        return len(self._subscriptions)

    def subscribe(self) -> Subscription:
        """Return a subscription from now on; after the end it gets the last event (``GONE``) alone."""
        subscription = Subscription()
        if self._closed:
            if self._last:
                subscription.put(self._last)
            subscription.close()
        else:
            self._subscriptions.add(subscription)
        return subscription

    def publish(self, event: MachineEvent) -> None:
        if not self._closed:
            for subscription in list(self._subscriptions):
                subscription.put(event)

    def close(self, last: MachineEvent | None = None) -> None:
        """Give ``last`` to everybody and end every subscription. Idempotent."""
        if self._closed:
            return
        if last:
            self.publish(last)
        self._closed = True
        self._last = last
        for subscription in list(self._subscriptions):
            subscription.close()


class Watcher:
    """Turns what QEMU tells into events, and remembers what has been told."""

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._state: RunState | None = None
        self._stream: StreamStatus | None = None

    def on_qmp_event(self, message: Mapping[str, Any]) -> None:
        """Publish what a QMP event means for the machine; most mean nothing."""
        name, data = message["event"], message.get("data", {})
        if faults.board:
            faults.board.hit("-".join(["qmp", *filter(None, (name, data.get("status")))]).lower())
        stamp = message["timestamp"]
        event = self._translate(name, data, stamp["seconds"] + stamp["microseconds"] / 1e6)
        if event is not None:
            self._broadcast.publish(event)

    def _translate(self, name: str, data: Mapping[str, Any], at_s: float) -> MachineEvent | None:
        if name == "MIGRATION":
            self._stream = stream.status(data["status"])
            return MachineEvent(MachineEventKind.STREAM, at_s, stream=self._stream)
        if name == "MIGRATION_PASS":
            return MachineEvent(MachineEventKind.PASS, at_s, passes=data["pass"])
        if name == "SHUTDOWN":
            if not data.get("guest"):
                return None  # somebody outside ended QEMU: GONE will tell
            self._state = RunState.SHUTDOWN
            return MachineEvent(MachineEventKind.GUEST_SHUTDOWN, at_s, detail=data.get("reason"))
        kind = _PLAIN.get(name)
        if kind is None:
            return None
        if kind is MachineEventKind.STOPPED and self._state in (None, RunState.RUNNING):
            self._state = RunState.PAUSED
        elif kind is MachineEventKind.RESUMED:
            self._state = RunState.RUNNING
        elif kind is MachineEventKind.GUEST_PANICKED:
            self._state = RunState.GUEST_PANICKED
        elif kind is MachineEventKind.IO_ERROR:
            self._state = RunState.IO_ERROR
        return MachineEvent(kind, at_s, detail=_detail(name, data))

    def on_state_read(self, state: RunState, status: StreamStatus) -> None:
        """Publish what must have happened unheard, given the state that was read; a first reading publishes nothing."""
        known, known_stream = self._state, self._stream
        self._state, self._stream = state, status
        if known is None:
            return
        at_s = time.time()
        if known_stream is not None and known_stream != status:
            self._broadcast.publish(MachineEvent(MachineEventKind.STREAM, at_s, stream=status))
        if known is not RunState.RUNNING and state is RunState.RUNNING:
            self._broadcast.publish(MachineEvent(MachineEventKind.RESUMED, at_s))
        if known is RunState.RUNNING and state is not RunState.RUNNING:
            self._broadcast.publish(MachineEvent(MachineEventKind.STOPPED, at_s))
        if state is not known and state in _STANDSTILL:
            self._broadcast.publish(MachineEvent(_STANDSTILL[state], at_s))


def _detail(name: str, data: Mapping[str, Any]) -> str | None:
    if name == "BLOCK_IO_ERROR":
        device = data.get("qom-path") or data.get("device")
        return f"{device}: {data.get('operation')}: {data.get('reason')}, {data.get('action')}"
    if name == "GUEST_PANICKED":
        return str(data.get("action"))
    return data.get("reason")
