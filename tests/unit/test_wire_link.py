"""The switchover's link: who may open one, what travels, how soon a dead peer is noticed. ``-s`` shows round trips."""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
import statistics
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emp.model.errors import BadInput, Conflict, EmpError, Forbidden, StaleEpoch, Unavailable, Unreachable
from emp.wire import tls
from emp.wire.duplex import HEARTBEAT_S, MAX_PENDING
from emp.wire.frames import MAX_PAYLOAD_BYTES, Decoder, Kind, encode
from emp.wire.identity import Identity, Role
from emp.wire.link import Link, LinkServer, connect_link
from emp.wire.pki import CertificateAuthority
from emp.wire.sockets import listen

POOL = "meadow"
N1, N2 = Identity(Role.AGENT, "n1"), Identity(Role.AGENT, "n2")
DEAD_AFTER_S = 2 * HEARTBEAT_S


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("certs")
    ca = CertificateAuthority.create(base / "ca", POOL)
    for role, name in ((Role.AGENT, "n1"), (Role.AGENT, "n2"), (Role.CONTROLLER, "main"), (Role.QEMU, "n1")):
        ca.issue(role, name).write(base / f"{role}-{name}")
    ca.issue(Role.AGENT, "n2", ["agent-n1"]).write(base / "impostor")
    ca.issue(Role.AGENT, "n1", life=timedelta(days=1), now=datetime(2025, 1, 1, tzinfo=UTC)).write(base / "expired")
    CertificateAuthority.create(base / "ca2", POOL).issue(Role.AGENT, "n1").write(base / "stranger")
    (base / "stranger" / "ca-cert.pem").write_bytes(ca.ca_pem)
    return base


class End:
    """Agent n2: it keeps the links that reach it, or refuses them."""

    def __init__(self) -> None:
        self.links: asyncio.Queue[Link] = asyncio.Queue()
        self.refusal: EmpError | None = None
        self.port = 0

    def on_link(self, link: Link) -> None:
        if self.refusal:
            raise self.refusal
        self.links.put_nowait(link)


@contextlib.asynccontextmanager
async def served(certs: Path, who: str = "agent-n2") -> AsyncIterator[End]:
    end = End()
    sock = listen("127.0.0.1", 0)
    end.port = sock.getsockname()[1]
    context = tls.mutual_server(certs / who)
    async with LinkServer(sock, tls=context, pool=POOL, on_link=end.on_link, dead_after_s=DEAD_AFTER_S):
        yield end


@pytest.fixture
async def n2(certs: Path) -> AsyncIterator[End]:
    async with served(certs) as end:
        yield end


async def connect(certs: Path, port: int, *, as_: str = "agent-n1", pool: str = POOL) -> Link:
    own = tls.mutual_client(certs / as_)
    return await connect_link("127.0.0.1", port, tls=own, pool=pool, peer=N2, dead_after_s=DEAD_AFTER_S)


@pytest.fixture
async def pair(certs: Path, n2: End) -> AsyncIterator[tuple[Link, Link]]:
    here = await connect(certs, n2.port)
    there = await n2.links.get()
    yield here, there
    await here.close()
    await there.close()


async def test_both_ends_know_each_other_and_messages_go_both_ways(pair: tuple[Link, Link]) -> None:
    here, there = pair
    assert (here.peer, there.peer) == (N2, N1)
    await here.send({"kind": "PREPARE", "epoch": 7, "text": "ö\n\x00"})
    assert await anext(there) == {"kind": "PREPARE", "epoch": 7, "text": "ö\n\x00"}
    await there.send({"kind": "READY"})
    await there.send({"kind": "MORE"})
    assert [await anext(here), await anext(here)] == [{"kind": "READY"}, {"kind": "MORE"}]


