"""One app on real TLS listeners: who gets in, who is seen, what errors look like, and how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import httpx2
import pytest
from fastapi import Depends, FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent

from emp.model.base import Model
from emp.model.errors import BadInput, Conflict, EmpError, StaleEpoch
from emp.model.names import Name
from emp.wire import tls
from emp.wire.faults import install_error_handlers
from emp.wire.guard import peer, require_role, require_token
from emp.wire.identity import Identity, Role
from emp.wire.pki import CertificateAuthority
from emp.wire.secret import Secret
from emp.wire.serve import FLUSH_S, Listener, Server
from emp.wire.sockets import adopt, listen

POOL = "meadow"
TOKEN = Secret("a-token-for-people")


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make credentials of this pool, of another pool, of another CA with this pool's name, and expired ones."""
    base = tmp_path_factory.mktemp("certs")
    ca = CertificateAuthority.create(base / "ca", POOL)
    for role, name in ((Role.CONTROLLER, "main"), (Role.AGENT, "n1"), (Role.AGENT, "n2"), (Role.QEMU, "n1")):
        ca.issue(role, name).write(base / f"{role}-{name}")
    ca.issue(Role.AGENT, "n1", life=timedelta(days=1), now=datetime(2025, 1, 1, tzinfo=UTC)).write(base / "expired")
    for directory, pool in (("wrong-ca", POOL), ("other-pool", "desert")):
        other = CertificateAuthority.create(base / f"{directory}-ca", pool)
        other.issue(Role.AGENT, "n1").write(base / directory)
        (base / directory / "ca-cert.pem").write_bytes(ca.ca_pem)
    return base


class Volume(Model):
    name: Name
    size: int


class Order(Model):
    epoch: int
    volumes: tuple[Volume, ...] = ()


class Probe:
    """An app with one route for each thing to see, and what happened in it."""

    def __init__(self) -> None:
        self.app = FastAPI(lifespan=self.lifespan)
        self.release = asyncio.Event()
        self.entered = asyncio.Event()
        self.log: list[str] = []
        install_error_handlers(self.app)
        app = self.app

        @app.get("/who")
        def who(caller: Annotated[Identity | None, Depends(peer)]) -> str | None:
            return str(caller) if caller else None

        @app.get("/controller")
        def controller(caller: Annotated[Identity, Depends(require_role(Role.CONTROLLER))]) -> str:
            return str(caller)

        @app.get("/people", dependencies=[Depends(require_token(TOKEN))])
        def people() -> str:
            return "welcome"

        @app.post("/order")
        def order(order: Order, limit: int = 1) -> Order:
            return order

        @app.get("/stale")
        def stale() -> None:
            raise StaleEpoch("epoch 3 is older than 5", field="epoch", hint="ask again", ours=5)

        @app.get("/boom")
        def boom() -> None:
            raise RuntimeError("inside knowledge")

        @app.get("/slow")
        async def slow() -> str:
            self.entered.set()
            await self.release.wait()
            return "done"

        @app.get("/events", response_class=EventSourceResponse)
        async def events() -> AsyncIterator[ServerSentEvent]:
            try:
                yield ServerSentEvent(data={"n": 1}, id="1", event="tick")
                self.entered.set()
                await asyncio.Event().wait()
            finally:
                self.log.append("stream ended")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.log.append("up")
        yield
        self.log.append("down")


@pytest.fixture
async def probe() -> Probe:
    return Probe()


@pytest.fixture
async def server(certs: Path, probe: Probe) -> AsyncIterator[Server]:
    """Serve the probe as the controller does: port 0 for daemons, port 1 for people."""
    own = certs / "controller-main"
    listeners = [
        Listener(listen("127.0.0.1", 0), tls.mutual_server(own)),
        Listener(listen("127.0.0.1", 0), tls.public_server(own)),
    ]
    before = asyncio.all_tasks()
    async with Server(probe.app, listeners, pool=POOL, drain_s=2) as running:
        yield running
    assert not asyncio.all_tasks() - before - {asyncio.current_task()}, "the server left a task behind"


async def call(
    listener: Listener, path: str, context: ssl.SSLContext, *, host: str = "controller-main", **more: Any
) -> httpx2.Response:
    async with httpx2.AsyncClient(verify=context, trust_env=False) as client:
        url = f"https://127.0.0.1:{listener.port}{path}"
        return await client.request(more.pop("method", "GET"), url, extensions={"sni_hostname": host}, **more)


