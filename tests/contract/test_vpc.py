"""What the vpc driver does with packets, seen from a client that routes to the node, and from the guest at its tap."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing

import pytest

from emp.model.errors import HostError, Refused
from emp.model.evm import ROUTED_GATEWAY, EvmSpec, Ipv6, Nic, Pod
from emp.network.vpc import GATEWAY_MAC, VpcDriver
from tests.fakes.values import a_spec
from tests.segment import Segment, arp_fields, guest_receives, guest_sends, mac_bytes, put_on_wire

NODE, OTHER_NODE, CLIENT = "10.77.0.11", "10.77.0.12", "10.77.0.4"
ADDRESS, POD = "10.77.1.1", "10.77.2.1"
MAC, POD_MAC = "52:54:00:00:00:01", "02:00:0a:4d:02:01"
NOBODY = "00:00:00:00:00:00"
BROADCAST = "ff:ff:ff:ff:ff:ff"
PORT = 4000


def spec(name: str = "web", *, pods: int = 1) -> EvmSpec:
    return a_spec(
        name,
        nics=(Nic(mac=MAC, address=ADDRESS, prefix_length=16),),
        pods=tuple(
            Pod(name=f"p{n}", mac=f"02:00:0a:4d:02:{n:02x}", address=f"10.77.2.{n}", prefix_length=16)
            for n in range(1, pods + 1)
        ),
    )


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = Segment()
    try:
        for node, address in (("left", NODE), ("right", OTHER_NODE)):
            made.ip(node, f"addr add {address}/16 dev eth0")
        made.ip("client", f"addr add {CLIENT}/16 dev fabric", f"route add {ADDRESS} via {NODE}")
        made.ip("client", f"route add {POD} via {NODE}")
        with made.inside("left"):
            yield made
    finally:
        made.close()


@pytest.fixture
async def driver(segment: Segment) -> AsyncIterator[VpcDriver]:
    made = VpcDriver(uplink="eth0")
    await made.start()
    yield made
    for evm in await made.leftovers():
        await made.remove(evm)
    await made.close()


def arp(sender_mac: str, sender: str, target: str) -> bytes:
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac_bytes(sender_mac) + socket.inet_aton(sender)
    head = mac_bytes(BROADCAST) + mac_bytes(sender_mac) + b"\x08\x06"
    return (head + body + mac_bytes(NOBODY) + socket.inet_aton(target)).ljust(60, b"\0")


def packet(source: str, target: str, payload: bytes, *, mac: str = MAC, to: str = GATEWAY_MAC) -> bytes:
    """Return a UDP datagram in a frame; its checksum is left out, as RFC 768 allows."""
    datagram = struct.pack("!HHHH", PORT, PORT, 8 + len(payload), 0) + payload
    addresses = socket.inet_aton(source) + socket.inet_aton(target)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0) + addresses
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)
    return mac_bytes(to) + mac_bytes(mac) + b"\x08\x00" + header[:10] + checksum + addresses + datagram


def udp(address: str) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    made.bind((address, PORT))
    return made


def heard(receiver: socket.socket) -> list[tuple[bytes, str]]:
    found: list[tuple[bytes, str]] = []
    while True:
        try:
            data, (address, _) = receiver.recvfrom(2048)
        except BlockingIOError:
            return found
        found.append((data, address))


def received(tap_fd: int, *, within_s: float = 2.0) -> list[bytes]:
    """Return what the guest gets, once something has come."""
    deadline = time.monotonic() + within_s
    while not (found := guest_receives(tap_fd)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


async def test_a_blocked_port_lets_nothing_pass_and_answers_nothing(segment: Segment, driver: VpcDriver) -> None:
    (port,) = await driver.plug(spec())
    with segment.inside("client"):
        client = udp(CLIENT)
    with closing(client), closing(udp(NODE)) as node:
        for target in (CLIENT, NODE, OTHER_NODE):
            guest_sends(port.tap_fd, arp(MAC, ADDRESS, target))
            guest_sends(port.tap_fd, packet(ADDRESS, target, b"early"))
        guest_sends(port.tap_fd, arp(MAC, "0.0.0.0", ADDRESS))
        client.sendto(b"in", (ADDRESS, PORT))
        segment.settle()
        assert heard(client) == []
        assert heard(node) == []
    assert guest_receives(port.tap_fd) == []
    assert not [data for data in segment.left.drain() if mac_bytes(MAC) in data or socket.inet_aton(ADDRESS) in data]
    await port.close()


async def test_an_open_port_is_reached_and_reaches_everybody_by_one_mac(segment: Segment, driver: VpcDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    await port.open()
    for target in (CLIENT, OTHER_NODE, "10.77.0.1", NODE):
        guest_sends(port.tap_fd, arp(MAC, ADDRESS, target))
        (answer,) = received(port.tap_fd)
        assert arp_fields(answer)[:3] == (2, GATEWAY_MAC, target), "the very same, whatever is asked for"
    with segment.inside("client"):
        client = udp(CLIENT)
    with closing(client):
        guest_sends(port.tap_fd, packet(ADDRESS, CLIENT, b"out"))
        guest_sends(port.tap_fd, packet(POD, CLIENT, b"of the pod", mac=POD_MAC))
        segment.settle()
        deadline = time.monotonic() + 2
        found: list[tuple[bytes, str]] = []
        while len(found) < 2 and time.monotonic() < deadline:
            found += heard(client)
            await asyncio.sleep(0.01)
        assert sorted(found) == [(b"of the pod", POD), (b"out", ADDRESS)]
        client.sendto(b"in", (ADDRESS, PORT))
        client.sendto(b"to the pod", (POD, PORT))
        frames = received(port.tap_fd)
        while len(frames) < 2 and time.monotonic() < deadline + 2:
            frames += guest_receives(port.tap_fd)
            await asyncio.sleep(0.01)
    assert {frame[:12] for frame in frames} == {
        mac_bytes(MAC) + mac_bytes(GATEWAY_MAC),
        mac_bytes(POD_MAC) + mac_bytes(GATEWAY_MAC),
    }, "nobody had to ask for the MACs"
    await port.close()


async def test_another_node_answers_by_the_same_mac(segment: Segment, driver: VpcDriver) -> None:
    with segment.inside("right"):
        other = VpcDriver(uplink="eth0")
        await other.start()
        (port,) = await other.plug(spec())
        await port.open()
        guest_sends(port.tap_fd, arp(MAC, ADDRESS, CLIENT))
        (answer,) = received(port.tap_fd)
        assert arp_fields(answer)[1] == GATEWAY_MAC
        await port.remove()
        await other.close()


async def test_a_guest_cannot_use_an_address_that_is_not_its_own(segment: Segment, driver: VpcDriver) -> None:
    (port,) = await driver.plug(spec())
    (other,) = await driver.plug(spec("db").model_copy(update={"pods": (), "nics": (_nic("10.77.1.9"),)}))
    await port.open()
    await other.open()
    with segment.inside("client"):
        client = udp(CLIENT)
    with closing(client):
        for stranger in ("10.77.1.9", "10.77.3.3", NODE, "0.0.0.0"):
            guest_sends(port.tap_fd, arp(MAC, stranger, CLIENT))
            guest_sends(port.tap_fd, packet(stranger, CLIENT, b"forged"))
        guest_sends(port.tap_fd, packet(ADDRESS, CLIENT, b"own"))
        segment.settle()
        deadline = time.monotonic() + 2
        found: list[tuple[bytes, str]] = []
        while not found and time.monotonic() < deadline:
            found = heard(client)
            await asyncio.sleep(0.01)
        assert found == [(b"own", ADDRESS)], "the last of them came, so the others did not"
        client.sendto(b"for db", ("10.77.1.9", PORT))
    assert not guest_receives(port.tap_fd), "what is for the address's owner did not come here"
    await port.close()
    await other.close()


def _nic(address: str) -> Nic:
    return Nic(mac="52:54:00:00:00:09", address=address, prefix_length=16)


async def test_nobody_claims_the_guests_own_address(segment: Segment, driver: VpcDriver) -> None:
    """It may look whether its address is taken (RFC 5227), or ask for its own pod: the node does not answer."""
    (port,) = await driver.plug(spec())
    await port.open()
    for sender, target in (("0.0.0.0", ADDRESS), (ADDRESS, ADDRESS), (ADDRESS, POD)):
        guest_sends(port.tap_fd, arp(MAC, sender, target))
    guest_sends(port.tap_fd, arp(MAC, ADDRESS, CLIENT))
    (answer,) = received(port.tap_fd)
    assert arp_fields(answer)[2] == CLIENT
    await port.close()


async def test_blocking_an_open_port_cuts_both_ways(segment: Segment, driver: VpcDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    await port.block()
    await port.block()
    with segment.inside("client"):
        client = udp(CLIENT)
    with closing(client):
        guest_sends(port.tap_fd, packet(ADDRESS, CLIENT, b"out"))
        client.sendto(b"in", (ADDRESS, PORT))
        segment.settle()
        assert heard(client) == []
    assert guest_receives(port.tap_fd) == []
    await port.close()


async def test_frames_put_on_a_blocked_tap_wait_for_the_machine(segment: Segment, driver: VpcDriver) -> None:
    (port,) = await driver.plug(spec())
    held = [packet(CLIENT, ADDRESS, str(number).encode(), mac=GATEWAY_MAC, to=MAC) for number in range(5000)]
    put_on_wire(port.interface, *held)
    assert guest_receives(port.tap_fd) == held
    await port.close()


async def test_an_open_tap_keeps_packets_for_a_machine_that_does_not_run_yet(
    segment: Segment, driver: VpcDriver
) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    with segment.inside("client"):
        client = udp(CLIENT)
    with closing(client):
        for number in range(1000):
            client.sendto(str(number).encode(), (ADDRESS, PORT))
    segment.settle()
    found: list[bytes] = []
    deadline = time.monotonic() + 5
    while len(found) < 1000 and time.monotonic() < deadline:
        found += guest_receives(port.tap_fd)
    assert [frame[42:] for frame in found] == [str(number).encode() for number in range(1000)]
    await port.close()


@pytest.mark.parametrize("was_open", [True, False])
async def test_a_restarted_agent_gets_the_port_back_as_it_was(
    segment: Segment, driver: VpcDriver, was_open: bool
) -> None:
    (port,) = await driver.plug(spec())
    if was_open:
        await port.open()
    machine = os.dup(port.tap_fd)
    await port.close()
    again = VpcDriver(uplink="eth0")
    await again.start()
    (adopted,) = await again.adopt(spec(), [os.dup(machine)])
    guest_sends(machine, arp(MAC, ADDRESS, CLIENT))
    assert bool(received(machine, within_s=2.0 if was_open else 0.2)) is was_open
    await adopted.block()
    guest_sends(machine, arp(MAC, ADDRESS, CLIENT))
    assert not received(machine, within_s=0.2), "it knows what is behind the port"
    await adopted.remove()
    os.close(machine)
    assert await again.leftovers() == frozenset()
    await again.close()


async def test_removing_leaves_no_route_behind(segment: Segment, driver: VpcDriver) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    await driver.remove("web")
    await port.remove()
    assert "10.77.1.1" not in segment.command("left", "ip", "route")
    assert await driver.leftovers() == frozenset()


async def test_an_ipv6_address_is_refused_where_the_node_has_none(segment: Segment, driver: VpcDriver) -> None:
    six = Ipv6(address="fd77::5", prefix_length=128, gateway=ROUTED_GATEWAY)
    nic = Nic(mac=MAC, address=ADDRESS, prefix_length=16, ipv6=six)
    with pytest.raises(Refused, match="web has IPv6 addresses, and eth0 has no IPv6 address: give it") as caught:
        await driver.plug(spec().model_copy(update={"nics": (nic,)}))
    assert caught.value.hint is not None
    assert "choose another node" in caught.value.hint
    assert await driver.leftovers() == frozenset()


async def test_an_uplink_without_an_address_is_refused(segment: Segment) -> None:
    segment.ip("left", "addr flush dev eth0")
    made = VpcDriver(uplink="eth0")
    with pytest.raises(HostError, match="eth0 has no address"):
        await made.start()
    await made.close()


async def test_opening_a_hundred_addresses_is_fast_enough_for_the_blackout(segment: Segment, driver: VpcDriver) -> None:
    (port,) = await driver.plug(spec(pods=99))
    took_ms = []
    for _ in range(20):
        await port.block()
        began_s = time.perf_counter()
        await port.open()
        took_ms.append((time.perf_counter() - began_s) * 1e3)
    print(f"open: least {min(took_ms):.2f} ms, worst {max(took_ms):.2f} ms")
    assert min(took_ms) < 10
    await port.close()


async def test_an_address_that_nobody_declared_is_not_learnt_as_nobody_could_reach_it(
    segment: Segment, driver: VpcDriver
) -> None:
    (port,) = await driver.plug(spec())
    await port.open()
    said: list[tuple[str, str]] = []
    port.listen(lambda mac, address: said.append((mac, address)))
    spoofed = port.traffic().spoofed_frames
    guest_sends(port.tap_fd, arp(MAC, "10.77.1.99", CLIENT))
    segment.settle()
    assert said == []
    assert port.traffic().spoofed_frames == spoofed + 1
