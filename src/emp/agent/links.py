"""The wire between the two agents of a migration: opened before HANDOVER, used in the blackout, one per migration.

=========  ================  ==========================================================
message    from -> to        fields
=========  ================  ==========================================================
hello      source -> target  migration
clock      both              t1_s, then back with t2_s, t3_s (RFC 5905, section 8)
loaded     target -> source  nonce
go         source -> target  epoch, nonce
answer     target -> source  word (``activated`` or ``withdrawn``), nonce
failed     target -> source  reason
aborted    source -> target
=========  ================  ==========================================================

A question about a migration that no role is busy with is answered from the journal.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from emp import faults
from emp.agent.journal import Journal
from emp.migration import admission
from emp.migration.events import (
    Event,
    GoArrived,
    LinkLost,
    SourceAborted,
    TargetAnswered,
    TargetFailed,
    TargetLoaded,
    Word,
)
from emp.model.errors import EmpError, Unreachable
from emp.wire.link import Link

log = logging.getLogger(__name__)

Message = dict[str, Any]

_CLOCK_ROUNDS = 5
_CLOCK_S = 2.0


def event_of(message: Message) -> Event | None:
    """Translate a message into the core's event; None for what is not the core's business."""
    match message:
        case {"type": "loaded", "nonce": str(nonce)}:
            return TargetLoaded(nonce)
        case {"type": "go", "epoch": int(epoch), "nonce": str(nonce)}:
            return GoArrived(epoch, nonce)
        case {"type": "answer", "word": str(word), "nonce": str(nonce)}:
            return TargetAnswered(Word(word), nonce)
        case {"type": "failed", "reason": str(reason)}:
            return TargetFailed(reason)
        case {"type": "aborted"}:
            return SourceAborted()
    return None


def answer_from_journal(journal: Journal, migration: str, message: Message) -> Message | None:
    """Return the answer to a late ``go`` (on the target); None where there is nothing to be said."""
    if message.get("type") not in ("go", "hello"):
        return None
    for evm in journal.evms:
        if sworn := admission.word_of(journal.ledger(evm), migration):
            word, nonce = sworn
            return {"type": "answer", "word": word.value, "nonce": nonce}
    return None


class PeerLink:
    """A role's hold on the link: sends while there is one, feeds what comes, tells when it is lost."""

    def __init__(self, feed: Callable[[Event], None]) -> None:
        self._feed = feed
        self._link: Link | None = None

    @property
    def up(self) -> bool:
        return self._link is not None

    def attach(self, link: Link) -> None:
        """Use ``link`` from now on; an older one is forgotten."""
        self._link = link

    async def send(self, message: Message) -> None:
        """Send now or not at all: what matters is repeated by the core until it is answered."""
        if self._link is not None:
            try:
                for _ in range(await _times(message, "send")):
                    await self._link.send(message)
            except EmpError as error:
                log.info("link: %s not sent: %s", message.get("type"), error)

    async def pump(self, link: Link) -> None:
        """Feed what comes over ``link`` until it ends."""
        async for message in link:
            if message.get("type") == "clock" and "t2_s" not in message:
                await link.send({**message, "t2_s": time.time(), "t3_s": time.time()})
            elif event := event_of(message):
                for _ in range(await _times(message, "receive")):
                    self._feed(event)
        if self._link is link:
            self._link = None
            self._feed(LinkLost())

    async def close(self) -> None:
        if self._link is not None:
            link, self._link = self._link, None
            await link.close()


async def _times(message: Message, doing: str) -> int:
    """How often a message is sent or taken: once, unless a fault point says otherwise."""
    return await faults.board.reach(f"link.{message['type']}.{doing}") if faults.board else faults.ONCE


async def measure_clock(link: Link) -> tuple[float, float]:
    """Return (offset_ms, error_ms): the peer's clock less ours, half of the shortest round trip. Before any pump."""
    best: tuple[float, float] | None = None
    for _ in range(_CLOCK_ROUNDS):
        sent_s, began_s = time.time(), time.monotonic()
        await link.send({"type": "clock", "t1_s": sent_s})
        try:
            async with asyncio.timeout(_CLOCK_S):
                reply = await anext(aiter(link), None)
        except TimeoutError:
            reply = None
        if reply is None:
            raise Unreachable(f"{link.peer} does not answer on its link")
        trip_s = time.monotonic() - began_s
        t2_s, t3_s = float(reply["t2_s"]), float(reply["t3_s"])
        offset_s = ((t2_s - sent_s) + (t3_s - (sent_s + trip_s))) / 2
        if best is None or trip_s < best[1]:
            best = (offset_s, trip_s)
    assert best is not None
    return best[0] * 1000, best[1] * 1000 / 2
