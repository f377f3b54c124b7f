"""A relay between a client and a volume that are both in the test's hands: what it keeps, sends, holds and refuses."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.model.errors import BadInput, Conflict, EmpError, HostError, NotFound, Refused, Unreachable
from emp.volumes.nbd_wire import Flag, Kind
from emp.volumes.relay.config import RelayConfig, TlsListen, UnixListen, load
from emp.volumes.relay.session import MOST_REQUESTS
from tests.fakes.nbd import ALL_FLAGS
from tests.fakes.relay import HERE, THERE, Bench, until

EIO = 5


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    await made.close()


# ---------------------------------------------------------------------- passing on


async def test_every_kind_of_request_reaches_the_volume_as_it_is(bench: Bench) -> None:
    await bench.start()
    client = await bench.client()
    assert (client.export.size_bytes, client.export.flags) == (bench.volume.size_bytes, ALL_FLAGS)
    assert await client.write(4096, b"\5" * 8192, flags=1) == 0
    assert await client.read(4096, 8192) == b"\5" * 8192
    for kind in (Kind.FLUSH, Kind.TRIM, Kind.WRITE_ZEROES, Kind.CACHE):
        length = 0 if kind is Kind.FLUSH else 512
        cookie = client.send(kind, 512 if length else 0, length, flags=0b10 if kind is Kind.WRITE_ZEROES else 0)
        assert await client.answer() == (0, cookie, b"")
    seen = [(each.kind, each.offset, each.length, each.flags) for each in bench.volume.asked]
    assert seen == [
        *((Kind.WRITE, 4096, 8192, 1), (Kind.READ, 4096, 8192, 0), (Kind.FLUSH, 0, 0, 0)),
        *((Kind.TRIM, 512, 512, 0), (Kind.WRITE_ZEROES, 512, 512, 2), (Kind.CACHE, 512, 512, 0)),
    ]
    status = bench.relay.status()
    assert (status["read_bytes"], status["write_ops"], status["flushes"]) == (8192, 3, 1)
    assert status["round_trip"]["count"] == 6
    assert 0 < status["round_trip"]["mean_ms"] <= status["round_trip"]["max_ms"]


async def test_an_error_of_the_volume_is_the_clients(bench: Bench) -> None:
    await bench.start()
    client = await bench.client()
    bench.volume.errors = {Kind.WRITE: 28, Kind.READ: EIO}
    assert await client.write(0, b"\1" * 512) == 28
    cookie = client.send(Kind.READ, 0, 512)
    assert await client.answer() == (EIO, cookie, b"")
    assert bench.relay.status()["errors"] == 2


async def test_a_write_is_acknowledged_only_when_the_volume_has_it(bench: Bench) -> None:
    await bench.start()
    client = await bench.client()
    bench.volume.answering.clear()
    cookie = client.send(Kind.WRITE, 0, data=b"\1" * 512)
    await bench.volume.until_asked(1)
    assert await client.is_silent()
    assert bench.relay.status()["outstanding"] == 1
    bench.volume.answering.set()
    assert await client.answer() == (0, cookie, b"")


async def test_flags_that_a_relay_cannot_keep_are_not_announced(bench: Bench) -> None:
    bench.volume.flags = 0xFFFF
    await bench.start()
    client = await bench.client()
    assert client.export.flags == 0b1100_0111_1111, "not structured replies (7), several connections (8), resize (9)"


# ---------------------------------------------------------------------- writes wait


async def test_writes_wait_and_reads_pass_until_it_is_opened(bench: Bench) -> None:
    await bench.start(writes_open=False)
    client = await bench.client()
    first = client.send(Kind.WRITE, 0, data=b"\1" * 512)
    second = client.send(Kind.TRIM, 4096, 512)
    assert await client.read(0, 512) == bytes(512)
    assert await client.is_silent()
    assert [each.kind for each in bench.volume.asked] == [Kind.READ]
    assert bench.relay.status()["waiting"] == 2

    await bench.relay.open()
    assert await client.answer() == (0, first, b"")
    assert await client.answer() == (0, second, b"")
    assert await client.read(0, 512) == b"\1" * 512
    assert await client.write(512, b"\2" * 512) == 0, "and it stays open"


async def test_a_flush_passes_unless_a_write_waits_before_it(bench: Bench) -> None:
    await bench.start(writes_open=False)
    client = await bench.client()
    early = client.send(Kind.FLUSH)
    assert await client.answer() == (0, early, b"")
    write = client.send(Kind.WRITE, 0, data=b"\1" * 512)
    late = client.send(Kind.FLUSH)
    assert await client.is_silent()
    await bench.relay.open()
    assert [(await client.answer())[1] for _ in range(2)] == [write, late]


async def test_what_waits_of_a_client_that_is_gone_is_never_done(bench: Bench) -> None:
    await bench.start(writes_open=False)
    gone, stays = await bench.client(), await bench.client()
    gone.send(Kind.WRITE, 0, data=b"\1" * 512)
    cookie = stays.send(Kind.WRITE, 512, data=b"\2" * 512)
    await until(bench.relay, waiting=2)
    gone.close()
    await until(bench.relay, waiting=1, clients=1)
    await bench.relay.open()
    assert await stays.answer() == (0, cookie, b"")
    assert bench.volume.content[:1024] == bytes(512) + b"\2" * 512


async def test_neither_if_so_much_of_it_waits_that_nobody_reads_it_any_more(bench: Bench) -> None:
    await bench.start(writes_open=False)
    client = await bench.client()
    for number in range(MOST_REQUESTS + 5):
        client.send(Kind.WRITE, 512 * number, data=b"\1" * 512)
    await until(bench.relay, waiting=MOST_REQUESTS)
    client.close()
    with pytest.raises((OSError, EOFError)):
        await client.answer()
    await bench.relay.open()
    await until(bench.relay, clients=0)
    assert not bench.volume.asked


async def test_that_it_is_open_outlives_a_kill(bench: Bench) -> None:
    await bench.start(writes_open=False)
    await bench.client()
    await bench.relay.open()
    await bench.kill()
    await bench.start()
    assert await (await bench.client()).write(0, b"\1" * 512) == 0


# ---------------------------------------------------------------------- a lost volume


async def test_what_was_outstanding_when_the_volume_was_lost_is_sent_again_in_order(bench: Bench) -> None:
    await bench.start()
    client = await bench.client()
    bench.volume.answering.clear()
    cookies = [client.send(Kind.WRITE, 512 * number, data=bytes([number + 1]) * 512) for number in range(4)]
    await bench.volume.until_asked(1)
    bench.volume.reachable = False
    bench.volume.lose()
    bench.volume.answering.set()
    late = client.send(Kind.READ, 0, 2048)
    assert await client.is_silent(0.5), "no error, whatever happens"
    assert bench.relay.status()["problem"]
    bench.volume.asked.clear()
    bench.volume.reachable = True
    assert [(await client.answer())[1] for _ in range(4)] == cookies
    assert await client.answer(2048) == (0, late, b"".join(bytes([n + 1]) * 512 for n in range(4)))
    assert [each.offset for each in bench.volume.asked[:4]] == [0, 512, 1024, 1536]
    assert (bench.relay.status()["reconnects"], bench.relay.status()["problem"]) == (1, None)


async def test_a_volume_that_shuts_down_is_a_lost_one(bench: Bench) -> None:
    await bench.start()
    client = await bench.client()
    bench.volume.errors = {Kind.WRITE: 108}
    cookie = client.send(Kind.WRITE, 0, data=b"\1" * 512)
    await bench.volume.until_asked(2)
    bench.volume.errors = {}
    assert await client.answer() == (0, cookie, b"")


async def test_nobody_writes_before_the_writes_of_a_client_that_is_gone_are_over(bench: Bench) -> None:
    await bench.start()
    gone, stays = await bench.client(), await bench.client()
    bench.volume.answering.clear()
    gone.send(Kind.WRITE, 0, data=b"\1" * 512)
    await bench.volume.until_asked(1)
    gone.close()
    await until(bench.relay, clients=1)
    cookie = stays.send(Kind.WRITE, 0, data=b"\2" * 512)
    await until(bench.relay, waiting=1)
    assert len(bench.volume.asked) == 1
    bench.volume.answering.set()
    assert await stays.answer() == (0, cookie, b"")
    assert bench.volume.content[:512] == b"\2" * 512


async def test_what_waits_behind_such_writes_is_not_done_when_its_client_goes_too(bench: Bench) -> None:
    await bench.start()
    first, second = await bench.client(), await bench.client()
    bench.volume.answering.clear()
    for client in (first, second):
        client.send(Kind.WRITE, 0, data=b"\1" * 512)
    await bench.volume.until_asked(2)
    first.close()
    await until(bench.relay, clients=1)
    second.send(Kind.WRITE, 0, data=b"\2" * 512)
    await until(bench.relay, waiting=1)
    second.close()
    await until(bench.relay, clients=0)
    bench.volume.answering.set()
    await until(bench.relay, outstanding=0)
    assert await (await bench.client()).read(0, 512) == b"\1" * 512
    assert len(bench.volume.of_kind(Kind.WRITE)) == 2


async def test_between_nodes_the_newest_client_that_writes_is_the_only_one(bench: Bench) -> None:
    """An older one is a connection that is dead for its other end, whatever the network thinks of it."""
    await bench.start(listen=TlsListen("127.0.0.1", 0, "agent-n2", "v"), writes_open=False)
    old, reader, new = [await bench.client() for _ in range(3)]
    assert await reader.read(0, 512) == bytes(512)
    old.send(Kind.WRITE, 0, data=b"\1" * 512)
    await until(bench.relay, waiting=1, clients=3)
    cookie = new.send(Kind.WRITE, 0, data=b"\2" * 512)
    await until(bench.relay, waiting=1, clients=2)
    await bench.relay.open()
    assert await new.answer() == (0, cookie, b"")
    assert len(bench.volume.of_kind(Kind.WRITE)) == 1
    assert await reader.read(0, 512) == b"\2" * 512
    with pytest.raises((OSError, EOFError)):
        await old.answer()


# ---------------------------------------------------------------------- hold, switch


async def test_a_hold_waits_for_what_is_outstanding_and_flushes(bench: Bench) -> None:
    await bench.start()
    client = await bench.client()
    bench.volume.answering.clear()
    cookie = client.send(Kind.WRITE, 0, data=b"\1" * 512)
    await bench.volume.until_asked(1)
    holding = asyncio.create_task(bench.relay.hold(5))
    await until(bench.relay, state="holding")
    late = client.send(Kind.READ, 0, 512)
    await until(bench.relay, waiting=1)
    bench.volume.answering.set()
    await holding
    assert await client.answer() == (0, cookie, b"")
    assert await client.is_silent()
    assert [each.kind for each in bench.volume.asked] == [Kind.WRITE, Kind.FLUSH]
    status = bench.relay.status()
    assert (status["state"], status["outstanding"], status["waiting"], status["is_flushed"]) == ("held", 0, 1, True)
    assert abs(status["held_since_s"] - time.time()) < 10
    assert not bench.volume.is_open, "it can be detached"

    connections = bench.volume.connections
    await bench.relay.hold(5)
    assert bench.volume.connections == connections, "the same order again asks nobody"
    await bench.relay.switch(HERE)
    assert await client.answer(512) == (0, late, b"\1" * 512)
    assert bench.relay.status()["held_since_s"] is None


async def test_a_hold_without_clients_flushes_too(bench: Bench) -> None:
    relay = await bench.start()
    await until(relay, state="running")
    await relay.hold(5)
    assert [each.kind for each in bench.volume.asked] == [Kind.FLUSH]


async def test_a_volume_that_takes_no_flush_gets_none(bench: Bench) -> None:
    bench.volume.flags &= ~Flag.FLUSH
    await bench.start()
    await bench.client()
    await bench.relay.hold(5)
    assert not bench.volume.asked
    assert bench.relay.status()["is_flushed"]


async def test_a_flush_that_fails_is_told(bench: Bench) -> None:
    await bench.start()
    await bench.client()
    bench.volume.errors = {Kind.FLUSH: EIO}
    with pytest.raises(HostError, match="refuses to flush, error 5"):
        await bench.relay.hold(5)
    assert (bench.relay.status()["state"], bench.relay.status()["is_flushed"]) == ("held", False)
    bench.volume.errors = {}
    await bench.relay.hold(5)
    assert bench.relay.status()["is_flushed"], "the order can be given again"


@pytest.mark.parametrize("how", ["mute", "dead"])
async def test_a_hold_of_a_volume_that_does_not_answer_keeps_what_is_outstanding(bench: Bench, how: str) -> None:
    await bench.start()
    client = await bench.client()
    bench.volume.answering.clear()
    cookie = client.send(Kind.WRITE, 0, data=b"\1" * 512)
    await bench.volume.until_asked(1)
    if how == "dead":
        bench.volume.reachable = False
        bench.volume.lose()
    with pytest.raises(Unreachable, match=r"1 requests are unanswered after 0\.4 s"):
        await bench.relay.hold(0.4)
    status = bench.relay.status()
    assert (status["state"], status["outstanding"], status["is_flushed"]) == ("held", 1, False)
    asked = len(bench.volume.asked)
    bench.volume.answering.set()
    bench.volume.reachable = True
    assert await client.is_silent(0.5), "held is held"
    assert len(bench.volume.asked) == asked

    await bench.relay.hold(5)
    assert await client.answer() == (0, cookie, b""), "once more: it is sent again"
    assert bench.relay.status()["is_flushed"]


async def test_a_switch_sends_there_what_waits_and_what_was_never_answered(bench: Bench) -> None:
    await bench.start()
    client = await bench.client()
    bench.volume.answering.clear()
    first = client.send(Kind.WRITE, 0, data=b"\1" * 512)
    await bench.volume.until_asked(1)
    with pytest.raises(Unreachable):
        await bench.relay.hold(0.2)
    second = client.send(Kind.WRITE, 512, data=b"\2" * 512)
    await until(bench.relay, waiting=1)
    await bench.relay.switch(THERE)
    assert [(await client.answer())[1] for _ in range(2)] == [first, second]
    assert bench.there.content[:1024] == b"\1" * 512 + b"\2" * 512
    bench.volume.answering.set()
    await bench.relay.switch(THERE)
    assert (bench.volume.is_open, bench.there.is_open) == (False, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size_bytes": 1 << 19}, "has 524288 bytes, not 1048576"),
        ({"flags": ALL_FLAGS & ~Flag.FUA}, "fua"),
        ({"flags": ALL_FLAGS & ~(Flag.TRIM | Flag.FLUSH)}, "flush, trim"),
        ({"flags": ALL_FLAGS | Flag.READ_ONLY}, "read only"),
    ],
)
async def test_what_is_not_the_volume_is_refused(bench: Bench, changes: dict[str, int], words: str) -> None:
    await bench.start()
    client = await bench.client()
    await bench.relay.hold(5)
    cookie = client.send(Kind.WRITE, 0, data=b"\1" * 512)
    for name, value in changes.items():
        setattr(bench.there, name, value)
    with pytest.raises(Refused, match=words):
        await bench.relay.switch(THERE)
    assert await client.is_silent()
    assert (bench.relay.status()["state"], bench.there.is_open) == ("held", False)
    assert not bench.there.asked
    await bench.relay.switch(HERE)
    assert await client.answer() == (0, cookie, b"")


async def test_a_volume_that_does_more_than_was_announced_is_the_volume(bench: Bench) -> None:
    bench.volume.flags = int(Flag.HAS_FLAGS | Flag.FLUSH)
    await bench.start()
    client = await bench.client()
    await bench.relay.hold(5)
    await bench.relay.switch(THERE)
    assert await client.write(0, b"\1" * 512) == 0


async def test_a_switch_that_cannot_be(bench: Bench) -> None:
    relay = await bench.start()
    await bench.client()
    with pytest.raises(Conflict, match="not held"):
        await relay.switch(THERE)
    await relay.switch(HERE)
    await relay.hold(5)
    bench.there.reachable = False
    with pytest.raises(Unreachable, match="it is not there"):
        await relay.switch(THERE)
    assert relay.status()["state"] == "held"


async def test_a_relay_that_was_killed_goes_on_where_it_was(bench: Bench) -> None:
    await bench.start()
    await bench.client()
    await bench.relay.hold(5)
    asked = len(bench.volume.asked)
    await bench.kill()

    await bench.start()
    client = await bench.client()
    cookie = client.send(Kind.WRITE, 0, data=b"\1" * 512)
    assert await client.is_silent(), "held, and what was announced is known"
    await bench.relay.hold(5)
    assert len(bench.volume.asked) == asked, "and flushed before"
    await bench.relay.switch(THERE)
    assert await client.answer() == (0, cookie, b"")
    await bench.kill()

    await bench.start()
    assert await (await bench.client()).read(0, 512) == b"\1" * 512
    assert bench.there.content[:512] == b"\1" * 512


# ---------------------------------------------------------------------- its configuration


def test_a_configuration_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(NotFound):
        load(path)
    good = RelayConfig(UnixListen("/s"), 512, None, "/t", "/c", "/p", writes_open=True)
    good.save(path)
    assert load(path) == good
    assert path.stat().st_mode & 0o777 == 0o600
    text = json.loads(path.read_text())
    for bad in (b"{", b"[]", json.dumps(text | {"more": 1}).encode(), json.dumps(text | {"listen": {}}).encode()):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match="no configuration of a relay"):
            load(path)


async def test_a_relay_that_cannot_write_down_what_it_was_told_does_not_do_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bench.start(writes_open=False)
    client = await bench.client()
    client.send(Kind.WRITE, 0, data=b"\1" * 512)
    await until(bench.relay, waiting=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RelayConfig, "save", full)
    for order in (bench.relay.open(), bench.relay.hold(1)):
        with pytest.raises(EmpError, match="No space left"):
            await order
    assert bench.relay.status()["state"] == "running"
    assert not bench.volume.asked