async def test_the_verified_peer_is_seen_on_the_daemons_port(server: Server, certs: Path) -> None:
    for name in ("agent-n1", "agent-n2", "controller-main"):
        answer = await call(server.listeners[0], "/who", tls.mutual_client(certs / name))
        assert (answer.status_code, answer.json()) == (200, name)


async def test_both_ports_serve_at_once_and_people_need_no_certificate(server: Server, certs: Path) -> None:
    people = tls.public_client(certs / "ca" / "ca-cert.pem")
    answers = await asyncio.gather(
        call(server.listeners[0], "/who", tls.mutual_client(certs / "agent-n1")),
        call(server.listeners[1], "/who", people),
        call(server.listeners[1], "/who", tls.mutual_client(certs / "agent-n2")),
    )
    assert [answer.json() for answer in answers] == ["agent-n1", None, "agent-n2"]


@pytest.mark.parametrize("port", [0, 1])
@pytest.mark.parametrize(
    ("who", "alert"), [("wrong-ca", "UNKNOWN_CA"), ("other-pool", "UNKNOWN_CA"), ("expired", "CERTIFICATE_EXPIRED")]
)
async def test_a_bad_certificate_is_refused_in_the_handshake_on_both_ports(
    server: Server, certs: Path, port: int, who: str, alert: str
) -> None:
    with pytest.raises((httpx2.TransportError, ssl.SSLError)) as caught:
        await call(server.listeners[port], "/who", tls.mutual_client(certs / who))
    assert alert in str(caught.value)


async def test_without_certificate_nobody_enters_the_daemons_port(server: Server, certs: Path) -> None:
    with pytest.raises((httpx2.TransportError, ssl.SSLError), match="CERTIFICATE_REQUIRED"):
        await call(server.listeners[0], "/who", tls.public_client(certs / "ca" / "ca-cert.pem"))


async def test_the_client_refuses_another_daemon_and_another_pool(server: Server, certs: Path) -> None:
    own = tls.mutual_client(certs / "agent-n1")
    with pytest.raises(httpx2.ConnectError, match="not valid for 'controller-other'"):
        await call(server.listeners[0], "/who", own, host="controller-other")
    stranger = tls.public_client(certs / "other-pool-ca" / "ca-cert.pem")
    with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        await call(server.listeners[1], "/who", stranger)


async def test_tls_1_2_is_refused(server: Server, certs: Path) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(certs / "ca" / "ca-cert.pem")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx2.ConnectError, match="VERSION"):
        await call(server.listeners[1], "/who", old)


async def test_a_certificate_of_our_ca_that_names_another_pool_is_nobody(certs: Path, probe: Probe) -> None:
    listener = Listener(listen("127.0.0.1", 0), tls.mutual_server(certs / "controller-main"))
    async with Server(probe.app, [listener], pool="elsewhere"):
        answer = await call(listener, "/who", tls.mutual_client(certs / "agent-n1"))
    assert answer.status_code == 401
    assert "not one of the pool elsewhere" in answer.json()["message"]


