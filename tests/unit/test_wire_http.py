"""What a failed call means, for the asynchronous and the synchronous client alike, against real servers on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Header, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from emp.model.base import Model
from emp.model.errors import (
    BadInput,
    EmpError,
    Forbidden,
    Internal,
    NotFound,
    OutcomeUnknown,
    StaleEpoch,
    Unavailable,
    Unreachable,
)
from emp.wire import tls
from emp.wire.exchange import Event
from emp.wire.faults import install_error_handlers
from emp.wire.guard import PEER
from emp.wire.http import WireClient
from emp.wire.identity import Identity, Role
from emp.wire.pki import CertificateAuthority
from emp.wire.secret import Secret
from emp.wire.serve import Listener, Server
from emp.wire.sockets import listen

POOL = "meadow"
N1, MAIN = Identity(Role.AGENT, "n1"), Identity(Role.CONTROLLER, "main")

Handler = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Order(Model):
    epoch: int


class Asker:
    """Clients of a test, closed with it."""

    def __init__(self, certs: Path) -> None:
        self.certs = certs
        self.stack = contextlib.AsyncExitStack()

    async def client(self, port: int, **more: Any) -> WireClient:
        defaults: dict[str, Any] = {"tls": tls.mutual_client(self.certs / str(MAIN)), "server": N1}
        more = defaults | more
        url = more.pop("url", f"https://127.0.0.1:{port}")
        return await self.stack.enter_async_context(WireClient(url, **more))

    async def ask(self, client: WireClient, *args: Any, **more: Any) -> Any:
        return await client.request(*args, **more)

    async def error(self, port: int, method: str = "POST", path: str = "/x", **more: Any) -> EmpError:
        """Return the error of one call; ``call`` holds the arguments of the request, the rest is the client's."""
        call = more.pop("call", {})
        with pytest.raises(EmpError) as caught:
            await self.ask(await self.client(port, **more), method, path, **call)
        return caught.value

    async def events(self, client: WireClient, *args: Any, **more: Any) -> AsyncGenerator[Event]:
        async with contextlib.aclosing(client.events(*args, **more)) as events:
            async for event in events:
                yield event


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("certs")
    ca = CertificateAuthority.create(base / "ca", POOL)
    for identity in (N1, MAIN):
        ca.issue(identity.role, identity.name).write(base / str(identity))
    CertificateAuthority.create(base / "ca2", POOL).issue(Role.CONTROLLER, "main").write(base / "stranger")
    (base / "stranger" / "ca-cert.pem").write_bytes(ca.ca_pem)
    return base


@pytest.fixture
async def asker(certs: Path) -> AsyncIterator[Asker]:
    asker = Asker(certs)
    async with asker.stack:
        yield asker


