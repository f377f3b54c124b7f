"""``emp.agent.forwarding``: what is sent, in which order, and what happens when an end or the connection fails."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emp.agent import forwarding
from emp.agent.forwarding import Arrivals, Forwarder, pack, unpack
from emp.host import packet
from emp.model.errors import Unavailable, Unreachable
from emp.network.base import Port
from emp.wire.link import Link

EVM, POD, CLIENT = "52:54:00:00:00:01", "02:00:0a:4d:01:02", "02:00:00:00:00:09"
EVERYBODY = "ff:ff:ff:ff:ff:ff"


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def frame(number: int, *, to: str = EVM, sender: str = CLIENT, size: int = 46) -> bytes:
    return packet.PLAIN + mac(to) + mac(sender) + b"\x88\xb6" + number.to_bytes(size, "big")


def numbers(frames: Sequence[bytes]) -> list[int]:
    return [int.from_bytes(one[packet.HEADER_BYTES + 14 :], "big") for one in frames]


class FakePort:
    interface = "tap0"

    def __init__(self) -> None:
        self.queue: deque[bytes] = deque()
        self.was_swallowed: list[bytes] = []
        self.got: list[bytes] = []
        """put into it"""
        self.has_moved = asyncio.Event()
        self.calls: list[str] = []
        self._filled = asyncio.Event()
        self.takes = True

    def comes(self, *frames: bytes) -> None:
        self.queue.extend(frames)
        self._filled.set()

    def watch(self, macs: Sequence[str]) -> None:
        self.calls.append("watch")

    def stopped(self) -> None:
        self.calls.append("stopped")

    def swallowed(self, received: Sequence[int]) -> list[bytes]:
        self.calls.append(f"swallowed {list(received)}")
        return self.was_swallowed

    def pull(self, most: int) -> list[bytes]:
        taken = [self.queue.popleft() for _ in range(min(most, len(self.queue)))]
        if not self.queue:
            self._filled.clear()
        return taken

    async def filled(self) -> None:
        await self._filled.wait()

    async def moved(self) -> None:
        await self.has_moved.wait()

    def release(self) -> None:
        self.calls.append("release")

    def forget(self) -> None:
        self.calls.append("forget")

    def settle(self) -> None:
        self.calls.append("settle")

    def put(self, frames: Sequence[bytes]) -> int:
        self.got += frames if self.takes else []
        return len(frames) if self.takes else 0


class FakeLink:
    """Delivers to ``Arrivals`` at once."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.broken = False
        self.hangs = False
        """its other end does not answer a goodbye"""
        self.closed = False

    def send_data(self, data: bytes) -> bool:
        if self.broken:
            raise Unavailable("the link broke")
        self.target.arrivals._put(data)
        return True

    async def writable(self) -> None: ...

    async def close(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        self.closed = True

    def abort(self) -> None:
        self.closed = True


class Target:
    def __init__(self) -> None:
        self.port = FakePort()
        self.arrivals = Arrivals("m-1", [cast(Port, self.port)])
        self.links: list[FakeLink] = []
        self.unreachable = 0

    async def dial(self) -> Link:
        if self.unreachable:
            self.unreachable -= 1
            raise Unreachable("no route")
        self.links.append(FakeLink(self))
        return cast(Link, self.links[-1])

    async def has(self, count: int) -> list[int]:
        async with asyncio.timeout(10):
            while len(self.port.got) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.001)  # there is nobody to tell
        return numbers(self.port.got)


class Source:
    def __init__(self, target: Target) -> None:
        self.port = FakePort()
        self.forwarder = Forwarder("m-1", [cast(Port, self.port)], [[EVM, POD]], target.dial, quiet_s=0.02, most_s=0.3)


class Machine:
    def __init__(self) -> None:
        self.answers = asyncio.Event()

    async def received_bytes(self, nic: int) -> list[int]:
        await self.answers.wait()
        return [60 + nic]


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
async def source(target: Target) -> AsyncIterator[Source]:
    made = Source(target)
    await made.forwarder.connect()
    made.forwarder.watch()
    made.forwarder.stopped()
    yield made
    await made.forwarder.close()


async def test_what_was_held_is_sent_at_once_and_in_order(source: Source, target: Target) -> None:
    source.port.was_swallowed = [frame(1)]
    source.port.comes(frame(2, to=EVERYBODY), frame(3, to=POD))
    source.forwarder.begin()
    assert numbers(target.port.got) == [1, 2, 3], "before anything else happens"
    assert target.arrivals.caught_up.is_set()
    source.port.comes(frame(4))
    assert await target.has(4) == [1, 2, 3, 4]
    assert (source.forwarder.held, source.forwarder.forwarded) == (4, 4)
    source.forwarder.begin()
    assert len(target.port.got) == 4, "a GO that is repeated begins nothing anew"


async def test_the_target_is_told_when_what_was_held_has_been_sent(
    source: Source, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding, "_AT_ONCE", 10)
    source.port.comes(*map(frame, range(150)))
    source.forwarder.begin()
    assert len(target.port.got) == 10 and not target.arrivals.caught_up.is_set()
    await asyncio.wait_for(target.arrivals.caught_up.wait(), 5)
    assert numbers(target.port.got) == list(range(150))