async def test_a_goodbye_ends_both_ends_after_the_last_message(pair: tuple[Link, Link]) -> None:
    here, there = pair
    for number in range(3):
        await here.send({"n": number})
    await here.close()
    assert [message["n"] async for message in there] == [0, 1, 2]
    assert await there.closed is None and await here.closed is None
    with pytest.raises(Unreachable, match="closed"):
        await there.send({})


async def test_a_goodbye_can_say_why(pair: tuple[Link, Link]) -> None:
    here, there = pair
    await here.close(StaleEpoch("epoch 3 is older than 5", ours=5))
    cause = await there.closed
    assert type(cause) is StaleEpoch and cause.details == {"ours": 5}


async def test_when_both_say_goodbye_each_keeps_its_own_reason(pair: tuple[Link, Link]) -> None:
    here, there = pair
    await asyncio.gather(here.close(StaleEpoch("old")), there.close(Conflict("busy")))
    assert [type(await here.closed), type(await there.closed)] == [StaleEpoch, Conflict]


async def test_a_vanished_peer_is_noticed_by_its_connection_and_not_by_the_clock(pair: tuple[Link, Link]) -> None:
    here, there = pair
    waiting = asyncio.create_task(anext(there, None))
    here.abort()
    cause = await there.closed
    assert type(cause) is Unavailable and "agent-n1 broke" in cause.message  # and not: it has been silent
    assert await waiting is None


@contextlib.asynccontextmanager
async def strange_n2(certs: Path, *frames: bytes) -> AsyncIterator[int]:
    """Serve as n2 something that sends ``frames`` and then only keeps the connection open."""
    connected: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.append(writer)
        writer.write(b"".join(frames))
        with contextlib.suppress(OSError):
            while await reader.read(4096):
                pass
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls.mutual_server(certs / "agent-n2"))
    async with server:
        yield server.sockets[0].getsockname()[1]
        for writer in connected:
            writer.transport.abort()


async def test_a_silent_peer_is_given_up_within_the_time_asked_for(certs: Path) -> None:
    async with strange_n2(certs, encode(Kind.WELCOME)) as port:
        link = await connect(certs, port)
        started = time.monotonic()
        cause = await link.closed
        elapsed_s = time.monotonic() - started
    assert type(cause) is Unavailable and "silent for 0.5 s" in cause.message
    assert DEAD_AFTER_S <= elapsed_s < 20 * DEAD_AFTER_S


async def test_an_idle_link_lives_on_heartbeats(pair: tuple[Link, Link]) -> None:
    here, there = pair
    await asyncio.sleep(3 * DEAD_AFTER_S)  # nothing to await: the point is that nothing happens
    await here.send({"still": "here"})
    assert await anext(there) == {"still": "here"}


async def test_a_stall_of_ours_does_not_accuse_the_peer(certs: Path) -> None:
    stop = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(encode(Kind.WELCOME))
        await stop.wait()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls.mutual_server(certs / "agent-n2"))
    async with server:
        link = await connect(certs, server.sockets[0].getsockname()[1])
        time.sleep(2 * DEAD_AFTER_S)  # noqa: ASYNC251 this stands for a process that was stopped
        done, _ = await asyncio.wait([link.closed], timeout=HEARTBEAT_S / 2)
        assert not done
        assert "silent" in str(await link.closed)  # later it was silent while we did listen
        stop.set()


async def test_a_slow_reader_slows_the_sender_and_loses_nothing(pair: tuple[Link, Link]) -> None:
    here, there = pair
    count, filler = 20 * MAX_PENDING, "x" * 4096
    sending = asyncio.create_task(flood(here, count, filler))
    done, _ = await asyncio.wait([sending], timeout=2 * DEAD_AFTER_S)
    assert not done and not there.closed.done(), "a reader that is behind must hold the sender, not lose the link"
    seen = 0
    async for message in there:
        assert message == {"n": seen, "filler": filler}
        seen += 1
        if seen == count:
            break
    await sending


