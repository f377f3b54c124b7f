"""Feeds ``emp.migration.watch`` at the source: QEMU's figures, what the target says of its health, storage errors.

It runs in the source brownout alone. In the blackout nothing is asked of anybody: only what the protocol itself hears
there is noted, so that the report can say why it went back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pydantic import Field, ValidationError

from emp.hypervisor.base import StreamInfo, StreamStatus
from emp.migration import watch
from emp.migration.events import AbortAsked, Event, LinkLost, Stream, StreamMoved, TargetFailed, Timer, TimerFired
from emp.migration.watch import Check, Sample
from emp.migration.way_back import TARGET_GONE, VOLUME_UNREAD
from emp.model.base import Model
from emp.model.migration import Policy, WatchLine

log = logging.getLogger(__name__)

HEALTH_S = 1.0
"""between two questions to the target; a migration that takes less asks none"""


class Health(Model):
    """The target's answer (``emp.agent.health``); ages count from when it was sent."""

    qemu_silent_s: float = 0.0
    volumes_silent_s: Mapping[str, float] = Field(default_factory=dict)
    free_memory_bytes: int | None = None
    ports_gone: bool = False


class Watchdog:
    def __init__(self, policy: Policy, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self._watch = watch.begin(policy, time.monotonic())
        self._send = send
        self._info: StreamInfo | None = None
        self._health: Health | None = None
        self._heard_at_s = self._asked_at_s = self._watch.began_s
        self._io_error: str | None = None

    @property
    def policy(self) -> Policy:
        return self._watch.policy

    @property
    def lines(self) -> tuple[WatchLine, ...]:
        return self._watch.lines

    def begin(self) -> None:
        """Pre-copy begins now."""
        self._watch = watch.begin(self.policy, time.monotonic())
        self._heard_at_s = self._asked_at_s = self._watch.began_s

    async def ask(self) -> None:
        """Ask the target for its health, if it is time to."""
        now_s = time.monotonic()
        if now_s - self._asked_at_s >= HEALTH_S:
            self._asked_at_s = now_s
            await self._send({"type": "health"})

    def told(self, message: dict[str, Any]) -> None:
        """Take what the target says that is not the protocol's."""
        if message.get("type") != "health":
            return
        try:
            told = {name: message[name] for name in Health.model_fields if name in message}
            self._health = Health.model_validate(told)
        except ValidationError as error:
            log.warning("the target's health is not understood: %s", error)
        else:
            self._heard_at_s = time.monotonic()

    def io_error(self, detail: str | None) -> AbortAsked | None:
        """A volume has failed on the source, and QEMU is pausing the guest."""
        self._io_error = detail or "no detail"
        return self.look(self._info)

    def look(self, info: StreamInfo | None) -> AbortAsked | None:
        """Judge what is known now; ``info`` None: QEMU did not say, so what it said last counts on."""
        now_s = time.monotonic()
        self._info = info = info or self._info or StreamInfo(StreamStatus.NONE)
        health, since_s = self._health or Health(), now_s - self._heard_at_s
        sample = Sample(
            at_s=now_s,
            sent_bytes=info.transferred_bytes,
            remaining_bytes=info.remaining_bytes,
            bandwidth_bytes_per_s=info.bandwidth_bytes_per_s,
            dirty_bytes_per_s=info.dirty_bytes_per_s,
            passes=info.passes,
            io_error=self._io_error,
            qemu_silent_s=health.qemu_silent_s + since_s,
            volumes_silent_s={volume: age_s + since_s for volume, age_s in health.volumes_silent_s.items()},
            free_memory_bytes=health.free_memory_bytes,
            ports_gone=health.ports_gone,
        )
        self._watch, verdict = watch.look(self._watch, sample)
        return AbortAsked(str(verdict)) if verdict else None

    def goes_back(self, event: Event) -> None:
        """Note at its check what has made the protocol itself go back."""
        match event:
            case LinkLost():
                self._blame(Check.AGENT, "connection lost")
            case TargetFailed(reason):
                unread = reason.startswith(VOLUME_UNREAD)
                self._blame(Check.VOLUMES if unread else Check.QEMU if reason == TARGET_GONE else Check.STREAM, reason)
            case StreamMoved(Stream.BROKEN, reason):
                self._blame(Check.STREAM, reason or "broke")
            case TimerFired(Timer.DEADLINE):
                self._blame(Check.DEADLINE, f"{self.policy.deadline_s:g} s")
            case TimerFired(Timer.BLACKOUT):
                self._blame(Check.BLACKOUT, f"{self.policy.blackout_deadline_s:g} s")

    def _blame(self, check: Check, what: str) -> None:
        self._watch = watch.blame(self._watch, check, what)
