"""What every network driver must do, seen from a client on the same segment."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator

import pytest

from emp.host import tap
from emp.model.errors import HostError
from emp.model.evm import EvmSpec, Nic, Pod
from emp.network.base import NetworkDriver
from emp.network.l2 import L2Driver
from emp.network.tap_driver import QUEUE_FRAMES
from tests.fakes.values import a_spec
from tests.frames import arp
from tests.segment import Segment, arp_fields, frame, guest_receives, guest_sends, put_on_wire

MAC = "52:54:00:00:00:01"
OTHER_MAC = "52:54:00:00:00:02"
CLIENT = "02:00:00:00:00:fe"


def spec(name: str = "web", nics: int = 1, pods: int = 1) -> EvmSpec:
    return a_spec(
        name,
        nics=tuple(
            Nic(mac=f"52:54:00:00:00:{n:02x}", address=f"10.77.1.{n}", prefix_length=16) for n in range(1, nics + 1)
        ),
        pods=tuple(
            Pod(name=f"pod{n}", mac=f"52:54:00:00:01:{n:02x}", address=f"10.77.2.{n}", prefix_length=16)
            for n in range(1, pods + 1)
        ),
    )


@pytest.fixture(params=["l2"])
async def driver(segment: Segment, request: pytest.FixtureRequest) -> AsyncIterator[NetworkDriver]:
    made = L2Driver(bridge="emp0", uplink="eth0")
    await made.start()
    yield made
    for evm in await made.leftovers():
        await made.remove(evm)
    await made.close()


async def test_a_new_port_is_blocked_in_both_directions(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    for destination in ("ff:ff:ff:ff:ff:ff", CLIENT, "33:33:00:00:00:01", "01:80:c2:00:00:00", "01:80:c2:00:00:0e"):
        guest_sends(port.tap_fd, frame(MAC, destination))
    for destination in ("ff:ff:ff:ff:ff:ff", MAC, "33:33:00:00:00:01"):
        segment.left.send(frame(CLIENT, destination))
    segment.settle()
    assert segment.left.drain() == []
    assert guest_receives(port.tap_fd) == []
    await port.close()


async def test_an_open_port_lets_frames_pass_in_both_directions(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    await port.open()
    guest_sends(port.tap_fd, frame(MAC))
    segment.settle()
    assert segment.left.drain() == [frame(MAC)]
    for data in (frame(CLIENT, MAC), frame(CLIENT)):
        segment.left.send(data)
    segment.settle()
    assert guest_receives(port.tap_fd) == [frame(CLIENT, MAC), frame(CLIENT)]
    await port.close()


async def test_blocking_an_open_port_forgets_what_was_learnt_there(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    guest_sends(port.tap_fd, frame(MAC))
    segment.settle()
    assert len(segment.left.drain()) == 1
    await port.block()
    await port.block()
    guest_sends(port.tap_fd, frame(MAC))
    segment.left.send(frame(CLIENT, MAC))
    segment.settle()
    assert segment.left.drain() == []
    assert guest_receives(port.tap_fd) == []
    await port.close()


async def test_a_port_stays_blocked_whatever_happens_to_other_ports(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    (other,) = await driver.plug(spec("db"))
    await other.open()
    await other.remove()
    segment.ip("left", f"link set {port.interface} down", f"link set {port.interface} up", "link set eth0 down")
    segment.ip("left", "link set eth0 up")
    await driver.start()
    guest_sends(port.tap_fd, frame(MAC))
    segment.settle()
    assert segment.left.drain() == []
    await port.close()


async def test_frames_put_on_a_blocked_tap_wait_for_the_machine(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    held = [frame(CLIENT, MAC, payload=str(number).encode()) for number in range(5000)]
    put_on_wire(port.interface, *held)
    assert guest_receives(port.tap_fd) == held
    assert segment.left.drain() == []
    await port.close()


async def test_an_open_tap_keeps_frames_for_a_machine_that_does_not_run_yet(
    segment: Segment, driver: NetworkDriver
) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    sent = [frame(CLIENT, MAC, payload=str(number).encode()) for number in range(3000)]
    for data in sent:
        segment.left.send(data)
    segment.settle()
    assert guest_receives(port.tap_fd) == sent
    await port.close()


async def test_announcing_tells_the_segment_of_every_address_at_once(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec(pods=9))
    with segment.inside("right"):
        put_on_wire("eth0", frame(MAC))  # so far, it was over there
    await port.open()
    addresses = spec(pods=9).addresses
    took_ms = []
    for _ in range(5):
        began_s = time.perf_counter()
        await port.announce(addresses)
        took_ms.append((time.perf_counter() - began_s) * 1e3)
    segment.settle()
    seen = {arp_fields(data)[1:] for data in segment.left.drain()}
    assert seen == {(mac, ip, ip) for mac, ip in addresses}
    assert min(took_ms) < 20, took_ms
    table = json.loads(segment.command("client", "bridge", "-j", "fdb", "show", "br", "fabric"))
    assert {entry["ifname"] for entry in table if entry["mac"] == MAC} == {"left"}
    table = json.loads(segment.command("left", "bridge", "-j", "fdb", "show", "br", "emp0"))
    assert {entry["ifname"] for entry in table if entry["mac"] == MAC} == {port.interface}
    await port.close()


async def test_the_guest_is_asked_for_its_groups_and_nobody_else(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    await port.announce([(MAC, "10.77.1.1")])
    segment.settle()
    asked = [data[:6].hex(":") for data in guest_receives(port.tap_fd)]
    assert asked == ["01:00:5e:00:00:01", "33:33:00:00:00:01"]
    assert {data[:6].hex(":") for data in segment.left.drain()} == {"ff:ff:ff:ff:ff:ff"}
    await port.close()


async def test_announcing_is_repeated_until_the_port_is_blocked(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    tasks = asyncio.all_tasks()
    await port.announce([(MAC, "10.77.1.1")])
    seen: list[bytes] = []
    async with asyncio.timeout(10):
        while len(seen) < 6:  # both ARP forms, at 0, 50 and 150 ms
            await asyncio.sleep(0.02)
            seen += segment.left.drain()
    await port.block()
    await port.open()
    assert asyncio.all_tasks() == tasks
    await asyncio.sleep(0.4)  # nothing tells that nothing comes: the next repeats would be due by now
    segment.settle()
    assert segment.left.drain() == []
    await port.close()


async def test_a_blocked_port_announces_nothing(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.announce([(MAC, "10.77.1.1"), (MAC, "fd00::1")])
    await asyncio.sleep(0.1)  # nothing tells that nothing comes: two repeats would be due by now
    segment.settle()
    assert segment.left.drain() == []
    await port.remove()


async def test_announcing_on_a_tap_that_was_taken_away_is_an_error(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    await driver.remove("web")
    with pytest.raises(HostError, match=port.interface):
        await port.announce([(MAC, "10.77.1.1")])
    await port.close()


async def test_a_guest_speaks_as_what_it_declares_and_what_it_is_allowed(
    segment: Segment, driver: NetworkDriver
) -> None:
    """Whichever card a frame comes from: the EVM's addresses are its own on all of them."""
    ports = await driver.plug(spec(nics=2))
    for port in ports:
        await port.open()
    own = [arp(MAC, "10.77.1.1", "10.77.0.1"), arp("52:54:00:00:01:01", "10.77.2.1", "10.77.0.1")]
    others = [arp(MAC, "10.77.3.3", "10.77.0.1"), arp("52:54:00:00:00:77", "10.77.1.1", "10.77.0.1")]
    for data in (*own, *others):
        for port in ports:
            guest_sends(port.tap_fd, data)
    segment.settle()
    assert sorted(segment.left.drain()) == sorted(2 * own)
    for port in ports:
        assert port.traffic().spoofed_frames == 2
        await port.allow(["10.77.1.1", "10.77.3.3"])
        for data in (*own, *others):
            guest_sends(port.tap_fd, data)
    segment.settle()
    assert sorted(segment.left.drain()) == sorted(2 * [own[0], others[0]])
    assert [port.traffic().spoofed_frames for port in ports] == [4, 4]
    for port in ports:
        await port.remove()
        await port.remove()