async def flood(link: Link, count: int, filler: str) -> None:
    for number in range(count):
        await link.send({"n": number, "filler": filler})


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (encode(Kind.MESSAGE, b"{"), "EOF"),
        (encode(Kind.MESSAGE, b"[1]"), "JSON object"),
        (encode(Kind.MESSAGE, b"[" * 100_000), "recursion"),
        (b"\x00\x00\x00\x00\x63", "kind 99"),
        (b"\xff\xff\xff\xff\x02", "4294967295 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "not a frame"),
    ],
)
async def test_nonsense_closes_the_link_with_the_reason(certs: Path, frame: bytes, reason: str) -> None:
    async with strange_n2(certs, encode(Kind.WELCOME), frame) as port:
        link = await connect(certs, port)
        cause = await link.closed
    assert type(cause) is Unavailable and reason in cause.message


async def test_a_message_beyond_the_bound_is_not_sent(pair: tuple[Link, Link]) -> None:
    here, there = pair
    with pytest.raises(BadInput, match="beyond the link's bound"):
        await here.send({"x": "y" * MAX_PAYLOAD_BYTES})
    await here.send({"fine": True})
    assert await anext(there) == {"fine": True}


@pytest.mark.parametrize(("who", "alert"), [("stranger", "unknown ca"), ("expired", "certificate expired")])
async def test_a_bad_certificate_gets_no_link(certs: Path, n2: End, who: str, alert: str) -> None:
    with pytest.raises(Unreachable, match=f"refuses our certificate: .*{alert}"):
        await connect(certs, n2.port, as_=who)
    assert n2.links.empty()


@pytest.mark.parametrize("who", ["controller-main", "qemu-n1"])
async def test_another_role_gets_no_link(certs: Path, n2: End, who: str) -> None:
    with pytest.raises(Forbidden, match="only agents"):
        await connect(certs, n2.port, as_=who)
    assert n2.links.empty()


async def test_without_certificate_there_is_no_link(certs: Path, n2: End) -> None:
    context = tls.public_client(certs / "ca" / "ca-cert.pem")
    with pytest.raises(Unreachable, match="certificate required"):
        await connect_link("127.0.0.1", n2.port, tls=context, pool=POOL, peer=N2)
    assert n2.links.empty()


@pytest.mark.parametrize("who", ["agent-n1", "controller-main"])
async def test_another_node_at_the_address_is_not_the_peer(certs: Path, who: str) -> None:
    async with served(certs, who) as end:
        with pytest.raises(Unreachable, match="not valid for 'agent-n2'"):
            await connect(certs, end.port)
        assert end.links.empty()


async def test_an_agent_whose_certificate_borrows_the_peers_dns_name_is_not_the_peer(certs: Path) -> None:
    async with served(certs, "impostor") as end:
        context = tls.mutual_client(certs / "agent-n1")
        with pytest.raises(Unreachable, match="agent-n2 answers there"):
            await connect_link("127.0.0.1", end.port, tls=context, pool=POOL, peer=N1)


async def test_the_accepting_agent_may_refuse_with_a_reason(certs: Path, n2: End) -> None:
    n2.refusal = Conflict("no migration expects you")
    with pytest.raises(Conflict, match="no migration expects you"):
        await connect(certs, n2.port)


async def test_nobody_there_and_no_answer_are_unreachable(certs: Path) -> None:
    sock = listen("127.0.0.1", 0)
    port = sock.getsockname()[1]
    context = tls.mutual_client(certs / "agent-n1")
    with pytest.raises(Unreachable, match="no answer in time"):
        await connect_link("127.0.0.1", port, tls=context, pool=POOL, peer=N2, timeout_s=0.1)
    sock.close()
    with pytest.raises(Unreachable, match="Connect call failed"):
        await connect(certs, port)