@contextlib.asynccontextmanager
async def raw_server(certs: Path, handler: Handler) -> AsyncIterator[int]:
    """Serve n1's certificate with a handler that misbehaves after it has read a request's head."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            await handler(head, reader, writer)
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls.mutual_server(certs / str(N1)))
    async with server:
        yield server.sockets[0].getsockname()[1]


async def silence(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()  # until the client gives up


async def hang_up(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def half_an_answer(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"epo')
    await writer.drain()
    writer.close()


async def rubbish(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 smtp.example ESMTP\r\n")
    await writer.drain()
    writer.close()


BREAKS = [hang_up, half_an_answer, rubbish]


async def test_nobody_listening_means_never_sent(asker: Asker) -> None:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    error = await asker.error(port)
    assert type(error) is Unreachable
    assert "agent-n1 at 127.0.0.1" in error.message and "Connection refused" in error.message


async def test_no_handshake_in_time_means_never_sent(asker: Asker) -> None:
    with listen("127.0.0.1", 0) as sock:  # accepts in the kernel, then says nothing
        error = await asker.error(sock.getsockname()[1], connect_s=0.1)
    assert type(error) is Unreachable and "no connection in time" in error.message


async def test_an_unknown_host_means_never_sent(asker: Asker) -> None:
    assert type(await asker.error(0, url="https://nowhere.invalid:7443")) is Unreachable


async def test_another_daemon_at_the_address_means_never_sent(asker: Asker, certs: Path) -> None:
    asked: list[str] = []

    async def handler(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append("asked")

    async with raw_server(certs, handler) as port:
        error = await asker.error(port, server=Identity(Role.AGENT, "n2"))
    assert type(error) is Unreachable and not asked
    assert "agent-n2" in error.message and error.hint and "another daemon" in error.hint


async def test_a_refused_certificate_means_never_read(asker: Asker, certs: Path) -> None:
    for context, word in (
        (tls.mutual_client(certs / "stranger"), "unknown ca"),
        (tls.public_client(certs / "ca" / "ca-cert.pem"), "certificate required"),
    ):
        async with raw_server(certs, silence) as port:
            error = await asker.error(port, tls=context)
        assert type(error) is Unreachable
        assert "refuses our certificate" in error.message and word in error.message


@pytest.mark.parametrize(
    ("method", "idempotent", "kind"),
    [
        ("POST", None, OutcomeUnknown),
        ("DELETE", None, OutcomeUnknown),
        ("PUT", True, Unavailable),
        ("GET", None, Unavailable),
        ("GET", False, OutcomeUnknown),
    ],
)
async def test_a_sent_order_without_answer_is_unknown_and_a_question_only_unanswered(
    asker: Asker, certs: Path, method: str, idempotent: bool | None, kind: type[EmpError]
) -> None:
    async with raw_server(certs, silence) as port:
        error = await asker.error(port, method, call={"timeout_s": 0.2, "idempotent": idempotent})
    assert type(error) is kind
    assert f"{method} /x" in error.message and "no answer within 0.2 s" in error.message
    assert (error.hint is not None) == (kind is OutcomeUnknown)


@pytest.mark.parametrize("handler", BREAKS)
async def test_a_connection_that_breaks_after_the_order_leaves_it_unknown(
    asker: Asker, certs: Path, handler: Handler
) -> None:
    async with raw_server(certs, handler) as port:
        assert type(await asker.error(port, "POST", call={"body": Order(epoch=1)})) is OutcomeUnknown
        assert type(await asker.error(port, "GET")) is Unavailable


async def test_the_whole_call_is_bounded_even_when_bytes_trickle(certs: Path) -> None:
    async def trickle(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with raw_server(certs, trickle) as port:
        error = await Asker(certs).error(port, call={"timeout_s": 0.2})
    assert type(error) is OutcomeUnknown


class Peer:
    """A well-behaved server and what it was told."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.resumed: list[str | None] = []
        self.authorization: list[str | None] = []
        self.refusals = 0
        install_error_handlers(self.app)
        app = self.app

        @app.post("/order")
        def order(order: Order, authorization: str | None = Header(None)) -> Order:
            self.authorization.append(authorization)
            return Order(epoch=order.epoch + 1)

        @app.get("/list")
        def listing(epoch: int) -> list[Order]:
            return [Order(epoch=epoch), Order(epoch=epoch + 1)]

        @app.post("/nothing", status_code=204)
        def nothing() -> None: ...

        @app.post("/stale")
        def stale() -> None:
            raise StaleEpoch("epoch 3 is older than 5", field="epoch", ours=5)

        @app.post("/teapot", status_code=418)
        def teapot() -> str:
            return "short and stout"

        @app.post("/gateway")
        def gateway() -> Response:
            return Response("<html>403</html>", status_code=403, media_type="text/html")

        @app.get("/events", response_class=EventSourceResponse)
        async def events(
            last_event_id: str | None = Header(None),
        ) -> AsyncIterator[ServerSentEvent]:
            self.resumed.append(last_event_id)
            first = int(last_event_id or 0) + 1
            for number in range(first, first + 2):
                yield ServerSentEvent(data={"n": number}, id=str(number), event="progress")

        @app.get("/over", status_code=204)
        def over() -> None: ...


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
async def port(peer: Peer, certs: Path) -> AsyncIterator[int]:
    listener = Listener(listen("127.0.0.1", 0), tls.mutual_server(certs / str(N1)))
    async with Server(peer.app, [listener], pool=POOL):
        yield listener.port


