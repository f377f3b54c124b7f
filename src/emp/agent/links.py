"""The wire between the two agents of a migration: opened before HANDOVER, used in the blackout.

The source opens it; after a break whoever has something to say or to ask does.

=========  ================  ==========================================================
message    from -> to        fields
=========  ================  ==========================================================
hello      both              migration, journal, seq: who dials says it first; ``carries``:
                             "frames" on a link of its own (``emp.agent.tunnel``)
clock      both              t1_s, then back with t2_s, t3_s (RFC 5905, section 8)
loaded     target -> source  nonce
go         source -> target  epoch, nonce
ask        both              nonce: where do you stand?
answer     target -> source  word (``emp.migration.events.Word``), nonce
failed     target -> source  reason
aborted    source -> target
health     both              a question, then back with ``emp.agent.health``'s answer
addresses  source -> target  learnt: what the EVM may use beside what it declares; on each link, and when that changes
tracked    source -> target  connections: what this node's connection tracking knows of the EVM's connections
traffic    source -> target  counted: what went over the EVM's taps until it was given away; behind go
=========  ================  ==========================================================

A question about a migration that no role is busy with is answered from the journal. ``journal`` and ``seq`` (in every
message) say how far the sender's journal is: a peer whose journal is not the one it was, or behind what it has been, is
told nothing and not listened to.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from emp import faults
from emp.agent.journal import Journal, Standing
from emp.migration import admission
from emp.migration.events import (
    Event,
    GoArrived,
    LinkLost,
    PeerAsks,
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
HELLO_S = 2.0


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
        case {"type": "ask", "nonce": str(nonce)}:
            return PeerAsks(nonce)
    return None


def hello(journal: Journal, migration: str, *, carries: str | None = None) -> Message:
    standing = journal.standing
    said = {"type": "hello", "migration": migration, "journal": standing.id, "seq": standing.seq}
    return said | ({"carries": carries} if carries else {})


def standing_in(message: Message) -> Standing | None:
    """Return how far the peer's journal is, from its ``hello``."""
    match message:
        case {"type": "hello", "journal": str(journal), "seq": int(seq)}:
            return Standing(journal, seq)
    return None


async def exchange_hello(link: Link, journal: Journal, migration: str, *, carries: str | None = None) -> Standing:
    """Say hello on a link just dialled, and return how far the peer's journal is. Raises ``Unreachable``."""
    await link.send(hello(journal, migration, carries=carries))
    try:
        async with asyncio.timeout(HELLO_S):
            reply = await anext(aiter(link), None)
    except TimeoutError:
        reply = None
    if reply is None or (standing := standing_in(reply)) is None:
        raise Unreachable(f"{link.peer} does not answer on its link, or does not answer for its journal")
    return standing


def answer_from_journal(journal: Journal, migration: str, message: Message, *, peer: str) -> Message | None:
    """Return what node ``peer`` is told of a migration that no role is busy with; None: nothing can be said.

    On a target this answers GO and a question of its source, on a source a question of its target.
    """
    if message.get("type") not in ("go", "ask"):
        return None
    for evm in journal.evms:
        ledger = journal.ledger(evm)
        end = ledger.end_of(migration)
        if end is None or end.peer != peer:
            continue
        if sworn := admission.word_of(ledger, migration):
            word, nonce = sworn
            return {"type": "answer", "word": word.value, "nonce": nonce}
        if message["type"] == "ask":
            match admission.reply_of(ledger, migration):
                case GoArrived(epoch, nonce):
                    return {"type": "go", "epoch": epoch, "nonce": nonce}
                case SourceAborted():
                    return {"type": "aborted"}
    return None


class PeerLink:
    """A role's hold on its peer: sends over the newest link, feeds what comes over any, tells when the last is lost."""

    def __init__(self, feed: Callable[[Event], None], journal: Journal, told: Callable[[Message], None]) -> None:
        """``told`` gets what is not the core's business."""
        self._feed = feed
        self._told = told
        self._journal = journal
        self._links: list[Link] = []
        self._seen: Standing | None = None
        """the furthest that the peer's journal has been"""

    @property
    def up(self) -> bool:
        return bool(self._links)

    def attach(self, link: Link, standing: Standing) -> bool:
        """Use ``link`` from now on; False, and drop it, where the peer's journal has lost what it had."""
        if self._seen is not None and self._seen.later_than(standing):
            log.error("%s: its journal is %s, and it has been %s: not believed", link.peer, standing, self._seen)
            link.abort()
            return False
        self._seen = standing
        self._links.append(link)
        return True

    async def send(self, message: Message) -> None:
        """Send now or not at all: what matters is repeated by the core until it is answered."""
        if self._links:
            try:
                for _ in range(await _times(message, "send")):
                    await self._links[-1].send({**message, "seq": self._journal.standing.seq})
            except EmpError as error:
                log.info("link: %s not sent: %s", message.get("type"), error)

    async def pump(self, link: Link) -> None:
        """Feed what comes over ``link`` until it ends."""
        async for message in link:
            if message.get("type") == "clock" and "t2_s" not in message:
                await link.send({**message, "t2_s": time.time(), "t3_s": time.time()})
                continue
            event = event_of(message)
            if event is not None:
                self._note(message.get("seq"))
            for _ in range(await _times(message, "receive")):
                self._told(message) if event is None else self._feed(event)
        if link in self._links:
            self._links.remove(link)
            if not self._links:
                self._feed(LinkLost())

    def _note(self, seq: object) -> None:
        if isinstance(seq, int) and self._seen is not None and seq > self._seen.seq:
            self._seen = Standing(self._seen.id, seq)

    async def close(self) -> None:
        links, self._links = self._links, []
        for link in links:
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