async def test_a_peer_that_never_welcomes_is_unreachable(certs: Path) -> None:
    context: ssl.SSLContext = tls.mutual_client(certs / "agent-n1")
    async with strange_n2(certs) as port:
        with pytest.raises(Unreachable, match="no answer in time"):
            await connect_link("127.0.0.1", port, tls=context, pool=POOL, peer=N2, timeout_s=0.2)


async def test_an_opening_that_is_cancelled_leaves_no_link(n2: End, certs: Path) -> None:
    context = tls.mutual_client(certs / "agent-n1")
    for steps in range(40):
        opening = asyncio.create_task(connect_link("127.0.0.1", n2.port, tls=context, pool=POOL, peer=N2))
        for _ in range(steps):
            await asyncio.sleep(0)
        opening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await opening).abort()
    here = await connect(certs, n2.port)  # and so those before have been accepted, or never will be
    for _ in range(n2.links.qsize() - 1):
        await asyncio.wait_for((await n2.links.get()).closed, 5)
    here.abort()


async def test_data_goes_to_whom_expects_it(pair: tuple[Link, Link]) -> None:
    here, there = pair
    taken: list[bytes] = []
    there.on_data = taken.append
    assert here.send_data(b"one")
    here.send_data(b"two" * 100_000)
    await here.send({"then": "a message"})
    assert await anext(aiter(there)) == {"then": "a message"}
    assert taken == [b"one", b"two" * 100_000], "in order with messages"


async def test_data_that_nobody_expects_ends_the_link(pair: tuple[Link, Link]) -> None:
    here, there = pair
    here.send_data(b"one")
    assert "nobody expects" in str(await there.closed)


async def test_who_sends_faster_than_is_read_is_told_to_wait(pair: tuple[Link, Link]) -> None:
    here, there = pair
    taken: list[int] = []
    there.on_data = lambda data: taken.append(len(data))
    sent = 1
    while here.send_data(bytes(500_000)):
        sent += 1
    await here.writable()
    here.send_data(b"")
    await here.send({})
    await anext(aiter(there))
    assert taken == [500_000] * sent + [0]


async def test_a_stopping_server_drops_its_links(certs: Path) -> None:
    async with served(certs) as end:
        here = await connect(certs, end.port)
    assert type(await here.closed) is Unavailable


def test_a_time_shorter_than_two_heartbeats_is_refused() -> None:
    async def make() -> None:
        Link(pool=POOL, admit=lambda link: None, dead_after_s=HEARTBEAT_S)

    with pytest.raises(BadInput, match="heartbeats"):
        asyncio.run(make())


@given(payloads=st.lists(st.binary(max_size=300), max_size=8), chunks=st.lists(st.integers(1, 50), min_size=1))
def test_frames_come_out_as_they_went_in_however_they_were_chopped(payloads: list[bytes], chunks: list[int]) -> None:
    stream = b"".join(encode(Kind.MESSAGE, payload) for payload in payloads)
    decoder, seen, at = Decoder(), [], 0
    for index in range(math.ceil(len(stream) / min(chunks)) + 1):
        size = chunks[index % len(chunks)]
        seen += list(decoder.feed(stream[at : at + size]))
        at += size
    assert seen == [(Kind.MESSAGE, payload) for payload in payloads]


async def test_echoes_keep_their_order_and_the_round_trip_is_shown(pair: tuple[Link, Link]) -> None:
    here, there = pair

    async def echo() -> None:
        async for message in there:
            await there.send(message)

    echoing = asyncio.create_task(echo())
    trips_ms = []
    for number in range(300):
        started = time.perf_counter()
        await here.send({"kind": "GIVEN", "migration": "m-0123456789", "epoch": number})
        assert (await anext(here))["epoch"] == number
        trips_ms.append((time.perf_counter() - started) * 1e3)
    await here.close()
    await echoing
    cuts = statistics.quantiles(trips_ms[50:], n=100)
    print(f"link round trip, both ends in one loop: median {cuts[49]:.3f} ms, p99 {cuts[98]:.3f} ms, 2 hops each")
