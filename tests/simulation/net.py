"""The pool's network: requests, event streams and switchover links between processes, over ways that can be cut.

``SimWire`` stands in for ``emp.wire.http.WireClient`` and ``SimLink`` for ``emp.wire.link.Link``: the same outcomes, by
the same rules. A way is cut for one direction of one pair of hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, get_origin

from emp.model.errors import EmpError, OutcomeUnknown, Unavailable, Unreachable
from emp.wire.exchange import Event
from emp.wire.http import CONNECT_S, QUIET_S, TIMEOUT_S
from emp.wire.identity import Identity
from emp.wire.link import DEAD_AFTER_S
from tests.simulation.loop import Process, VirtualLoop, here
from tests.simulation.routes import RouteTable, as_client_sees, events_of

LATE_S = (1.0, 30.0)


class Moments(Protocol):
    async def moment(self, what: str, host: str) -> str | None: ...


@dataclass
class Server:
    process: Process
    table: RouteTable
    waiting: list[asyncio.Future[Any]] = field(default_factory=list)
    streams: list[asyncio.Queue[Any]] = field(default_factory=list)

    def died(self) -> None:
        for answer in self.waiting:
            if not answer.done():
                answer.set_exception(ConnectionResetError("connection reset by peer"))
        for queue in self.streams:
            queue.put_nowait(Unavailable("the stream broke: connection reset by peer"))


class Net:
    def __init__(self, loop: VirtualLoop, moments: Moments) -> None:
        self.loop = loop
        self.rng = loop.rng
        self.moments = moments
        self.cuts: dict[tuple[str, str], int] = {}
        self.servers: dict[str, Server] = {}
        self.link_servers: dict[str, tuple[Process, Callable[[Any], None]]] = {}
        self.links: list[SimLink] = []
        self.mangling: list[str] = []
        """what becomes of the next orders: ``lost``, ``reply lost``, ``late``, ``twice``"""

    # -- ways

    def blocks(self, one: str, other: str) -> bool:
        return one != other and self.cuts.get((one, other), 0) > 0

    def reaches(self, one: str, other: str) -> bool:
        return not self.blocks(one, other) and not self.blocks(other, one)

    def cut(self, one: str, other: str) -> None:
        self.cuts[one, other] = self.cuts.get((one, other), 0) + 1
        self._ways_changed()

    def heal(self, one: str, other: str) -> None:
        self.cuts[one, other] = max(0, self.cuts.get((one, other), 0) - 1)
        self._ways_changed()

    def _ways_changed(self) -> None:
        for link in tuple(self.links):
            link.look_at_way()

    async def latency(self) -> None:
        await asyncio.sleep(self.rng.uniform(0.0002, 0.004))
        here()

    # -- links

    async def dial(self, host: str, me: Identity, to: str, peer: Identity) -> SimLink:
        await self.moments.moment(f"dial {to}", host)
        await self.latency()
        if not self.reaches(host, to):
            await asyncio.sleep(CONNECT_S)
            raise Unreachable(f"{peer} cannot be reached: no answer in time")
        found = self.link_servers.get(to)
        if found is None or not found[0].alive:
            raise Unreachable(f"{peer} cannot be reached: Connection refused")
        process, on_link = found
        caller = here()
        assert caller is not None
        near, far = SimLink(self, host, to, peer), SimLink(self, to, host, me)
        near.other, far.other = far, near
        self.links += [near, far]
        for link, owner in ((near, caller), (far, process)):
            owner.on_death.append(link.owner_died)
        process.call(lambda: on_link(far))
        await self.latency()
        return near


class SimLink:
    """One end of a link."""

    other: SimLink

    def __init__(self, net: Net, host: str, peer_host: str, peer: Identity) -> None:
        self.peer = peer
        self.host = host
        self.closed: asyncio.Future[EmpError | None] = net.loop.create_future()
        self._net = net
        self._peer_host = peer_host
        self._received: deque[dict[str, Any]] = deque()
        self._held: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._next_at = 0.0
        self._dead_timer: asyncio.TimerHandle | None = None

    async def send(self, message: Mapping[str, Any]) -> None:
        here()
        if self.closed.done():
            raise Unreachable(f"the link to {self.peer} is closed")
        kind = message.get("type")
        if kind != "clock":
            await self._net.moments.moment(f"link {kind}", self.host)
        if not self.closed.done():
            self.other.comes(dict(message))
        if kind != "clock":
            await self._net.moments.moment(f"link {kind} sent", self.host)

    def comes(self, message: dict[str, Any]) -> None:
        net = self._net
        at = max(net.loop.now + net.rng.uniform(0.0002, 0.003), self._next_at)
        self._next_at = at + 1e-6
        net.loop.call_at(at, self._arrive, message)

    def _arrive(self, message: dict[str, Any]) -> None:
        if self.closed.done():
            return
        if self._net.blocks(self._peer_host, self.host) or self._held:
            self._held.append(message)
        else:
            self._received.append(message)
            self._news.set()

    def __aiter__(self) -> SimLink:
        return self

    async def __anext__(self) -> dict[str, Any]:
        while not self._received:
            here()
            if self.closed.done():
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        here()
        return self._received.popleft()

    def look_at_way(self) -> None:
        if self.closed.done():
            return
        if self._net.blocks(self._peer_host, self.host):
            if self._dead_timer is None:
                silent_s = DEAD_AFTER_S + self._net.rng.uniform(0, 0.25)
                self._dead_timer = self._net.loop.call_later(silent_s, self._silent)
            return
        if self._dead_timer is not None:
            self._dead_timer.cancel()
            self._dead_timer = None
        held, self._held = self._held, []
        for message in held:
            self._arrive(message)
        if self.other.closed.done():
            self._net.loop.call_later(0.001, self.ends, Unavailable(f"the link to {self.peer} broke"))

    def _silent(self) -> None:
        self.ends(Unavailable(f"{self.peer} has been silent for {DEAD_AFTER_S:g} s"))

    def ends(self, cause: EmpError | None) -> None:
        """This end is gone; the other hears of it unless the way there is cut."""
        if self.closed.done():
            return
        self.closed.set_result(cause)
        self._news.set()
        if self._dead_timer is not None:
            self._dead_timer.cancel()
        if self in self._net.links:
            self._net.links.remove(self)
        if not self._net.blocks(self.host, self._peer_host):
            broke = Unavailable(f"the link to {self.other.peer} broke") if cause else None
            self._net.loop.call_later(self._net.rng.uniform(0.0002, 0.003), self.other.ends, broke)

    def owner_died(self) -> None:
        self.ends(Unavailable("its process is gone"))

    async def close(self, error: EmpError | None = None) -> None:
        here()
        self.ends(error)

    def abort(self) -> None:
        self.ends(Unavailable("dropped"))


class SimWire:
    """A client of the daemon on host ``to``."""

    def __init__(self, net: Net, caller: Identity, host: str, to: str) -> None:
        self._net = net
        self._caller = caller
        self._host = host
        self._to = to

    async def request(
        self, method: str, path: str, body: Any = None, *, response_model: Any = None, query: Any = None,
        idempotent: bool | None = None, timeout_s: float | None = None,
    ) -> Any:  # fmt: skip
        net, order = self._net, f"{method} {path}"
        harmless = method in ("GET", "HEAD") if idempotent is None else idempotent
        await net.moments.moment(order, self._host)
        server = await self._connected()
        answer: asyncio.Future[Any] = net.loop.create_future()
        server.waiting.append(answer)
        mangling = net.mangling.pop() if net.mangling and not harmless else None
        if mangling != "lost":
            server.process.spawn(self._serve(server, method, path, body, answer, mangling), f"serve {order}")
        try:
            async with asyncio.timeout(TIMEOUT_S if timeout_s is None else timeout_s):
                result = await answer
        except (TimeoutError, ConnectionResetError) as error:
            kind = Unavailable if harmless else OutcomeUnknown
            raise kind(f"{self._to} did not answer {order}: {error}") from error
        finally:
            server.waiting.remove(answer)
        here()
        await net.moments.moment(f"{order} answered", self._host)
        return tuple(result) if get_origin(response_model) is tuple else result

    async def _connected(self) -> Server:
        net = self._net
        await net.latency()
        if not net.reaches(self._host, self._to):
            warm = not net.blocks(self._host, self._to) and net.rng.random() < 0.5
            if not warm:  # over a connection that is there already, only the answer is lost
                await asyncio.sleep(CONNECT_S)
                raise Unreachable(f"{self._to} cannot be reached: no connection in time")
        server = net.servers.get(self._to)
        if server is None or not server.process.alive:
            raise Unreachable(f"{self._to} cannot be reached: Connection refused")
        return server

    async def _serve(
        self, server: Server, method: str, path: str, body: Any, answer: asyncio.Future[Any], mangling: str | None
    ) -> None:
        net = self._net
        if mangling == "late":
            await asyncio.sleep(net.rng.uniform(*LATE_S))
        work = await self._outcome(server, method, path, body)
        await net.moments.moment(f"{method} {path} served", self._to)
        await net.latency()
        if mangling != "reply lost" and not net.blocks(self._to, self._host) and not answer.done():
            if isinstance(work, EmpError):
                answer.set_exception(work)
            else:
                answer.set_result(work)
        if mangling == "twice":
            await asyncio.sleep(net.rng.uniform(0.01, LATE_S[1]))
            await self._outcome(server, method, path, body)

    async def _outcome(self, server: Server, method: str, path: str, body: Any) -> Any:
        try:
            return await server.table.call(method, path, body, self._caller)
        except Exception as error:  # noqa: BLE001 - as the server would: the client sees an error of the tree
            return as_client_sees(error)

    async def events(self, path: str, *, quiet_s: float = QUIET_S, **_: Any) -> AsyncGenerator[Event]:
        net = self._net
        await net.moments.moment(f"GET {path}", self._host)
        server = await self._connected()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        server.streams.append(queue)
        task = server.process.spawn(self._stream(server, path, queue), f"stream {path}")
        try:
            while True:
                try:
                    async with asyncio.timeout(quiet_s if not net.reaches(self._host, self._to) else None):
                        item = await queue.get()
                except TimeoutError:
                    raise Unavailable(f"{self._to} fell silent") from None
                here()
                if item is None:
                    return
                if isinstance(item, EmpError):
                    raise item
                yield Event("", "status", item)
        finally:
            task.cancel()
            server.streams.remove(queue)

    async def _stream(self, server: Server, path: str, queue: asyncio.Queue[Any]) -> None:
        net = self._net
        try:
            response = await server.table.call("GET", path, None, self._caller)
            async with contextlib.aclosing(events_of(response)) as events:
                async for data in events:
                    await net.latency()
                    while net.blocks(self._to, self._host):  # noqa: ASYNC110 - the kernel sends again and again
                        await asyncio.sleep(0.2)
                    queue.put_nowait(data)
            queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - as the server would
            queue.put_nowait(as_client_sees(error))

    async def aclose(self) -> None:
        pass
