"""Which frame a machine has swallowed as its guest stopped, on a real tap: ``emp.network.held`` and its port."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from emp.host import netlink, packet, tap
from emp.host.run import run_sync
from emp.hypervisor.qemu.command_line import RECEIVE_BUFFERS
from emp.network.tap_port import TapPort
from tests.segment import Segment

TAP = "emptest0"
GUEST = bytes.fromhex("525400000001")
OURS = bytes.fromhex("02454d500001")
"""sender of marks and spacers"""
SWALLOWED_BY_QEMU = 1


def frame(number: int, *, to: bytes = GUEST) -> bytes:
    return packet.PLAIN + to + bytes.fromhex("020000000009") + b"\x88\xb6" + number.to_bytes(46, "big")


def numbers(frames: list[bytes]) -> list[int]:
    return [int.from_bytes(one[packet.HEADER_BYTES + 14 :], "big") for one in frames]


@pytest.fixture
async def port(segment: Segment) -> AsyncIterator[TapPort]:
    made = TapPort(TAP, 0, tap.open_tap(TAP), macs=())
    netlink.set_ipv6(TAP, disable_ipv6=1)  # it would solicit routers by itself
    run_sync("ip", "link", "set", TAP, "up", "txqueuelen", "3000")
    yield made
    await made.close()


@pytest.fixture
def network(port: TapPort) -> Iterator[Network]:
    made = Network()
    yield made
    made.close()


class Network:
    """Sends to the guest from the other side of the tap."""

    def __init__(self) -> None:
        self._socket = packet.open_packet(TAP, program=None)

    def send(self, *sent: int, to: bytes = GUEST) -> None:
        for number in sent:
            self._socket.send(frame(number, to=to))

    def close(self) -> None:
        self._socket.close()


def machine_takes(port: TapPort, count: int) -> list[int]:
    return numbers(tap.read_frames(port.tap_fd, count))


def swallowed(port: TapPort, received: Sequence[int] = ()) -> list[bytes]:
    """What the machine took and did not give to its guest, in order."""
    found = port.swallowed(received)
    return found.thrown + found.queued


async def left(port: TapPort, *, at_once: int = 2) -> list[int]:
    """What is pulled until nothing more comes; what is ours is nobody's number."""
    found: list[bytes] = []
    with contextlib.suppress(TimeoutError):
        while True:
            await asyncio.wait_for(port.filled(), 0.05)
            found += port.pull(at_once)
    return numbers([one for one in found if one[packet.SENDER] != OURS])


async def test_nothing_was_on_its_way(port: TapPort, network: Network) -> None:
    port.watch([])
    network.send(1, 2, 3)
    assert machine_takes(port, 3) == [1, 2, 3]
    port.stopped()
    tap.read_frames(port.tap_fd, SWALLOWED_BY_QEMU)  # it is the mark
    network.send(4, 5)
    assert swallowed(port) == []
    assert await left(port) == [4, 5]


async def test_the_first_frame_after_the_stop_is_the_one(port: TapPort, network: Network) -> None:
    port.watch([])
    network.send(1, 2, 3)
    assert machine_takes(port, 3) == [1, 2, 3]
    network.send(4)
    assert machine_takes(port, SWALLOWED_BY_QEMU) == [4]
    network.send(5, 6)
    port.stopped()
    network.send(7)
    assert numbers(swallowed(port)) == [4]
    assert await left(port) == [5, 6, 7]


async def test_it_may_have_come_before_the_stop(port: TapPort, network: Network) -> None:
    """QEMU had not come to it when its guest stopped."""
    port.watch([])
    network.send(1, 2, 3, 4)
    assert machine_takes(port, 2) == [1, 2]
    port.stopped()
    assert machine_takes(port, SWALLOWED_BY_QEMU) == [3]
    assert numbers(swallowed(port)) == [3]
    assert await left(port) == [4]


async def test_a_long_brownout_keeps_the_newest(port: TapPort, network: Network) -> None:
    port.watch([])
    for round_ in range(40):
        network.send(*range(1000 * round_, 1000 * round_ + 500))
        assert len(machine_takes(port, 500)) == 500
        await asyncio.sleep(0.006)  # what the port looks at goes on beside
    network.send(50_000)
    assert machine_takes(port, SWALLOWED_BY_QEMU) == [50_000]
    port.stopped()
    assert numbers(swallowed(port)) == [50_000]
    assert await left(port) == []


