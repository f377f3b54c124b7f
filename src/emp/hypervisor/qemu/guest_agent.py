"""Asks the agent inside the guest what time it is there, and sets a clock that is behind.

The protocol is that of QEMU's guest agent, a line of JSON each way ("QEMU Guest Agent Protocol Reference" of QEMU's
documentation). What an earlier client has asked may be answered to this one: so each connection begins with
``guest-sync-delimited``, whose answer has a byte before it that no JSON has.

The guest's offset is measured as NTP does (RFC 5905 section 8): of several exchanges the one with the shortest round
trip says it, off by half that at most.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emp.hypervisor.base import NoGuestAgent
from emp.model.clock import GuestClock
from emp.model.errors import HypervisorError

SYNC_S = 1.0
"""for the first answer: an agent that lives takes milliseconds, a guest that boots has none"""
ANSWER_S = 2.0
SET_S = 15.0
"""``guest-set-time`` sets the clock at once, and answers after ``hwclock -w`` has waited for a second to begin"""
EXCHANGES = 5
ROUNDS = 3
"""The first order is late by what the guest takes to read it into its caches."""
BEHIND_MS = 1.0
"""a clock that is behind by less is left as it is"""
_SENTINEL = b"\xff"
_LINE_BYTES = 64 * 1024
_SHOWN = 120
"""characters of what a guest says that are repeated"""
_NS_PER_MS = 1e6


@dataclass(frozen=True)
class Offset:
    """What some exchanges said, in milliseconds."""

    offset_ms: float
    """the guest's clock less this host's"""
    round_trip_ms: float
    """of the shortest exchange"""
    longest_ms: float
    """round trip of the longest one"""

    @property
    def error_ms(self) -> float:
        return self.round_trip_ms / 2


class GuestAgent:
    """One connection to the agent, in sync. Made by ``connected``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def sync(self) -> None:
        """Have both ends drop what is left of earlier clients. Raises ``NoGuestAgent`` when nobody answers."""
        number = secrets.randbits(31)
        async with _within(SYNC_S, "guest-sync-delimited"):
            # The byte first: it makes the agent drop a half-read line.
            await self._send("guest-sync-delimited", {"id": number}, first=_SENTINEL)
            while True:
                await self._reader.readuntil(_SENTINEL)
                # Another number, or no answer at all, is left of an earlier client.
                if _parsed(await self._reader.readuntil(b"\n")).get("return") == number:
                    return

    async def measure(self, exchanges: int = EXCHANGES) -> Offset:
        """Return the offset of the guest's wall clock. Raises as ``ask``."""
        seen: list[tuple[float, float]] = []
        for _ in range(exchanges):
            began_ns, began = time.time_ns(), time.perf_counter_ns()
            guest_ns = await self.ask("guest-get-time")
            round_trip = time.perf_counter_ns() - began
            if type(guest_ns) is not int or not 0 <= guest_ns < 1 << 63:
                raise NoGuestAgent(f"the guest's agent gives the time as {str(guest_ns)[:40]!r}")
            seen.append((round_trip / _NS_PER_MS, (guest_ns - began_ns - round_trip / 2) / _NS_PER_MS))
        round_trip_ms, offset_ms = min(seen)
        return Offset(offset_ms, round_trip_ms, max(seen)[0])

    async def set_time(self, *, later_ms: float) -> None:
        """Set the guest's clock to this host's time, and ``later_ms``: what the order takes to get there.

        Raises as ``ask``; the clock may then be set all the same.
        """
        await self.ask("guest-set-time", {"time": time.time_ns() + int(later_ms * _NS_PER_MS)}, within_s=SET_S)

    async def ask(self, command: str, arguments: dict[str, Any] | None = None, *, within_s: float = ANSWER_S) -> Any:
        """Return what the agent returns. Raises ``HypervisorError`` for its refusal, ``NoGuestAgent`` without answer.

        After the latter the connection is out of sync, and of no more use.
        """
        async with _within(within_s, command):
            await self._send(command, arguments)
            line = await self._reader.readuntil(b"\n")
        answer = _parsed(line)
        if "error" in answer:
            raise HypervisorError(f"the guest's agent refuses {command}: {repr(answer['error'])[:_SHOWN]}")
        if "return" not in answer:
            raise NoGuestAgent(f"the guest's agent answers {command} with {line[:_SHOWN]!r}")
        return answer["return"]

    async def _send(self, command: str, arguments: dict[str, Any] | None = None, *, first: bytes = b"") -> None:
        order: dict[str, Any] = {"execute": command}
        if arguments:
            order["arguments"] = arguments
        self._writer.write(first + json.dumps(order).encode() + b"\n")
        await self._writer.drain()


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[GuestAgent]:
    """Connect to the machine's socket of the guest agent, and get in sync. Raises ``NoGuestAgent``."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(path), limit=_LINE_BYTES)
    except OSError as error:  # a machine that an older release has started has no such socket
        raise NoGuestAgent(f"the machine has no channel to an agent in its guest: {error.strerror}") from error
    try:
        agent = GuestAgent(reader, writer)
        await agent.sync()
        yield agent
    finally:
        writer.transport.abort()  # whatever a hung machine has not taken is of no use to the next one
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def set_clock(path: Path) -> GuestClock:
    """Set the guest's wall clock to this host's where it is behind; return how it stands then.

    Never back: a clock that is ahead is left. Nor may an order that is late set it back, as ``guest-set-time`` takes
    any time. So it is only given where the guest is behind by more than the longest exchange has just taken: then it
    would have to be later than that.

    Raises ``NoGuestAgent``, ``HypervisorError`` where the agent refuses to tell the time.
    """
    async with connected(path) as agent:
        found = now = await agent.measure()
        trouble = None
        for _ in range(ROUNDS):
            if now.offset_ms >= -max(BEHIND_MS, now.longest_ms):
                break
            try:
                await agent.set_time(later_ms=now.error_ms)
            except NoGuestAgent:
                raise
            except HypervisorError as error:  # it may be set: qemu-ga then says that the hardware clock is not
                trouble = error.message
            now = await agent.measure()
        is_set = now.offset_ms > found.offset_ms + BEHIND_MS
        clock = GuestClock(
            found_ms=round(found.offset_ms, 3),
            now_ms=round(now.offset_ms, 3),
            error_ms=round(now.error_ms, 3),
            is_set=is_set,
            at_s=time.time(),
        )
        return clock if clock.is_right else clock.model_copy(update={"trouble": trouble or _why(found, now)})


def _why(found: Offset, now: Offset) -> str:
    if now.offset_ms > now.error_ms:
        return "it is ahead, and a clock is never set back: it is left to the guest's own NTP"
    return f"its agent takes up to {max(found.longest_ms, now.longest_ms):.0f} ms to answer"


@contextlib.asynccontextmanager
async def _within(within_s: float, command: str) -> AsyncIterator[None]:
    """Turn whatever ends an exchange without its answer into ``NoGuestAgent``."""
    try:
        async with asyncio.timeout(within_s):
            yield
    except TimeoutError:
        raise NoGuestAgent(f"no agent in the guest answers {command}") from None
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise NoGuestAgent(f"the channel to the guest's agent broke off at {command}") from error
    except OSError as error:
        raise NoGuestAgent(f"the channel to the guest's agent broke off at {command}: {error.strerror}") from error


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the object on a line; empty where there is none: a guest may say anything."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
