"""What the client's calls return, and what each failure of the network means, against real servers on loopback."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import Request, Response

from emp.client import Client
from emp.client.context import Context, load_context
from emp.client.events import Event, parse
from emp.client.transport import Transport
from emp.model.api import EvmCreate, WatchEvent
from emp.model.errors import BadInput, EmpError, Internal, NotFound, OutcomeUnknown, Unavailable, Unreachable
from emp.wire.secret import Secret
from emp.wire.sockets import listen
from emp.wire.tls import public_server
from tests.unit.test_cli_pool import COMPLETED, COPYING, ID, N1, POOL, VOL, WEB, Controller, serving

Behaviour = Callable[[socket.socket], None]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    with serving(tmp_path, monkeypatch) as pool:
        yield pool


@pytest.fixture
def client(pool: Controller) -> Iterator[Client]:
    with Client.from_context(POOL) as client:
        yield client


# ------------------------------------------------------------------ nouns


def test_each_noun_returns_its_model(client: Client) -> None:
    assert client.nodes.get("n1") == N1
    assert (client.nodes.list().items, client.nodes.list().revision) == ((N1,), 41)
    assert client.evms.get("web") == WEB and client.evms.list().items == (WEB,)
    assert client.volumes.get("vol-1") == VOL and client.volumes.list().items == (VOL,)
    assert client.migrations.get(ID) == COMPLETED and client.migrations.list(evm="web").items == (COMPLETED,)
    assert client.nodes.cordon("n1").cordoned and not client.nodes.uncordon("n1").cordoned


def test_a_model_or_its_fields_are_sent(client: Client, pool: Controller) -> None:
    client.evms.create(EvmCreate(name="web", memory_bytes=1 << 30))
    client.evms.create({"name": "web", "memory_bytes": "1GiB"})
    sent = [body for request, body in pool.told if request == "POST /v1/evms"]
    assert sent[0]["memory_bytes"] == 1 << 30 and sent[1] == {"name": "web", "memory_bytes": "1GiB"}
    with pytest.raises(BadInput):
        client.evms.create({"name": object()})


def test_a_migration_is_followed_to_its_end(client: Client, pool: Controller) -> None:
    pool.push(COPYING, COMPLETED)
    assert client.migrations.start("web").id == ID
    assert list(client.migrations.events(ID)) == [COPYING, COMPLETED]


def test_requests_go_over_one_connection(client: Client, pool: Controller) -> None:
    peers = set()

    @pool.app.middleware("http")
    async def note(request, call_next):  # type: ignore[no-untyped-def]
        peers.add(request.client)
        return await call_next(request)

    for _ in range(3):
        client.evms.list()
    with pytest.raises(NotFound):
        client.evms.get("nope")
    client.evms.type("web", b"x")
    assert len(peers) == 1


def test_a_connection_that_the_controller_has_closed_is_not_used_again(client: Client, pool: Controller) -> None:
    client.evms.list()
    pool.stop()
    pool.start()
    client.evms.create({"name": "web"})  # over the old one it would be unknown whether it happened


def test_console_input_is_cut_into_what_the_controller_takes(client: Client, pool: Controller) -> None:
    data = bytes(range(256)) * 400
    client.evms.type("web", data)
    assert pool.typed == data
    assert len([request for request, _ in pool.told if request == "POST /v1/evms/web/console"]) == 4


# ------------------------------------------------------------------ watch


def test_watch_yields_changes_and_goes_on_after_a_restart(client: Client, pool: Controller) -> None:
    resumed: list[tuple[str | None, str]] = []
    change = WatchEvent(kind="put", key="/evms/web", revision=7, last=True, value={"a": 1})

    @pool.app.get("/v1/watch")
    def watch(request: Request) -> Response:
        resumed.append((request.headers.get("last-event-id"), request.url.query))
        first = f"id: 7\ndata: {change.model_dump_json()}\n\n"
        gone = f"event: error\ndata: {json.dumps(NotFound('that history is gone').as_dict())}\n\n"
        return Response(first if len(resumed) == 1 else gone, media_type="text/event-stream")

    breaks: list[EmpError | None] = []
    changes = client.watch("/evms/", since=5, on_break=breaks.append)
    assert next(changes) == change
    with pytest.raises(NotFound, match="history is gone"):
        next(changes)
    assert resumed == [(None, "prefix=%2Fevms%2F&from=5"), ("7", "prefix=%2Fevms%2F&from=5")]
    assert isinstance(breaks[0], Unavailable) and breaks[1] is None


def test_watch_gives_up_after_its_patience(client: Client, pool: Controller) -> None:
    pool.stop()
    with pytest.raises(Unreachable):
        next(client.watch("/evms/", patience_s=0))
    pool.start()


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_found_wherever_the_stream_is_cut(size: int) -> None:
    text = ": hello\n\nid: 4\nevent: migration\ndata: one\ndata:two\n\n\ndata: é\r\n\r\nid: 9\n\ndata: cut off\n"
    data = text.encode()
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    assert list(parse(pieces)) == [Event("4", "migration", "one\ntwo"), Event("", "message", "é")]


# ------------------------------------------------------------------ failures


@contextlib.contextmanager
def misbehaving(pool: Controller, behaviour: Behaviour) -> Iterator[Transport]:
    """Yield a transport to a server that reads a request's head, behaves, and hangs up."""
    pool.stop()
    context = load_context(POOL)
    with listen("127.0.0.1", pool.port) as sock:

        def serve() -> None:
            sock.settimeout(10)
            with contextlib.suppress(OSError):
                plain = sock.accept()[0]
                with public_server(pool.credentials).wrap_socket(plain, server_side=True) as connection:
                    connection.recv(65536)
                    behaviour(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        transport = Transport(context)
        try:
            yield transport
        finally:
            transport.close()
            sock.close()
            thread.join(10)
    pool.start()


def hang_up(connection: socket.socket) -> None:
    return


def half_an_answer(connection: socket.socket) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"na')


def rubbish(connection: socket.socket) -> None:
    connection.sendall(b"220 smtp.example ESMTP\r\n")


def silence(connection: socket.socket) -> None:
    connection.recv(1)


@pytest.mark.parametrize("behaviour", [hang_up, half_an_answer, rubbish, silence])
@pytest.mark.parametrize(
    ("method", "kind"), [("GET", Unavailable), ("POST", OutcomeUnknown), ("DELETE", OutcomeUnknown)]
)
def test_an_order_without_an_answer_is_unknown_and_a_question_only_unanswered(
    pool: Controller, behaviour: Behaviour, method: str, kind: type[EmpError]
) -> None:
    with misbehaving(pool, behaviour) as transport, pytest.raises(EmpError) as caught:
        transport.send(method, "/x", b"{}", timeout_s=0.5).answer()
    assert type(caught.value) is kind
    assert f"did not answer {method} /x" in caught.value.message


def test_a_stream_that_breaks_is_unavailable(pool: Controller) -> None:
    def begin(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")

    with misbehaving(pool, begin) as transport:
        pieces = transport.send("GET", "/x").stream()
        assert next(pieces) == b"abc"
        with pytest.raises(Unavailable):
            next(pieces)


@pytest.mark.parametrize(
    ("status", "kind"), [(404, "NotFound"), (418, "BadInput"), (502, "Internal"), (503, "Unavailable")]
)
def test_an_answer_that_is_not_the_controllers_is_typed_by_its_status(pool: Controller, status: int, kind: str) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 %d Words\r\nContent-Length: 6\r\n\r\n<html>" % status)

    with misbehaving(pool, answer) as transport, pytest.raises(EmpError) as caught:
        transport.send("GET", "/x").answer()
    assert type(caught.value).__name__ == kind
    assert f"with {status} Words" in caught.value.message and "html" not in caught.value.message


def test_nobody_listening_means_never_sent(pool: Controller, client: Client) -> None:
    pool.stop()
    with pytest.raises(Unreachable, match="Connection refused"):
        client.evms.create({"name": "web"})
    pool.start()


def test_no_handshake_in_time_means_never_sent(pool: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emp.client.transport.CONNECT_S", 0.2)
    with listen("127.0.0.1", 0) as sock:  # accepts in the kernel, then says nothing
        context = Context("x", f"https://127.0.0.1:{sock.getsockname()[1]}", "c", pool.ca.ca_pem.decode(), Secret("t"))
        with Client(context) as client, pytest.raises(Unreachable, match="no connection in time"):
            client.evms.list()


def test_an_answer_of_another_shape_says_so(client: Client, pool: Controller) -> None:
    pool.nodes["n1"] = WEB  # type: ignore[assignment]
    with pytest.raises(Internal, match="this version cannot read") as question:
        client.nodes.get("n1")
    assert question.value.hint and "version" in question.value.hint
    with pytest.raises(OutcomeUnknown):
        client.nodes.cordon("n1")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:7443", "https://", "ftp://x"])
def test_a_url_that_is_not_https_is_refused(url: str) -> None:
    with pytest.raises(BadInput) as caught:
        Client(Context("x", url, "c", "", Secret("t")))
    assert caught.value.field == "url"


def test_a_damaged_ca_is_refused() -> None:
    with pytest.raises(BadInput) as caught:
        Client(Context("x", "https://127.0.0.1:1", "c", "PEM", Secret("t")))
    assert caught.value.field == "ca_pem"


def test_a_token_is_not_shown(client: Client) -> None:
    assert "sesame" not in repr(vars(client)) + repr(client.context)
