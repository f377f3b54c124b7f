"""What each failure of the network means to the client, against real servers on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emp.client import Client
from emp.client.context import Context, load_context
from emp.client.transport import ControllerTransport
from emp.model.errors import BadInput, EmpError, Internal, OutcomeUnknown, Unavailable, Unreachable
from emp.wire.secret import Secret
from emp.wire.sockets import listen
from emp.wire.tls import public_server
from tests.unit.test_cli_canned import WEB
from tests.unit.test_cli_pool import Controller, serving
from tests.unit.test_cli_run import POOL

Behaviour = Callable[[socket.socket], None]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    with serving(tmp_path, monkeypatch) as pool:
        yield pool


@pytest.fixture
def client(pool: Controller) -> Iterator[Client]:
    with Client.from_context(POOL) as client:
        yield client


@contextlib.contextmanager
def misbehaving(pool: Controller, behaviour: Behaviour) -> Iterator[ControllerTransport]:
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
        transport = ControllerTransport(context)
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
        with pytest.raises(Unavailable, match="the connection broke"):
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
    monkeypatch.setattr("emp.client.connection.CONNECT_S", 0.2)
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