@pytest.fixture
def long_queue(port: TapPort) -> None:
    run_sync("ip", "link", "set", TAP, "txqueuelen", "10000")


@pytest.mark.parametrize("thrown_away", [0, 1])
async def test_it_is_found_before_a_long_queue(
    port: TapPort, network: Network, ring: Ring, long_queue: None, thrown_away: int
) -> None:
    """The guest lags behind: what waits for it is more than is looked at in the blackout."""
    await watched_traffic(port, network, ring, 300)
    lost = list(range(1000, 1000 + thrown_away))
    rest = list(range(2001, 8000))
    network.send(*lost, 2000, *rest)
    assert machine_takes(port, thrown_away + SWALLOWED_BY_QEMU) == [*lost, 2000]
    port.stopped()
    network.send(8000)
    assert numbers(swallowed(port, ring.received)) == [*lost, 2000]
    assert await left(port, at_once=500) == [*rest, 8000]


async def test_it_is_found_before_a_queue_that_has_overflowed(port: TapPort, network: Network, ring: Ring) -> None:
    await watched_traffic(port, network, ring, 300)
    network.send(2000, *range(2001, 8000))
    assert machine_takes(port, SWALLOWED_BY_QEMU) == [2000]
    port.stopped()
    assert numbers(swallowed(port, ring.received)) == [2000]
    assert await left(port, at_once=500) == list(range(2001, 5000))


async def test_it_is_found_though_a_frame_behind_it_has_a_tag(port: TapPort, network: Network) -> None:
    """The kernel shows a tag (IEEE 802.1Q, of a priority alone too) to who reads the tap, and to who watches it not."""
    port.watch([])
    run_sync("ip", "link", "add", "emptest1", "type", "bridge")
    run_sync("ip", "link", "add", "emptest2", "type", "veth", "peer", "name", "emptest3")
    for made in ("emptest1", "emptest2", "emptest3"):
        netlink.set_ipv6(made, disable_ipv6=1)
        run_sync("ip", "link", "set", made, "up")
    for joined in (TAP, "emptest2"):
        run_sync("ip", "link", "set", joined, "master", "emptest1")
    try:
        tagged, at = frame(5), packet.HEADER_BYTES + 12
        with packet.open_packet("emptest3", program=None) as beyond:
            async with asyncio.timeout(10):
                while not machine_takes(port, 100):
                    beyond.send(frame(0))
                    await asyncio.sleep(0.01)  # the kernel lets the bridge forward when it has the time
            machine_takes(port, 100)
            beyond.send(frame(4))
            beyond.send(tagged[:at] + b"\x81\x00\xa0\x00" + tagged[at:])
            beyond.send(frame(6))
        assert machine_takes(port, SWALLOWED_BY_QEMU) == [4]
        port.stopped()
        assert numbers(swallowed(port)) == [4]
    finally:
        run_sync("ip", "link", "del", "emptest2")
        run_sync("ip", "link", "del", "emptest1")


async def test_after_an_abort_the_guest_finds_everything(port: TapPort, network: Network) -> None:
    port.watch([])
    port.stopped()
    network.send(1, 2)
    port.forget()
    taken = tap.read_frames(port.tap_fd, 10)
    assert taken[0][packet.RECEIVER] != GUEST, "the mark is for nobody"
    assert numbers(taken[1:]) == [1, 2]


async def test_what_was_read_up_to_the_mark_is_put_back(port: TapPort, network: Network) -> None:
    port.watch([])
    network.send(1, 2)
    assert machine_takes(port, SWALLOWED_BY_QEMU) == [1]
    port.stopped()
    assert len(swallowed(port)) == 1
    port.forget()
    assert machine_takes(port, 10) == [2]


async def test_a_watch_that_has_begun_can_begin_anew(port: TapPort, network: Network) -> None:
    port.watch([])
    network.send(1)
    port.watch([])
    assert machine_takes(port, 1) == [1]
    network.send(2)
    assert machine_takes(port, SWALLOWED_BY_QEMU) == [2]
    port.stopped()
    assert numbers(swallowed(port)) == [2]


