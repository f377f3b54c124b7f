"""``emp.agent.forwarding``: what is sent, in which order, and what happens when an end or the connection fails."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self, cast

import pytest

from emp.agent import forwarding, tunnel
from emp.agent.forwarding import Forwarder
from emp.agent.tunnel import Arrivals
from emp.host import packet
from emp.hypervisor.base import Received
from emp.model.errors import Unavailable, Unreachable
from emp.network.base import Port, Swallowed
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
        self.was_thrown: list[bytes] = []
        self.got: list[bytes] = []
        """put into it"""
        self.has_moved = asyncio.Event()
        self.calls: list[str] = []
        self._filled = asyncio.Event()
        self.takes = True
        self.overflowed = 0

    def comes(self, *frames: bytes) -> None:
        self.queue.extend(frames)
        self._filled.set()

    def watch(self, macs: Sequence[str]) -> None:
        self.calls.append("watch")

    def stopped(self) -> None:
        self.calls.append("stopped")

    def swallowed(self, received: Sequence[int]) -> Swallowed:
        self.calls.append(f"swallowed {list(received)}")
        return Swallowed(self.was_thrown, self.was_swallowed)

    def thrown(self, before: Sequence[int], after: Sequence[int], hidden: int) -> list[bytes] | None:
        self.calls.append(f"thrown {list(before)} {list(after)} {hidden}")
        return self.was_thrown if after else None

    def pull(self, most: int) -> list[bytes]:
        taken = [self.queue.popleft() for _ in range(min(most, len(self.queue)))]
        if not self.queue:
            self._filled.clear()
        return taken

    async def filled(self) -> None:
        await self._filled.wait()

    async def emptied(self) -> None:
        async with asyncio.timeout(10):
            while self.queue:  # noqa: ASYNC110
                await asyncio.sleep(0.001)  # there is nobody to tell

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
    """Delivers to ``Arrivals`` at once, and brings back what they say."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.broken = False
        """the source knows"""
        self.swallows = False
        """what is sent gets lost, and nobody knows yet"""
        self.hangs = False
        """its other end does not answer a goodbye"""
        self.closed = False
        self.on_data: Callable[[bytes], None]
        self._said: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._ended = asyncio.Event()
        self._taking = asyncio.create_task(self._take())

    async def _take(self) -> None:
        await self.target.arrivals.take(cast(Link, FarEnd(self)))

    def send_data(self, data: bytes) -> bool:
        if self.broken:
            raise Unavailable("the link broke")
        if not self.swallows:
            self.on_data(data)
        return True

    def say(self, message: dict[str, Any]) -> None:
        if not self.swallows and not self.broken:
            self._said.put_nowait(message)

    def breaks(self) -> None:
        self.broken = True
        self._said.put_nowait(None)
        self._ended.set()

    async def until_ended(self) -> None:
        await self._ended.wait()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        said = await self._said.get()
        if said is None:
            raise StopAsyncIteration
        return said

    async def close(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        self.abort()
        await self._taking

    def abort(self) -> None:
        self.closed = True
        self.breaks()


class FarEnd:
    """A link as the target has it."""

    def __init__(self, link: FakeLink) -> None:
        self._link = link

    @property
    def on_data(self) -> Callable[[bytes], None]:
        return self._link.on_data

    @on_data.setter
    def on_data(self, take: Callable[[bytes], None]) -> None:
        self._link.on_data = take

    async def send(self, message: dict[str, Any]) -> None:
        self._link.say(message)

    def abort(self) -> None:
        self._link.breaks()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> dict[str, Any]:
        await self._link.until_ended()
        raise StopAsyncIteration


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
        self.machine = Machine()
        self.forwarder = Forwarder("m-1", [cast(Port, self.port)], [[EVM, POD]], target.dial, quiet_s=0.02, most_s=0.3)


class Machine:
    def __init__(self) -> None:
        self.counts = asyncio.Event()
        """it says how many buffers have been used"""
        self.counts.set()
        self.answers = asyncio.Event()
        self.says = Received(7, (60,))

    async def received(self, nic: int, *, sizes: bool = True, again: bool = False) -> Received:
        await (self.answers if sizes else self.counts).wait()
        return self.says


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
async def source(target: Target, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Source]:
    monkeypatch.setattr(tunnel, "TAKEN_S", 0.001)
    monkeypatch.setattr(tunnel, "_REDIAL_S", 0.001)
    made = Source(target)
    await made.forwarder.connect()
    made.forwarder.watch()
    made.forwarder.stopped(cast(Any, made.machine))
    yield made
    for link in target.links:
        link.hangs = False
    await made.forwarder.close()


async def test_what_was_held_is_sent_at_once_and_in_order(source: Source, target: Target) -> None:
    source.port.was_swallowed = [frame(1)]
    source.port.comes(frame(2, to=EVERYBODY), frame(3, to=POD))
    source.forwarder.begin()
    assert numbers(target.port.got) == [1, 2, 3], "before anything else happens"
    assert target.arrivals.caught_up.is_set()
    source.port.comes(frame(4))
    assert await target.has(4) == [1, 2, 3, 4]
    await source.forwarder.all_taken()
    assert (source.forwarder.held, source.forwarder.forwarded, source.forwarder.lost) == (4, 4, 0)
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


async def test_a_connection_that_breaks_is_made_again(source: Source, target: Target) -> None:
    source.port.comes(frame(1))
    source.forwarder.begin()
    target.links[0].breaks()
    target.unreachable = 3
    source.port.comes(frame(2), frame(3))
    assert await target.has(3) == [1, 2, 3]
    assert len(target.links) == 2


async def test_one_that_was_broken_at_the_commit_too(source: Source, target: Target) -> None:
    target.links[0].breaks()
    source.port.comes(frame(1), frame(2))
    source.forwarder.begin()
    assert await target.has(2) == [1, 2]


async def test_what_was_on_its_way_as_it_broke_comes_once(source: Source, target: Target) -> None:
    source.port.comes(frame(1))
    source.forwarder.begin()  # taken, and whether that was said nobody knows
    target.links[0].swallows = True
    source.port.comes(frame(2), frame(3))
    await source.port.emptied()
    target.links[0].breaks()
    source.port.comes(frame(4))
    assert await target.has(4) == [1, 2, 3, 4]
    await source.forwarder.all_taken()
    assert (source.forwarder.forwarded, source.forwarder.lost) == (4, 0)


async def test_a_target_that_was_restarted_gets_no_frame_twice(source: Source, target: Target) -> None:
    source.port.comes(frame(1))
    source.forwarder.begin()
    await source.forwarder.all_taken()
    target.links[0].swallows = True
    source.port.comes(frame(2))
    await source.port.emptied()
    target.arrivals = Arrivals("m-1", [cast(Port, target.port)])
    target.links[0].breaks()
    source.port.comes(frame(3))
    assert await target.has(2) == [1, 3]
    await source.forwarder.all_taken()
    assert source.forwarder.lost == 1


async def test_what_the_target_never_takes_is_lost_and_holds_nothing_up_for_longer_than_may_be(
    source: Source, target: Target
) -> None:
    source.port.comes(frame(1), frame(2))
    target.links[0].swallows = True
    target.unreachable = 1_000_000
    source.forwarder.begin()
    source.port.has_moved.set()
    began_s = asyncio.get_running_loop().time()
    await source.forwarder.until_moved()
    assert 0.25 < asyncio.get_running_loop().time() - began_s < 2
    assert (source.forwarder.held, source.forwarder.forwarded, source.forwarder.lost) == (2, 0, 2)


async def test_what_is_not_taken_at_once_waits_in_the_tap(
    source: Source, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "_KEPT_BYTES", 50_000)
    target.links[0].swallows = True
    target.unreachable = 1_000_000
    source.forwarder.begin()
    source.port.comes(*(frame(number, size=1000) for number in range(500)))
    await asyncio.sleep(0.05)  # in which more would be pulled
    assert 300 < len(source.port.queue) < 500
    target.unreachable = 0
    target.links[0].breaks()
    assert await target.has(500) == list(range(500))


async def test_what_the_tap_had_no_room_for_since_the_stop_is_lost(source: Source) -> None:
    source.port.overflowed += 7
    source.forwarder.begin()
    source.port.has_moved.set()
    await source.forwarder.until_moved()
    assert source.forwarder.lost == 7


async def test_a_rescue_gives_the_guest_here_what_had_been_sent(source: Source, target: Target) -> None:
    source.port.was_thrown, source.port.was_swallowed = [frame(0)], [frame(1)]
    source.port.comes(frame(2), frame(3, to=EVERYBODY))
    source.forwarder.begin()
    source.port.comes(frame(4))
    assert await target.has(5) == [0, 1, 2, 3, 4]
    await put_back(source)
    assert source.forwarder.lost == 0
    assert numbers(source.port.got) == [0, 2, 3, 4], "1 is in the machine itself, and 0 it has thrown away"
    assert source.port.calls[-1] == "forget"


async def test_a_target_that_hangs_keeps_no_guest_from_running_here(source: Source, target: Target) -> None:
    target.links[0].hangs = True
    async with asyncio.timeout(0.5):
        await put_back(source)
    assert target.links[0].closed


async def put_back(source: Source) -> None:
    await source.forwarder.put_back(cast(Any, source.machine))


async def test_an_abort_before_the_commit_takes_nothing_out(source: Source) -> None:
    source.port.comes(frame(1))
    source.machine.answers.set()
    await asyncio.sleep(0)
    await put_back(source)
    source.machine.says = Received(8, (60, 61))
    await source.forwarder.settled()
    assert (list(source.port.queue), source.port.got) == ([frame(1)], [])
    assert source.port.calls[-2:] == ["thrown [60] [61] 0", "forget"]


async def test_what_the_machine_threw_away_comes_back_once_the_guest_runs_again(source: Source) -> None:
    source.machine.answers.set()
    source.port.was_thrown = [frame(1)]
    source.machine.says = Received(65535, (60,))
    source.forwarder.stopped(cast(Any, source.machine))
    await asyncio.sleep(0)
    await put_back(source)
    await asyncio.sleep(0.01)  # in which it is asked for, in vain
    assert source.port.got == []
    source.machine.says = Received(1, (60, 61, 62))  # the count has gone round
    await source.forwarder.settled()
    assert numbers(source.port.got) == [1]
    assert source.port.calls[-2:] == ["thrown [60] [61, 62] 0", "forget"]


async def test_an_abort_waits_for_what_the_guest_had_received(source: Source) -> None:
    """The hypervisor is told to go back right after the guest has stopped."""
    source.port.was_thrown = [frame(1)]
    source.machine.counts.clear()
    source.forwarder.stopped(cast(Any, source.machine))
    looking = asyncio.create_task(source.forwarder.looked())
    await asyncio.sleep(0.01)  # in which it may not go on
    assert not looking.done()
    source.machine.counts.set()
    await looking
    source.machine.answers.set()
    source.forwarder.goes_back(cast(Any, source.machine))
    source.machine.says = Received(8, (60, 61))
    await put_back(source)
    await source.forwarder.settled()
    assert numbers(source.port.got) == [1]


async def test_an_abort_waits_for_that_but_a_moment(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "_LOOKED_S", 0.01)
    source.machine.counts.clear()
    source.forwarder.stopped(cast(Any, source.machine))
    async with asyncio.timeout(5):
        await source.forwarder.looked()


async def test_what_came_before_the_stop_is_remembered_over_a_burst(source: Source) -> None:
    source.machine.answers.set()
    await asyncio.sleep(0)
    await put_back(source)
    await asyncio.sleep(0.01)  # in which it is looked at
    source.machine.says = Received(17, (71, 72))
    await source.forwarder.settled()
    assert source.port.calls[-2:] == ["thrown [60] [71, 72] 8", "forget"]


async def test_a_guest_that_does_not_run_again_is_waited_for_a_second(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarding, "_BACK_S", 0.05)
    source.machine.answers.set()
    await asyncio.sleep(0)
    await put_back(source)
    await source.forwarder.settled()
    assert source.port.calls[-1] == "forget"


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


async def test_frames_that_follow_closely_go_together(source: Source, target: Target) -> None:
    source.forwarder.begin()
    (link,) = target.links
    messages = 0
    take = link.on_data

    def counted(data: bytes) -> None:
        nonlocal messages
        messages += 1
        take(data)

    link.on_data = counted
    for number in range(100):
        source.port.comes(frame(number))
        await asyncio.sleep(0)
    assert await target.has(100) == list(range(100))
    assert messages < 50


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
    await source.forwarder.all_taken()
    assert source.forwarder.lost == 2