async def test_it_waits_a_moment_for_the_guests_ring(source: Source, target: Target) -> None:
    machine = Machine()
    source.port.was_swallowed = [frame(1)]
    source.port.comes(frame(2))
    source.forwarder.completed(cast(Any, machine))
    source.forwarder.begin()
    assert target.port.got == []
    machine.answers.set()
    assert await target.has(2) == [1, 2]
    assert "swallowed [60]" in source.port.calls


async def test_a_machine_that_does_not_say_holds_nothing_up(source: Source, target: Target) -> None:
    source.port.comes(frame(2))
    source.forwarder.completed(cast(Any, Machine()))
    source.forwarder.begin()
    assert await target.has(1) == [2]
    assert "swallowed []" in source.port.calls


async def test_the_target_s_own_announcements_do_not_come_back_to_it(source: Source, target: Target) -> None:
    source.forwarder.begin()
    source.port.comes(frame(1, to=EVERYBODY, sender=POD), frame(2, to=EVERYBODY, sender=EVM), frame(3))
    assert await target.has(1) == [3]


async def test_once_it_runs_only_what_is_for_the_evm_goes_on(source: Source, target: Target) -> None:
    source.forwarder.begin()
    moving = asyncio.create_task(source.forwarder.until_moved())
    await asyncio.sleep(0)
    source.port.comes(frame(1, to=EVERYBODY), frame(2, to=CLIENT), frame(3), frame(4, to=POD))
    assert await target.has(2) == [3, 4]
    assert not moving.done()
    source.port.has_moved.set()
    await moving
    assert source.port.calls[-1] == "release"
    assert target.links[0].closed
    assert source.forwarder.held == 0


async def test_a_network_that_never_shows_that_it_moved_is_waited_for_so_long_and_no_longer(source: Source) -> None:
    source.forwarder.begin()
    began_s = asyncio.get_running_loop().time()
    await source.forwarder.until_moved()
    assert asyncio.get_running_loop().time() - began_s >= 0.3
    assert source.port.calls[-1] == "release"


async def test_a_connection_that_breaks_is_made_again(
    source: Source, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding, "_REDIAL_S", 0.001)
    source.port.comes(frame(1))
    source.forwarder.begin()
    target.links[0].broken = True
    target.unreachable = 3
    source.port.comes(frame(2), frame(3))
    assert await target.has(3) == [1, 2, 3]
    assert len(target.links) == 2


async def test_one_that_was_broken_at_the_commit_too(source: Source, target: Target) -> None:
    target.links[0].broken = True
    source.port.comes(frame(1), frame(2))
    source.forwarder.begin()
    assert await target.has(2) == [1, 2]


async def test_a_rescue_gives_the_guest_here_what_had_been_sent(source: Source, target: Target) -> None:
    source.port.was_swallowed = [frame(1)]
    source.port.comes(frame(2), frame(3, to=EVERYBODY))
    source.forwarder.begin()
    source.port.comes(frame(4))
    await target.has(4)
    await source.forwarder.put_back()
    assert numbers(source.port.got) == [2, 3, 4], "the first is in the machine itself"
    assert source.port.calls[-1] == "forget"


async def test_a_target_that_hangs_keeps_no_guest_from_running_here(source: Source, target: Target) -> None:
    target.links[0].hangs = True
    async with asyncio.timeout(0.5):
        await source.forwarder.put_back()
    assert target.links[0].closed


async def test_an_abort_before_the_commit_takes_nothing_out(source: Source) -> None:
    source.port.comes(frame(1))
    await source.forwarder.put_back()
    assert (list(source.port.queue), source.port.got) == ([frame(1)], [])


async def test_copies_have_a_bound_and_what_is_beyond_waits_in_the_tap(
    source: Source, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding, "_COPIES_BYTES", 50_000)
    source.forwarder.begin()
    source.port.comes(*(frame(number, size=1000) for number in range(500)))
    await target.has(64)
    await asyncio.sleep(0.02)  # in which nothing more may come
    assert 50 <= len(target.port.got) <= 64 * 2
    source.port.has_moved.set()
    await source.forwarder.until_moved()
    assert numbers(target.port.got) == list(range(500))


async def test_a_flood_leaves_the_event_loop_to_others(source: Source, target: Target) -> None:
    source.forwarder.begin()
    source.port.comes(*(frame(number) for number in range(20_000)))
    turns = 0
    while len(target.port.got) < 20_000:
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 20_000 / 64


async def test_frames_without_room_are_counted(
    source: Source, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    target.port.takes = False
    source.port.comes(frame(1), frame(2))
    source.forwarder.begin()
    assert target.arrivals._lost == 2


frames = st.binary(min_size=packet.HEADER_BYTES + 14, max_size=200)


@given(nic=st.integers(0, 255), sent=st.lists(frames, max_size=20), chunk=st.integers(1, 500))
def test_frames_come_out_of_messages_as_they_went_in(nic: int, sent: list[bytes], chunk: int) -> None:
    before, forwarding._CHUNK_BYTES = forwarding._CHUNK_BYTES, chunk
    try:
        messages = list(pack(nic, sent))
    finally:
        forwarding._CHUNK_BYTES = before
    assert [one for message in messages for one in unpack(message)] == [(nic, one) for one in sent]


@pytest.mark.parametrize("message", [b"\0", b"\0\0\0\0\x08" + bytes(8), b"\0\0\0\0\x40" + bytes(63)])
def test_what_is_no_message_of_frames_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match="frame"):
        list(unpack(message))