async def test_a_role_is_asked_for(server: Server, certs: Path) -> None:
    daemons, people = server.listeners
    nobody = tls.public_client(certs / "ca" / "ca-cert.pem")
    assert (await call(daemons, "/controller", tls.mutual_client(certs / "controller-main"))).status_code == 200
    for name in ("agent-n1", "qemu-n1"):
        refused = await call(daemons, "/controller", tls.mutual_client(certs / name))
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert name in refused.json()["message"]
    unknown = await call(people, "/controller", nobody, headers={"emp.peer": "controller-main"})
    assert (unknown.status_code, unknown.json()["code"]) == (401, "unauthenticated")


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {TOKEN.reveal()}", 200),
        (f"bearer {TOKEN.reveal()}", 200),
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer", 401),
        (f"Bearer {TOKEN.reveal()}x", 401),
        (f"Basic {TOKEN.reveal()}", 401),
    ],
)
async def test_people_show_the_token(server: Server, certs: Path, header: str | None, status: int) -> None:
    headers = {"Authorization": header} if header else {}
    context = tls.public_client(certs / "ca" / "ca-cert.pem")
    answer = await call(server.listeners[1], "/people", context, headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert TOKEN.reveal() not in answer.text


async def post(server: Server, certs: Path, **more: Any) -> httpx2.Response:
    more = {"method": "POST"} | more
    return await call(server.listeners[0], more.pop("path", "/order"), tls.mutual_client(certs / "agent-n1"), **more)


@pytest.mark.parametrize(
    ("body", "field", "reason"),
    [
        ({"volumes": []}, "epoch", "Field required"),
        ({"epoch": "x"}, "epoch", "valid integer"),
        ({"epoch": 1, "epcoh": 2}, "epcoh", "not permitted"),
        ({"epoch": 1, "volumes": [{"name": "a", "size": 1}, {"name": "../x", "size": 1}]}, "volumes[1].name", "../x"),
    ],
)
async def test_bad_input_names_the_field_and_the_reason(
    server: Server, certs: Path, body: Any, field: str, reason: str
) -> None:
    answer = await post(server, certs, json=body)
    told = answer.json()
    assert (answer.status_code, told["code"], told["field"]) == (422, "bad_input", field)
    assert reason in told["message"] and not told["message"].startswith("Value error")
    assert told["details"]["problems"][0]["field"] == field


async def test_every_problem_is_listed_and_a_hint_says_what_to_do(server: Server, certs: Path) -> None:
    told = (await post(server, certs, json={"epcoh": 1}, params={"limit": "many"})).json()
    assert {problem["field"]: problem["hint"] for problem in told["details"]["problems"]} == {
        "limit": None,
        "epoch": "add it",
        "epcoh": "remove it, or check its spelling",
    }


async def test_broken_json_unknown_paths_and_methods_have_the_same_shape(server: Server, certs: Path) -> None:
    broken = await post(server, certs, content=b'{"epoch": ', headers={"Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["code"]) == (422, "bad_input")
    assert "not JSON" in broken.json()["message"]
    lost = await post(server, certs, path="/nowhere")
    assert (lost.status_code, lost.json()["code"]) == (404, "not_found")
    wrong = await post(server, certs, path="/who")
    assert (wrong.status_code, wrong.json()["code"], wrong.headers["Allow"]) == (405, "bad_input", "GET")


async def test_a_typed_error_travels_whole(server: Server, certs: Path) -> None:
    answer = await post(server, certs, path="/stale", method="GET")
    assert answer.status_code == 409
    assert answer.json() == StaleEpoch("epoch 3 is older than 5", field="epoch", hint="ask again", ours=5).as_dict()


async def test_an_unforeseen_error_is_logged_once_and_shows_nothing(
    server: Server, certs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await post(server, certs, path="/boom", method="GET")
    told = answer.json()
    assert (answer.status_code, told["code"]) == (500, "internal")
    assert "inside knowledge" not in answer.text
    records = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(records) == 1 and told["details"]["reference"] in records[0].getMessage()
    assert "inside knowledge" in str(records[0].exc_info)


async def test_a_body_beyond_the_bound_is_refused_with_and_without_a_length(server: Server, certs: Path) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * (1 << 20)

    for content in (b"x" * (5 << 20), chunks()):
        answer = await post(server, certs, content=content)
        assert (answer.status_code, answer.json()["code"]) == (413, "bad_input")
        assert "larger than 4 MiB" in answer.json()["message"]


async def test_stopping_ends_streams_at_once_and_cleanly(server: Server, certs: Path, probe: Probe) -> None:
    async with httpx2.AsyncClient(verify=tls.mutual_client(certs / "agent-n1"), trust_env=False) as client:
        url = f"https://127.0.0.1:{server.listeners[0].port}/events"
        async with client.stream("GET", url, extensions={"sni_hostname": "controller-main"}) as response:
            seen = [event.id async for event in stop_after_first(response, server, probe)]
    assert seen == ["1"]
    assert probe.log == ["up", "stream ended", "down"]


async def stop_after_first(response: httpx2.Response, server: Server, probe: Probe) -> AsyncIterator[Any]:
    started = asyncio.get_running_loop().time()
    async for event in httpx2.EventSource(response):
        yield event
        await probe.entered.wait()
        await server.stop()
    assert asyncio.get_running_loop().time() - started < server.drain_s, (
        "the stream held the stop until the drain ended"
    )


async def test_a_request_in_progress_is_answered_before_the_stop(server: Server, certs: Path, probe: Probe) -> None:
    port = server.listeners[0].port
    pending = asyncio.create_task(post(server, certs, path="/slow", method="GET"))
    await probe.entered.wait()
    stopping = asyncio.create_task(server.stop())
    await server.closing.wait()
    probe.release.set()
    assert (await pending).json() == "done"
    await stopping
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_a_request_that_outlasts_the_drain_is_told_so(certs: Path, probe: Probe) -> None:
    listener = Listener(listen("127.0.0.1", 0), tls.mutual_server(certs / "controller-main"))
    server = Server(probe.app, [listener], pool=POOL, drain_s=0.05)
    await server.start()
    pending = asyncio.create_task(call(listener, "/slow", tls.mutual_client(certs / "agent-n1")))
    await probe.entered.wait()
    await server.stop()
    answer = await pending
    assert (answer.status_code, answer.json()["code"]) == (504, "outcome_unknown")


async def test_an_idle_client_does_not_hold_the_stop(server: Server, certs: Path) -> None:
    async with httpx2.AsyncClient(verify=tls.mutual_client(certs / "agent-n1"), trust_env=False) as client:
        url = f"https://127.0.0.1:{server.listeners[0].port}/who"
        await client.get(url, extensions={"sni_hostname": "controller-main"})
        started = asyncio.get_running_loop().time()
        await server.stop()
        assert asyncio.get_running_loop().time() - started < FLUSH_S


async def test_the_daemon_keeps_its_signals(server: Server) -> None:
    seen = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, seen.set)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(seen.wait(), 5)
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
    assert not server.closing.is_set()


async def test_a_lifespan_that_fails_fails_the_start(certs: Path) -> None:
    @contextlib.asynccontextmanager
    async def broken(app: FastAPI) -> AsyncIterator[None]:
        raise Conflict("somebody else holds the journal")
        yield

    listener = Listener(listen("127.0.0.1", 0), tls.mutual_server(certs / "controller-main"))
    with pytest.raises(EmpError, match="journal"):
        async with Server(FastAPI(lifespan=broken), [listener], pool=POOL):
            pass
    listener.sock.close()


def test_plain_http_is_for_unix_sockets_only(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as open_port, pytest.raises(BadInput, match="needs TLS"):
        Listener(open_port, None)


async def test_a_unix_socket_serves_without_tls(probe: Probe, tmp_path: Path) -> None:
    local = socket.socket(socket.AF_UNIX)
    local.bind(str(tmp_path / "s"))
    local.listen()
    async with Server(probe.app, [Listener(local, None)], pool=POOL):
        transport = httpx2.AsyncHTTPTransport(uds=str(tmp_path / "s"))
        async with httpx2.AsyncClient(transport=transport) as client:
            assert (await client.get("http://local/who")).json() is None


async def test_a_handed_over_listening_socket_is_served(certs: Path, probe: Probe) -> None:
    listener = Listener(adopt(listen("127.0.0.1", 0).detach()), tls.public_server(certs / "controller-main"))
    async with Server(probe.app, [listener], pool=POOL):
        answer = await call(listener, "/who", tls.public_client(certs / "ca" / "ca-cert.pem"))
        assert answer.status_code == 200


def test_a_connection_whose_peer_is_off_ends_by_itself() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle_s, again_s, times = (
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
    assert idle_s + again_s * times < 30


def test_what_is_no_listening_socket_is_not_adopted(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(BadInput, match="is not a socket"):
        adopt(file.fileno())
    with socket.socket() as idle, pytest.raises(BadInput, match="is not listening"):
        adopt(idle.fileno())
    with pytest.raises(BadInput, match="Bad file descriptor"):
        adopt(999)


def test_a_port_that_cannot_be_had_says_why() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(Conflict, match="already taken") as caught:
        listen("127.0.0.1", taken.getsockname()[1], field="api_port")
    assert caught.value.field == "api_port" and caught.value.hint
    with pytest.raises(BadInput, match=r"192\.0\.2\.1"):
        listen("192.0.2.1", 0)
    with pytest.raises(BadInput, match="not a port"):
        listen("127.0.0.1", 70000)
