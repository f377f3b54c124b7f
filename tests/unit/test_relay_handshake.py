"""Who comes into a relay, and how: the handshake, requests that nobody agreed on, and those who do not keep to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.model.errors import Refused, Unreachable
from emp.volumes.nbd_wire import REPLY_MAGIC, Kind
from tests.fakes.nbd import ALL_FLAGS, raw_request
from tests.fakes.relay import HERE, Bench, until


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    yield made
    await made.close()


async def test_a_client_that_comes_early_waits_in_the_handshake(bench: Bench) -> None:
    bench.volume.reachable = False
    relay = await bench.start()
    with pytest.raises(Unreachable, match="it is not there"):
        await relay.reach(0.1)
    coming = asyncio.create_task(bench.client())
    impatient = asyncio.create_task(bench.client())
    await asyncio.wait({coming}, timeout=0.3)
    assert not coming.done()
    impatient.cancel()
    assert relay.status()["state"] == "connecting"
    bench.volume.reachable = True
    assert (await coming).export.size_bytes == bench.volume.size_bytes
    await relay.reach(1)


async def test_a_volume_of_another_size_is_never_shown(bench: Bench) -> None:
    relay = await bench.start(size_bytes=4096)
    with pytest.raises(Refused, match="has 1048576 bytes, not 4096"):
        await relay.reach(1)


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"GET / HTTP/1.1\r\n\r\n" * 10, b"\xff" * 64, bytes(4) + bytes(64)),
        b"\0\0\0\3" + b"IHAVEOPT" + b"\0\0\0\7" + b"\xff\xff\xff\xff",
        b"\0\0\0\3" + b"IHAVEOPT\0\0\0\1\0\0\0\5other",
        b"\0\0\0\3" + b"IHAVEOPT\0\0\0\x63\0\0\0\0" * 100,
    ],
)
async def test_garbage_and_half_open_connections_harm_nobody(bench: Bench, garbage: bytes) -> None:
    await bench.start()
    client = await bench.client()
    reader, writer = await asyncio.open_unix_connection(bench.socket)
    silent = [await asyncio.open_unix_connection(bench.socket) for _ in range(20)]
    writer.write(garbage)
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionError):  # as good as an end
            await reader.read()
    assert await client.write(0, b"\1" * 512) == 0
    for _, each in [*silent, (reader, writer)]:
        each.close()


async def say(bench: Bench, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
    """Return the answers to an option of a client that speaks by hand."""
    reader, writer = await asyncio.open_unix_connection(bench.socket)
    writer.write(b"\0\0\0\3IHAVEOPT" + option.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data)
    assert await reader.readexactly(18) == b"NBDMAGICIHAVEOPT\0\3"
    answers: list[tuple[int, bytes]] = []
    async with asyncio.timeout(5):
        while not answers or answers[-1][0] in (2, 3):
            head = await reader.readexactly(20)
            answers.append((int.from_bytes(head[12:16], "big"), await reader.readexactly(head[19])))
    writer.close()
    return answers


async def test_options_are_answered_as_the_protocol_says(bench: Bench) -> None:
    await bench.start()
    error = 1 << 31
    info = b"\0\0" + bench.volume.size_bytes.to_bytes(8, "big") + ALL_FLAGS.to_bytes(2, "big")
    default = bytes(6)
    assert await say(bench, 2) == [(1, b"")], "abort"
    assert await say(bench, 3) == [(2, bytes(4)), (1, b"")], "list"
    assert await say(bench, 3, b"x") == [(error + 3, b"")]
    assert await say(bench, 5) == [(error + 1, b"")], "STARTTLS on a unix socket"
    assert await say(bench, 6, default) == [(3, info), (1, b"")], "info"
    assert await say(bench, 7, default) == [(3, info), (1, b"")], "go"
    assert await say(bench, 7, b"\0\0\0\1x\0\0") == [(error + 6, b"")], "no such export"
    assert await say(bench, 7, b"\0\0\0\x09x\0\0") == [(error + 3, b"")]
    assert await say(bench, 7, b"\0\0\0\0\0\1") == [(error + 3, b"")]
    for option in (8, 10, 11, 77):
        assert await say(bench, option) == [(error + 1, b"")], "structured replies, and what comes with them"


@pytest.mark.parametrize("zeroes", [0, 124])
async def test_the_old_way_into_the_export_works_too(bench: Bench, zeroes: int) -> None:
    await bench.start()
    reader, writer = await asyncio.open_unix_connection(bench.socket)
    writer.write((1 if zeroes else 3).to_bytes(4, "big") + b"IHAVEOPT\0\0\0\1\0\0\0\0" + raw_request())
    async with asyncio.timeout(5):
        said = await reader.readexactly(18 + 10 + zeroes + 16 + 512)
    assert said[18:28] == bench.volume.size_bytes.to_bytes(8, "big") + ALL_FLAGS.to_bytes(2, "big")
    assert said[28 + zeroes :][:4] == REPLY_MAGIC.to_bytes(4, "big")
    writer.close()


@pytest.mark.parametrize(
    "wrong", [{"kind": 7}, {"kind": 99}, {"flags": 4}, {"flags": 0x8000}, {"length": (32 << 20) + 1}]
)
async def test_requests_that_were_not_agreed_on_are_invalid(bench: Bench, wrong: dict[str, int]) -> None:
    await bench.start()
    client = await bench.client()
    client.export.stream.send(raw_request(**wrong))
    assert await client.answer() == (22, 7, b"")
    assert not bench.volume.asked
    assert await client.write(0, b"\1" * 512) == 0


@pytest.mark.parametrize("wrong", [{"magic": 1}, {"kind": 1, "length": (32 << 20) + 1}])
async def test_a_client_that_does_not_keep_to_the_protocol_is_sent_away(bench: Bench, wrong: dict[str, int]) -> None:
    await bench.start()
    client, other = await bench.client(), await bench.client()
    client.export.stream.send(raw_request(**wrong))
    with pytest.raises((OSError, EOFError)):
        await client.answer()
    assert await other.write(0, b"\1" * 512) == 0


async def test_a_client_is_not_read_while_too_much_of_it_is_kept(bench: Bench) -> None:
    await bench.start(size_bytes=bench.volume.size_bytes)
    client = await bench.client()
    await bench.relay.hold(5)
    data = b"\1" * (1 << 20)
    for _ in range(40):
        client.send(Kind.WRITE, 0, data=data)
    await until(bench.relay, waiting=32)
    assert await client.is_silent()
    assert bench.relay.status()["waiting"] == 32, "32 MiB"
    await bench.relay.switch(HERE)
    for _ in range(40):
        assert (await client.answer())[0] == 0


async def test_cookies_that_a_client_uses_twice_are_its_own_affair(bench: Bench) -> None:
    await bench.start()
    client = await bench.client()
    bench.volume.answering.clear()
    client.export.stream.send(raw_request(length=512) + raw_request(length=1024))
    await until(bench.relay, outstanding=2)
    bench.volume.answering.set()
    assert [len((await client.answer(length))[2]) for length in (512, 1024)] == [512, 1024]