async def test_models_travel_both_ways_on_one_connection(asker: Asker, port: int, peer: Peer) -> None:
    connections: set[Any] = set()

    @peer.app.middleware("http")
    async def count(request: Any, call_next: Any) -> Any:
        connections.add(request.client)
        assert request.scope[PEER] == MAIN
        return await call_next(request)

    client = await asker.client(port)
    assert await asker.ask(client, "POST", "/order", Order(epoch=4), response_model=Order) == Order(epoch=5)
    assert await asker.ask(client, "POST", "/order", {"epoch": 4}) == {"epoch": 5}
    listed = await asker.ask(client, "GET", "/list", query={"epoch": 7}, response_model=list[Order])
    assert listed == [Order(epoch=7), Order(epoch=8)]
    assert await asker.ask(client, "POST", "/nothing") is None
    assert len(connections) == 1


async def test_a_token_is_sent_and_not_shown(asker: Asker, port: int, peer: Peer) -> None:
    client = await asker.client(port, token=Secret("sesame"))
    await asker.ask(client, "POST", "/order", {"epoch": 1})
    assert peer.authorization == ["Bearer sesame"]
    assert "sesame" not in repr(vars(client))


async def test_error_bodies_become_the_typed_error(asker: Asker, port: int) -> None:
    stale = await asker.error(port, path="/stale")
    assert type(stale) is StaleEpoch and (stale.field, stale.details) == ("epoch", {"ours": 5})
    wrong = await asker.error(port, path="/order", call={"body": {"epoch": "x"}})
    assert type(wrong) is BadInput and wrong.field == "epoch"
    assert type(await asker.error(port, path="/nowhere")) is NotFound


async def test_an_error_that_is_not_ours_is_typed_by_its_status(asker: Asker, port: int) -> None:
    gateway = await asker.error(port, path="/gateway")
    assert type(gateway) is Forbidden and "403" in gateway.message and "html" not in gateway.message
    assert type(await asker.error(port, path="/teapot")) is BadInput


async def test_an_answer_that_does_not_fit_says_so(asker: Asker, port: int) -> None:
    order = await asker.error(port, path="/order", call={"body": {"epoch": 1}, "response_model": list[int]})
    assert type(order) is OutcomeUnknown and order.hint and "version" in order.hint
    question = await asker.error(port, "GET", "/list", call={"query": {"epoch": 1}, "response_model": Order})
    assert type(question) is Internal


async def test_a_restarted_server_is_reached_again_through_the_same_client(
    asker: Asker, certs: Path, peer: Peer
) -> None:
    sock = listen("127.0.0.1", 0)
    client = await asker.client(port := sock.getsockname()[1])
    for _ in range(2):
        async with Server(peer.app, [Listener(sock, tls.mutual_server(certs / str(N1)))], pool=POOL):
            assert await asker.ask(client, "POST", "/order", {"epoch": 4}) == {"epoch": 5}
        sock = listen("127.0.0.1", port)
    sock.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:7443", "https://", "ftp://x"])
async def test_a_url_that_is_not_https_is_refused(asker: Asker, url: str) -> None:
    with pytest.raises(BadInput) as caught:
        await asker.client(0, url=url)
    assert caught.value.field == "url"


async def test_events_are_read_to_the_end_of_the_stream(asker: Asker, port: int) -> None:
    client = await asker.client(port)
    seen = [event async for event in asker.events(client, "/events")]
    assert seen == [Event("1", "progress", '{"n": 1}'), Event("2", "progress", '{"n": 2}')]