BROADCAST = b"\xff" * 6


async def test_a_broadcast_that_came_by_itself_is_not_put_again(port: TapPort, network: Network) -> None:
    port.expect()
    network.send(1, 2, to=BROADCAST)
    network.send(3)
    assert port.put([frame(1, to=BROADCAST), frame(9, to=BROADCAST), frame(1, to=BROADCAST), frame(3)]) == 4
    assert machine_takes(port, 20) == [1, 2, 3, 9, 1, 3], "unicast comes one way only"


async def test_what_the_tap_does_not_take_is_counted_out(port: TapPort) -> None:
    run_sync("ip", "link", "set", TAP, "down")
    assert port.put([frame(1)]) == 0


async def test_an_offloaded_frame_keeps_its_header(port: TapPort, network: Network) -> None:
    """The checksum that a sender left to the hardware: flags 1, from byte 34, to be put 6 bytes further (UDP)."""
    offloaded = bytes((1, 0, 0, 0, 0, 0, 34, 0, 6, 0)) + frame(7)[packet.HEADER_BYTES :]
    port.put([offloaded])
    (read,) = tap.read_frames(port.tap_fd, 5)
    assert len(read) == len(offloaded) and read[packet.RECEIVER] == GUEST


class Ring:
    """What the guest's ring says of the frames that the machine has given to it."""

    def __init__(self, port: TapPort) -> None:
        self._port = port
        self.received: list[int] = [0] * RECEIVE_BUFFERS
        self.before: list[int] = []
        self.buffers = 0

    def gets(self, count: int, *, buffer_bytes: int = 4096, drops: int = 0) -> list[int]:
        """The machine takes frames, gives them to the guest, but for ``drops`` that its filter stops."""
        frames = tap.read_frames(self._port.tap_fd, count + drops)
        for one in frames[drops:]:
            size = 12 + len(one) - packet.HEADER_BYTES
            before = len(self.received)
            self.received += [buffer_bytes] * (size // buffer_bytes) + [size % buffer_bytes] * (size % buffer_bytes > 0)
            self.buffers += len(self.received) - before
        self.received = self.received[-RECEIVE_BUFFERS:]
        return numbers(frames)


@pytest.fixture
def ring(port: TapPort) -> Ring:
    return Ring(port)


WATCHED = ["52:54:00:00:00:01"]


async def watched_traffic(port: TapPort, network: Network, ring: Ring, frames: int) -> None:
    """Pre-copy begins, and the guest gets so many frames."""
    port.watch(WATCHED)
    ring.gets(1)
    for number in range(frames):
        network.send(number)
        if number % 50 == 49:
            await asyncio.sleep(0.012)  # two looks, and a spacer: what it is for takes its turn
            ring.gets(100)
    ring.gets(1000)


@pytest.mark.parametrize("before", [0, 1, 30, 1200])
@pytest.mark.parametrize("thrown_away", [0, 1, 2])
async def test_frames_that_the_machine_threw_away_are_known(
    port: TapPort, network: Network, ring: Ring, before: int, thrown_away: int
) -> None:
    """All frames are as long as each other, so that only the spacers tell them apart."""
    await watched_traffic(port, network, ring, before)
    lost = list(range(1000, 1000 + thrown_away))
    network.send(*lost, 2000)
    assert machine_takes(port, thrown_away + SWALLOWED_BY_QEMU) == [*lost, 2000]
    network.send(2001)
    port.stopped()
    network.send(2002)
    assert numbers(swallowed(port, ring.received)) == [*lost, 2000]
    assert await left(port) == [2001, 2002]


async def test_frames_that_fill_several_buffers_or_none_are_counted_right(
    port: TapPort, network: Network, ring: Ring
) -> None:
    port.watch(WATCHED)
    ring.gets(1)
    network.send(1, 2)
    ring.gets(2, buffer_bytes=40)
    network.send(3, to=BROADCAST)
    ring.gets(0, drops=1)
    network.send(4, 5)
    assert machine_takes(port, 2) == [4, 5]
    port.stopped()
    assert numbers(swallowed(port, ring.received)) == [4, 5]


# -- on an abort the guest runs again, and gets what the machine has not thrown away


def thrown(port: TapPort, ring: Ring, at_stop: int) -> list[int] | None:
    since = ring.buffers - at_stop
    if not since:
        ring.before = list(ring.received)
    known = min(since, len(ring.received))
    found = port.thrown(ring.before, ring.received[len(ring.received) - known :], since - known)
    return None if found is None else numbers(found)


@pytest.mark.parametrize("before", [1, 30, 1200])
@pytest.mark.parametrize("count", [0, 1, 2])
async def test_what_was_thrown_away_is_found_when_the_guest_runs_again(
    port: TapPort, network: Network, ring: Ring, before: int, count: int
) -> None:
    """All frames are as long as each other."""
    await watched_traffic(port, network, ring, before)
    lost = list(range(1000, 1000 + count))
    network.send(*lost, 2000)
    assert machine_takes(port, count) == lost
    at_stop = ring.buffers
    network.send(2001)
    port.stopped()
    network.send(2002)
    assert thrown(port, ring, at_stop) is None, "the guest does not run yet"
    ring.gets(2)
    assert thrown(port, ring, at_stop) is None, "it has not got the mark"
    ring.gets(2)
    network.send(2003)
    ring.gets(1)
    assert thrown(port, ring, at_stop) == lost
    port.forget()
    assert tap.read_frames(port.tap_fd, 10) == [], "nothing else is put back"


async def test_what_the_filter_stopped_is_not_taken_for_thrown_away(
    port: TapPort, network: Network, ring: Ring
) -> None:
    port.watch(WATCHED)
    ring.gets(1)
    network.send(1)
    ring.gets(1)
    network.send(2)
    assert machine_takes(port, 1) == [2]
    at_stop = ring.buffers
    network.send(3)
    network.send(4, to=BROADCAST)
    network.send(5)
    port.stopped()
    assert thrown(port, ring, at_stop) is None
    ring.gets(1, buffer_bytes=40)
    ring.gets(0, drops=1)
    ring.gets(2)
    assert thrown(port, ring, at_stop) == [2]


@pytest.mark.parametrize("burst", [200, 1000, 1025, 1100, 2500])
@pytest.mark.parametrize("count", [0, 1])
async def test_it_is_found_behind_more_than_the_ring_remembers(
    port: TapPort, network: Network, ring: Ring, burst: int, count: int
) -> None:
    port.watch(WATCHED)
    ring.gets(1)
    network.send(*range(10))
    ring.gets(10)
    lost = list(range(1000, 1000 + count))
    network.send(*lost)
    assert machine_takes(port, count) == lost
    at_stop = ring.buffers
    port.stopped()
    assert thrown(port, ring, at_stop) is None
    for number in range(burst):
        network.send(number)
        if number % 50 == 49:
            await asyncio.sleep(0.012)  # the guest stands still, and spacers go in
    ring.gets(4000)
    assert thrown(port, ring, at_stop) == lost


async def test_no_spacer_is_taken_for_one_that_the_ring_has_forgotten(
    port: TapPort, network: Network, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.choice", min)  # lengths that may come again do
    await test_it_is_found_behind_more_than_the_ring_remembers(port, network, ring, 2500, 1)


async def test_in_doubt_nothing_is_given_twice(port: TapPort, network: Network, ring: Ring) -> None:
    """More has come since than the ring remembers, and what a filter may have stopped is among it."""
    port.watch(WATCHED)
    ring.gets(1)
    network.send(1)
    assert machine_takes(port, 1) == [1]
    at_stop = ring.buffers
    port.stopped()
    assert thrown(port, ring, at_stop) is None
    network.send(2, to=bytes.fromhex("01005e000001"))
    for number in range(1100):
        network.send(number)
        if number % 50 == 49:
            await asyncio.sleep(0.012)
    ring.gets(2000)
    assert thrown(port, ring, at_stop) == []


async def test_without_an_earlier_look_nothing_is_given_twice(port: TapPort, network: Network, ring: Ring) -> None:
    port.watch(WATCHED)
    ring.gets(1)
    network.send(1)
    assert machine_takes(port, 1) == [1]
    at_stop = ring.buffers
    port.stopped()
    network.send(*range(1100))
    ring.gets(1200)
    assert thrown(port, ring, at_stop) == []
