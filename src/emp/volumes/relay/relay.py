"""The relay itself: where the volume is, whether its requests go there now, and the orders that change it.

It *runs*, or is *held*: then it sends nothing to the volume and has no connection to it. ``hold`` first waits for what
is outstanding, and flushes. Apart from that, writes wait until ``open``: the volume's owner may still be somebody else.
What has been ordered is on disk before it is done, so that a relay that was killed goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import asdict, replace
from enum import StrEnum
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from emp.model.errors import Conflict, EmpError, HostError, Refused, Unreachable
from emp.volumes.nbd_wire import REPLY, Export, Flag, Kind, Stream, pack_request, say_goodbye
from emp.volumes.relay.config import RelayConfig, TlsListen, Upstream
from emp.volumes.relay.figures import Figures
from emp.volumes.relay.session import AGAIN_S, Session
from emp.volumes.relay.upstream import MakeSource, Source, make_source

log = logging.getLogger(__name__)

PASSED_ON = int(reduce(or_, Flag))
"""flags of the volume that are announced; not those of structured replies, nor of several connections that write"""
NO_PROMISES = int(Flag.READ_ONLY | Flag.ROTATIONAL)
"""flags that say less, and not more, can be done"""
END_S = 1.0
"""how long what is outstanding may take when the relay ends"""


class Mode(StrEnum):
    """``emp.volumes.base.RelayState``, without what makes that slow to import."""

    CONNECTING = "connecting"
    """it has not reached the volume yet, and clients wait in the handshake"""
    RUNNING = "running"
    HOLDING = "holding"
    """it waits for what is outstanding, and takes nothing new"""
    HELD = "held"


class Relay:
    """See ``session.Hub`` and the module. Made inside a running event loop; ``start`` it."""

    def __init__(self, path: Path, config: RelayConfig, make: MakeSource = make_source) -> None:
        self._make = make
        self.config = config
        self.figures = Figures()
        self.problem: EmpError | None = None
        self._path = path
        self._sessions: set[Session] = set()
        self._is_holding = False
        self._connectable = asyncio.Event()
        self._known = asyncio.Event()
        self._told = asyncio.Event()
        """set at each news of whether the volume can be reached"""
        self._settled = asyncio.Event()
        self._orders = asyncio.Lock()
        self._source = None if config.upstream is None else self._make_source(config.upstream)
        self._look: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look for the volume."""
        if self._mode is Mode.HELD and self._source is not None:
            await self._source.close()  # what a relay that was killed may have left
        if self.config.flags is not None:
            self._known.set()
        else:
            self._look = asyncio.create_task(self._look_once(), name="look")
        self._changed()

    async def close(self) -> None:
        """Let go of the volume and of every client. What is waiting is never done; what is outstanding may finish."""
        if self._look is not None:
            self._look.cancel()
            await asyncio.wait({self._look})
        self._is_holding = True
        with suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self._until_settled()
        for session in self._sessions:
            session.leave()
            session.cut()
        if self._source is not None:
            await self._source.close()

    # ------------------------------------------------------------------ for the clients

    async def facts(self) -> tuple[int, int]:
        """Return size and flags as announced, as soon as they are known."""
        await self._known.wait()
        assert self.config.flags is not None
        return self.config.size_bytes, self.config.flags

    async def serve(self, client: Stream) -> None:
        """Serve a client that is in the transmission phase, until it is gone."""
        session = Session(self, client)
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            self._push()

    # ------------------------------------------------------------------ for the sessions

    @property
    def takes_requests(self) -> bool:
        return self._mode is Mode.RUNNING and not self._is_holding

    @property
    def takes_writes(self) -> bool:
        """Not while a write of a client that is gone is on its way: it must not come after one of the next client."""
        return self.config.writes_open and not any(s.gone and s.has_writes_outstanding for s in self._sessions)

    async def until_connectable(self) -> None:
        await self._connectable.wait()

    async def connect(self) -> Export:
        """As ``session.Hub`` says. The first one ever decides what is announced."""
        if self._source is None:
            raise Unreachable("the relay has no volume yet", hint="switch it to one")
        export = await self._source.connect()
        try:
            self._check(export)
        except BaseException:
            say_goodbye(export.stream)
            raise
        self._learn(export)
        self.problem = None
        return export

    def failed(self, error: Exception) -> None:
        """Remember why the volume could not be connected to."""
        self.problem = error if isinstance(error, EmpError) else _unreachable(error)
        self._told.set()

    def about_to_write(self, session: Session) -> None:
        """Between nodes the newest client that writes is the only one.

        An older one is a connection that its other end has given up, and the network has not yet. (On a unix socket
        there is no such thing.) A client that only reads is an agent that looks whether the volume is there.
        """
        if isinstance(self.config.listen, TlsListen):
            for other in self._sessions:
                if other is not session and other.wrote:
                    log.info("a newer client writes: an older one is sent away")
                    other.leave()

    def settled(self) -> None:
        self._settled.set()
        self._push()

    # ------------------------------------------------------------------ orders

    async def open(self) -> None:
        """Let writes through, those that wait first."""
        async with self._orders:
            self._save(writes_open=True)
            for session in self._sessions:
                session.leave_if_hung_up()
            self._push()

    async def reach(self, within_s: float) -> None:
        """Return once the volume has been reached; raise why it has not (``Refused``: it is not the right one)."""
        try:
            async with asyncio.timeout(within_s):
                while not self._known.is_set():
                    if isinstance(self.problem, Refused):
                        raise self.problem
                    self._told.clear()
                    await self._told.wait()
        except TimeoutError:
            raise self.problem or Unreachable("the volume does not answer") from None

    async def hold(self, within_s: float) -> None:
        """Send nothing new; return when all is answered and flushed, and there is no connection to the volume.

        Raises ``Unreachable`` if that is not so ``within_s``, ``HostError`` if the volume cannot be flushed. It is held
        all the same, without a connection. What is outstanding is kept, and sent again by ``switch``, or
        by another ``hold``, which tries anew.
        """
        async with self._orders:
            if self._mode is Mode.HELD and self.config.is_flushed:
                return
            self._save(held_since_s=self.config.held_since_s or time.time(), is_flushed=False)
            self._is_holding = True
            self._changed()
            try:
                async with asyncio.timeout(within_s):
                    await self._until_settled()
                    await self._flush()
            except TimeoutError:
                count = self._outstanding
                what = f"{count} requests are unanswered" if count else "it is not flushed"
                raise Unreachable(
                    f"the volume does not answer: {what} after {within_s:g} s",
                    hint="the relay is held, and keeps what it has: let it go on where the volume is, or hold it again",
                ) from None
            finally:
                self._is_holding = False
                self._changed()
                for session in self._sessions:
                    session.cut()
                if self._source is not None:
                    await self._source.close()
            self._save(is_flushed=True)

    async def switch(self, upstream: Upstream) -> None:
        """Go on with the volume where it is now, or still is; it stays held if that fails.

        Raises ``Refused`` when what is there is not the volume, ``Unreachable`` or ``HostError`` when it does not open.
        """
        async with self._orders:
            if self._mode is not Mode.HELD:
                if upstream == self.config.upstream:
                    return
                raise Conflict("the relay is not held", hint="hold it first")
            source = self._make_source(upstream)
            try:
                export = await source.connect()
                say_goodbye(export.stream)
                self._check(export)
                self._learn(export)
                self._save(upstream=upstream)
            except BaseException as error:
                await source.close()
                if isinstance(error, OSError | EOFError):
                    raise _unreachable(error) from error
                raise
            self._source = source
            self._go_on()

    def status(self) -> dict[str, Any]:
        """Return what ``emp.volumes.base.RelayStatus`` has, but for its port."""
        figures: dict[str, Any] = asdict(self.figures) | {"round_trip": self.figures.round_trip.as_dict()}
        return figures | {
            "state": str(self._mode),
            "writes_open": self.config.writes_open,
            "clients": sum(not session.gone for session in self._sessions),
            "outstanding": self._outstanding,
            "waiting": sum(len(session.waiting) for session in self._sessions),
            "is_flushed": self._mode is Mode.HELD and self.config.is_flushed,
            "held_since_s": self.config.held_since_s,
            "problem": None if self.problem is None else str(self.problem),
        }

    # ------------------------------------------------------------------ inside

    @property
    def _mode(self) -> Mode:
        if self._is_holding:
            return Mode.HOLDING
        if self.config.held_since_s is not None:
            return Mode.HELD
        return Mode.CONNECTING if self.config.flags is None else Mode.RUNNING

    @property
    def _outstanding(self) -> int:
        return sum(len(session.outstanding) for session in self._sessions)

    def _make_source(self, upstream: Upstream) -> Source:
        return self._make(upstream, tls_dir=Path(self.config.tls_dir), run_dir=self._path.parent)

    def _save(self, **changes: Any) -> None:
        config = replace(self.config, **changes)
        try:
            config.save(self._path)
        except OSError as error:
            raise HostError(f"cannot write {self._path}: {error.strerror}", hint="make room for it") from error
        self.config = config

    def _changed(self) -> None:
        """Let sessions connect, or not."""
        if self._source is not None and self._mode is not Mode.HELD:
            self._connectable.set()
        else:
            self._connectable.clear()

    def _go_on(self) -> None:
        self._save(held_since_s=None, is_flushed=False)
        self._changed()
        self._push()

    def _push(self) -> None:
        for session in self._sessions:
            session.push()

    async def _look_once(self) -> None:
        """See what the volume is, for whoever is waiting to be told."""
        while not self._known.is_set():
            await self.until_connectable()
            try:
                say_goodbye((await self.connect()).stream)
            except (OSError, EOFError, EmpError) as error:
                self.failed(error)
                await asyncio.sleep(AGAIN_S)

    def _check(self, export: Export) -> None:
        """Raise ``Refused`` unless it is of the right size, and can do all that clients were told."""
        if export.size_bytes != self.config.size_bytes:
            raise Refused(
                f"the volume there has {export.size_bytes} bytes, not {self.config.size_bytes}",
                field="size_bytes",
                hint="it is another one",
            )
        if self.config.flags is None:
            return
        missing = Flag(self.config.flags & ~export.flags & PASSED_ON & ~NO_PROMISES)
        missing |= Flag(export.flags & ~self.config.flags & Flag.READ_ONLY)
        if missing:
            names = ", ".join(str(flag.name).lower().replace("_", " ") for flag in missing)
            raise Refused(
                f"the volume there differs from what its client was told: {names}",
                field="upstream",
                hint="open it in the same way as before",
            )

    def _learn(self, export: Export) -> None:
        if self.config.flags is None:
            self._save(flags=export.flags & PASSED_ON)
        self._known.set()
        self._told.set()
        self._push()

    async def _until_settled(self) -> None:
        while self._outstanding:
            self._settled.clear()
            await self._settled.wait()

    async def _flush(self) -> None:
        """Flush on every connection that may have written; on a new one if there is none."""
        if self._source is None or not (self.config.flags or 0) & Flag.FLUSH:
            return
        while sessions := [session for session in self._sessions if not session.gone]:
            codes = await asyncio.gather(*(session.flush() for session in sessions))
            if not any(session.gone for session in sessions):
                break  # else a client has gone in between: what it wrote is to be flushed all the same
        else:
            codes = [await self._flush_anew()]
        if any(codes):
            raise HostError(f"the volume refuses to flush, error {max(codes)}", hint="see its server's log")

    async def _flush_anew(self) -> int:
        while True:
            try:
                stream = (await self.connect()).stream
                try:
                    stream.send(pack_request(Kind.FLUSH, 1))
                    _, code, _ = REPLY.unpack(await stream.readexactly(REPLY.size))
                finally:
                    say_goodbye(stream)
                return int(code)
            except (OSError, EOFError, EmpError) as error:
                self.failed(error)
                await asyncio.sleep(AGAIN_S)


def _unreachable(error: Exception) -> Unreachable:
    return Unreachable(f"cannot open the volume: {str(error) or 'no answer'}", hint="see whether it is there")