class Cutter:
    """Sends two events behind the last one seen, then cuts the connection in the middle of the stream."""

    def __init__(self) -> None:
        self.resumed: list[int] = []

    async def __call__(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found = re.search(rb"last-event-id: (\d+)", head, re.IGNORECASE)
        last = int(found[1]) if found else 0
        self.resumed.append(last)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 1000\r\n\r\n")
        for number in (last + 1, last + 2):
            writer.write(b"id: %d\ndata: x\n\n" % number)
        await writer.drain()
        writer.close()


async def test_a_broken_stream_raises_without_reconnection(asker: Asker, certs: Path) -> None:
    seen: list[str] = []
    async with raw_server(certs, Cutter()) as port:
        with pytest.raises(Unavailable):
            async for event in asker.events(await asker.client(port), "/events"):
                seen.append(event.id)
    assert seen == ["1", "2"]


async def test_a_stream_that_is_cut_is_resumed_behind_the_last_event(asker: Asker, certs: Path) -> None:
    cutter = Cutter()
    async with raw_server(certs, cutter) as port:
        events = asker.events(await asker.client(port), "/events", last_event_id="4", reconnect_s=5)
        seen = await first_five(events)
    assert seen == ["5", "6", "7", "8", "9"]
    assert cutter.resumed == [4, 6, 8]


async def test_a_stream_that_ends_is_resumed_if_so_asked(asker: Asker, port: int, peer: Peer) -> None:
    events = asker.events(await asker.client(port), "/events", reconnect_s=5)
    assert await first_five(events) == ["1", "2", "3", "4", "5"]
    assert peer.resumed == [None, "2", "4"]


async def test_a_stream_waits_for_a_server_that_is_not_ready_yet(asker: Asker, port: int, peer: Peer) -> None:
    @peer.app.middleware("http")
    async def starting(request: Any, call_next: Any) -> Any:
        peer.refusals -= 1
        return await call_next(request) if peer.refusals < 0 else Response("starting", status_code=503)

    peer.refusals = 2
    events = asker.events(await asker.client(port), "/events", reconnect_s=5)
    assert await first_five(events) == ["1", "2", "3", "4", "5"]
    peer.refusals = 1
    with pytest.raises(Unavailable):
        await anext(asker.events(await asker.client(port), "/events"))


async def first_five(events: AsyncGenerator[Event]) -> list[str]:
    seen: list[str] = []
    async with contextlib.aclosing(events):
        async for event in events:
            seen.append(event.id)
            if len(seen) == 5:
                break
    return seen


async def test_a_stream_gives_up_after_its_patience(asker: Asker) -> None:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    started = asyncio.get_running_loop().time()
    with pytest.raises(Unreachable):
        async for _ in asker.events(await asker.client(port), "/events", reconnect_s=0.3):
            pass
    assert asyncio.get_running_loop().time() - started >= 0.3


async def test_a_stream_that_the_server_refuses_or_ends_is_not_retried(asker: Asker, port: int) -> None:
    with pytest.raises(NotFound):
        async for _ in asker.events(await asker.client(port), "/nowhere", reconnect_s=60):
            pass
    assert [event async for event in asker.events(await asker.client(port), "/over", reconnect_s=60)] == []


async def test_what_is_no_event_stream_is_an_error(asker: Asker, port: int) -> None:
    with pytest.raises(EmpError, match="text/event-stream"):
        async for _ in asker.events(await asker.client(port), "/list", query={"epoch": 1}):
            pass


def test_the_cli_pays_for_no_server_and_no_cryptography() -> None:
    code = "import sys, emp.wire.http; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "httpx2" in loaded
    assert not {"fastapi", "starlette", "uvicorn", "cryptography"} & set(loaded)


def sources() -> Iterator[str]:
    """Yield the modules of the wire."""
    import emp.wire

    for path in Path(emp.wire.__path__[0]).glob("*.py"):
        yield path.read_text()


BELOW = ("from emp.model.", "from emp import faults", "from emp.wire")
"""what the wire may import: the pool's nouns, and the points at which tests let something go wrong"""


def test_the_wire_stands_on_the_model_alone() -> None:
    lines = {
        line.strip() for text in sources() for line in text.splitlines() if line.startswith(("from emp", "import emp"))
    }
    assert lines and all(line.startswith(BELOW) for line in lines)


async def test_a_context_of_another_ca_trusts_nobody_here(asker: Asker, certs: Path, port: int) -> None:
    context: ssl.SSLContext = tls.public_client(certs / "ca2" / "ca-cert.pem")
    error = await asker.error(port, tls=context)
    assert type(error) is Unreachable and "certificate" in error.message.lower()


async def test_a_request_cancelled_in_the_handshake_leaves_no_socket(certs: Path) -> None:
    accepted: asyncio.Queue[asyncio.StreamReader] = asyncio.Queue()

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait(reader)
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    async with await asyncio.start_server(mute, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        context = tls.mutual_client(certs / str(MAIN))
        async with WireClient(f"https://127.0.0.1:{port}", tls=context, server=N1) as client:
            asked = asyncio.create_task(client.request("GET", "/x"))
            reader = await accepted.get()
            await reader.readexactly(1)  # the handshake has begun, and will not be answered
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            async with asyncio.timeout(5):
                await reader.read()  # our side hangs up
        gone.set()