async def test_removing_an_older_port_leaves_the_rules_of_the_one_in_its_place(
    segment: Segment, driver: NetworkDriver
) -> None:
    (stale,) = await driver.plug(spec())
    (port,) = await driver.plug(spec())
    await stale.remove()
    await port.open()
    guest_sends(port.tap_fd, arp(MAC, "10.77.3.3", "10.77.0.1"))
    segment.settle()
    assert segment.left.drain() == []
    assert port.traffic().spoofed_frames == 1
    await port.remove()


async def test_a_restarted_agent_finds_the_rules_and_the_counts(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    await port.allow(["10.77.3.3"])
    machine = os.dup(port.tap_fd)
    guest_sends(machine, arp(MAC, "10.77.1.1", "10.77.0.1"))
    await port.close()
    await driver.start()
    guest_sends(machine, arp(MAC, "10.77.1.1", "10.77.0.1"))
    (adopted,) = await driver.adopt(spec(), [os.dup(machine)])
    guest_sends(machine, arp(MAC, "10.77.3.3", "10.77.0.1"))
    segment.settle()
    assert segment.left.drain() == [arp(MAC, "10.77.3.3", "10.77.0.1")]
    assert (adopted.traffic().spoofed_frames, adopted.traffic().sent_frames) == (2, 1)
    await adopted.remove()
    os.close(machine)


async def test_what_a_guest_speaks_for_is_heard_allowed_or_not(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    port.listen(lambda mac, ip: heard.put_nowait((mac, ip)))
    guest_sends(port.tap_fd, frame(MAC))
    guest_sends(port.tap_fd, arp(MAC, "10.77.1.1", "10.77.0.1"))
    guest_sends(port.tap_fd, arp(MAC, "10.77.3.3", "10.77.0.1"))
    async with asyncio.timeout(5):
        assert [await heard.get() for _ in range(2)] == [(MAC, "10.77.1.1"), (MAC, "10.77.3.3")]
    await port.close()
    assert heard.empty()


async def test_frames_are_counted_as_the_guest_sees_them(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    for _ in range(3):
        guest_sends(port.tap_fd, frame(MAC))
    guest_sends(port.tap_fd, frame(CLIENT))
    for _ in range(5):
        segment.left.send(frame(CLIENT, MAC))
    segment.settle()
    assert len(guest_receives(port.tap_fd)) == 5
    seen = port.traffic()
    assert (seen.sent_frames, seen.received_frames, seen.spoofed_frames, seen.dropped_frames) == (3, 5, 1, 0)
    assert seen.received_bytes >= 5 * len(frame(CLIENT))
    for _ in range(QUEUE_FRAMES + 2000):
        segment.left.send(frame(CLIENT, MAC))
    segment.settle()
    lost = port.traffic().dropped_frames
    assert 0 < lost == QUEUE_FRAMES + 2000 - len(guest_receives(port.tap_fd))
    await port.remove()
    with pytest.raises(HostError):
        port.traffic()


async def test_the_tap_lives_as_long_as_agent_or_machine(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    machines = os.dup(port.tap_fd)
    await port.close()
    assert await driver.leftovers() == {"web"}
    assert tap.tap_interface(machines) == port.interface
    os.close(machines)
    assert await driver.leftovers() == frozenset()


@pytest.mark.parametrize("was_open", [True, False])
async def test_a_restarted_agent_gets_the_ports_back_as_they_were(
    segment: Segment, driver: NetworkDriver, was_open: bool
) -> None:
    ports = await driver.plug(spec(nics=2))
    if was_open:
        for port in ports:
            await port.open()
    machines = [os.dup(port.tap_fd) for port in ports]
    for port in ports:
        await port.close()
    put_on_wire(ports[0].interface, frame(CLIENT, MAC))

    copies = [os.dup(descriptor) for descriptor in machines]
    adopted = await driver.adopt(spec(nics=2), list(reversed(copies)))
    assert [port.interface for port in adopted] == [port.interface for port in ports]
    assert guest_receives(adopted[0].tap_fd) == [frame(CLIENT, MAC)]
    guest_sends(machines[1], frame(OTHER_MAC))
    segment.settle()
    assert segment.left.drain() == ([frame(OTHER_MAC)] if was_open else [])

    for port in adopted:
        await port.remove()
    for descriptor in machines:
        os.close(descriptor)
    assert await driver.leftovers() == frozenset()


async def test_adopting_something_else_is_refused(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec("db"))
    with pytest.raises(HostError, match="web"):
        await driver.adopt(spec("web"), [os.dup(port.tap_fd)])
    with pytest.raises(HostError):
        await driver.adopt(spec("db"), [os.open("/dev/null", os.O_RDWR)])
    await port.remove()


async def test_plugging_again_replaces_what_was_left(segment: Segment, driver: NetworkDriver) -> None:
    (stale,) = await driver.plug(spec())
    (other,) = await driver.plug(spec("db"))
    (port,) = await driver.plug(spec())
    assert await driver.leftovers() == {"web", "db"}
    with pytest.raises(HostError):
        await stale.announce([(MAC, "10.77.1.1")])
    await stale.remove()
    await port.open()
    guest_sends(port.tap_fd, frame(MAC))
    segment.settle()
    assert segment.left.drain() == [frame(MAC)]
    await port.close()
    await other.close()


async def test_removing_takes_everything_and_is_idempotent(segment: Segment, driver: NetworkDriver) -> None:
    ports = await driver.plug(spec(nics=2))
    (other,) = await driver.plug(spec("db"))
    machines = [os.dup(port.tap_fd) for port in ports]
    await driver.remove("web")
    await driver.remove("web")
    assert await driver.leftovers() == {"db"}
    for port in ports:
        await port.remove()
        await port.remove()
    await other.remove()
    links = json.loads(segment.command("left", "ip", "-j", "link"))
    assert {link["ifname"] for link in links} == {"lo", "eth0", "emp0"}
    for descriptor in machines:
        os.close(descriptor)


async def test_the_node_itself_says_nothing(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    await asyncio.sleep(1.5)  # duplicate address detection, MLD reports and router solicitations come within 1 s
    segment.settle()
    assert segment.left.drain() == []
    assert guest_receives(port.tap_fd) == []
    await port.close()


async def test_opening_is_fast_enough_for_the_blackout(segment: Segment, driver: NetworkDriver) -> None:
    (port,) = await driver.plug(spec())
    took_ms = []
    for _ in range(50):
        await port.block()
        began_s = time.perf_counter()
        await port.open()
        took_ms.append((time.perf_counter() - began_s) * 1e3)
    print(f"open: median {statistics.median(took_ms):.2f} ms, worst {max(took_ms):.2f} ms")
    assert min(took_ms) < 5
    await port.close()
