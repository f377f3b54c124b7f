"""Anti-spoofing and learning at a real tap: what a guest sends, and what becomes of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest

from emp.host import nft
from emp.model.errors import HostError
from emp.network import guard
from emp.network.announce import announcement
from emp.network.base import Port
from emp.network.guard import Guard
from emp.network.l2 import L2Driver
from emp.network.learn import BATCH, Listener
from tests.contract.test_network import spec
from tests.frames import (
    advertisement,
    arp,
    dhcp_request,
    ethernet,
    router_advertisement,
    solicitation,
    tagged,
    udp,
)
from tests.segment import Segment, frame, guest_sends

MAC, STRANGER = "52:54:00:00:00:01", "52:54:00:00:00:77"
MINE, SIX, LOCAL = "10.77.1.1", "fd00::1", "fe80::5054:ff:fe00:1"
OTHERS, OTHERS_SIX = "10.77.1.2", "fd00::2"

GOOD = {
    "arp": arp(MAC, MINE, OTHERS),
    "arp-probe": arp(MAC, "0.0.0.0", "10.77.1.9"),
    "dhcp": dhcp_request(MAC, "10.77.1.9"),
    "udp": udp(MAC, MINE, OTHERS, 7777),
    "fragment": udp(MAC, MINE, OTHERS, 7777, fragment=100),
    "solicit": solicitation(MAC, LOCAL, OTHERS_SIX),
    "duplicate": solicitation(MAC, "::", SIX),
    "advertise": advertisement(MAC, LOCAL, SIX),
    "announce": announcement(MAC, MINE)[1],
    "announce-six": announcement(MAC, SIX)[0],
    "other-protocol": frame(MAC),
}
BAD = {
    "mac": frame(STRANGER),
    "gratuitous": announcement(MAC, OTHERS)[0],
    "gratuitous-reply": announcement(MAC, OTHERS)[1],
    "arp-as-stranger": arp(MAC, MINE, OTHERS, sender_mac=STRANGER),
    "arp-of-other-form": ethernet(MAC, "ff:ff:ff:ff:ff:ff", 0x0806, b"\0\6\x08\0\6\4\0\1" + bytes(20)),
    "udp": udp(MAC, OTHERS, MINE, 7777),
    "fragment": udp(MAC, OTHERS, MINE, 7777, fragment=100),
    "advertise": advertisement(MAC, LOCAL, OTHERS_SIX),
    "advertise-as-other": advertisement(MAC, OTHERS_SIX, SIX),
    "solicit-as-other": solicitation(MAC, OTHERS_SIX, SIX),
    "router": router_advertisement(MAC, LOCAL),
    "vlan": tagged(arp(MAC, MINE, OTHERS), 5),
    "vlan-of-provider": tagged(tagged(arp(MAC, MINE, OTHERS), 5), 6, kind=0x88A8),
}


@pytest.fixture
async def port(segment: Segment) -> AsyncIterator[Port]:
    driver = L2Driver(bridge="emp0", uplink="eth0")
    await driver.start()
    (made,) = await driver.plug(spec())
    await made.open()
    yield made
    await made.remove()
    await driver.close()


@pytest.fixture
async def guarded(port: Port) -> Guard:
    made = Guard(port.interface, [MAC])
    await made.allow([MINE, SIX, LOCAL])
    return made


@pytest.mark.parametrize("name", GOOD)
async def test_what_is_the_guests_own_passes(name: str, segment: Segment, port: Port, guarded: Guard) -> None:
    guest_sends(port.tap_fd, GOOD[name])
    segment.settle()
    assert segment.left.drain() == [GOOD[name]]
    assert guarded.spoofed == 0


async def test_qemus_announcement_is_ours_to_make(segment: Segment, port: Port, guarded: Guard) -> None:
    guest_sends(port.tap_fd, ethernet(MAC, "ff:ff:ff:ff:ff:ff", 0x8035, bytes(46)))
    guest_sends(port.tap_fd, GOOD["udp"])
    segment.settle()
    assert segment.left.drain() == [GOOD["udp"]]
    assert guarded.spoofed == 0, "nobody did wrong"


@pytest.mark.parametrize("name", BAD)
async def test_what_is_not_is_dropped_and_counted(name: str, segment: Segment, port: Port, guarded: Guard) -> None:
    guest_sends(port.tap_fd, BAD[name])
    guest_sends(port.tap_fd, GOOD["udp"])
    segment.settle()
    assert segment.left.drain() == [GOOD["udp"]]
    assert guarded.spoofed == 1


async def test_without_rules_each_of_these_would_pass(segment: Segment, port: Port, guarded: Guard) -> None:
    await guard.remove(port.interface)
    for data in BAD.values():
        guest_sends(port.tap_fd, data)
    segment.settle()
    assert len(segment.left.drain()) == len(BAD)
    with pytest.raises(HostError, match="rules of"):
        _ = guarded.spoofed


async def test_the_bridge_does_not_learn_a_mac_that_is_not_the_guests(
    segment: Segment, port: Port, guarded: Guard
) -> None:
    guest_sends(port.tap_fd, frame(STRANGER))
    guest_sends(port.tap_fd, frame(MAC))
    segment.settle()
    table = json.loads(segment.command("left", "bridge", "-j", "fdb", "show", "br", "emp0"))
    known = {entry["mac"] for entry in table}
    assert (MAC in known, STRANGER in known) == (True, False)


async def test_a_neighbours_table_stays_right(segment: Segment, port: Port, guarded: Guard) -> None:
    """The neighbour is a kernel that knows the address's owner, and would believe the next announcement of it."""
    segment.ip(
        "right",
        "address add 10.77.0.9/16 dev eth0",
        f"neighbour add {OTHERS} lladdr 52:54:00:00:00:02 dev eth0 nud stale",
    )
    for data in announcement(MAC, OTHERS):
        guest_sends(port.tap_fd, data)
    segment.settle()
    assert neighbour(segment, OTHERS) == "52:54:00:00:00:02"
    assert guarded.spoofed == 2
    await guarded.allow([MINE, OTHERS])
    for data in announcement(MAC, OTHERS):
        guest_sends(port.tap_fd, data)
    deadline_s = time.monotonic() + 5
    while neighbour(segment, OTHERS) != MAC and time.monotonic() < deadline_s:
        segment.settle()
    assert neighbour(segment, OTHERS) == MAC, "with leave, the same frames do it"


def neighbour(segment: Segment, address: str) -> str:
    (entry,) = json.loads(segment.command("right", "ip", "-j", "neighbour", "show", address))
    return str(entry["lladdr"])


async def test_while_the_addresses_change_nothing_spoofed_passes_and_nothing_else_is_lost(
    segment: Segment, port: Port, guarded: Guard
) -> None:
    sent = 0
    seen: list[bytes] = []

    async def guest() -> None:
        nonlocal sent
        while True:
            guest_sends(port.tap_fd, BAD["gratuitous"])
            guest_sends(port.tap_fd, GOOD["arp"])
            sent += 1
            if sent % 100 == 0:
                seen.extend(segment.left.drain())
            await asyncio.sleep(0)

    speaking = asyncio.create_task(guest())
    for number in range(30):
        await guarded.allow([MINE, SIX, f"10.77.3.{number}", f"fd00::3:{number}"])
    speaking.cancel()
    segment.settle()
    seen.extend(segment.left.drain())
    assert sent > 30
    assert (len(seen), set(seen)) == (sent, {GOOD["arp"]})
    assert guarded.spoofed == sent


async def test_the_rules_outlive_whoever_made_them_and_go_with_the_sweep(port: Port, guarded: Guard) -> None:
    mine = guard.table_of(port.interface)
    await guard.sweep([port.interface])
    assert mine in nft.tables()
    assert Guard(port.interface, [MAC]).spoofed == 0
    await guard.sweep([])
    await guard.remove(port.interface)
    assert mine not in nft.tables()


async def test_a_listener_hears_of_addresses_and_of_nothing_else(segment: Segment, port: Port) -> None:
    heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    listener = Listener(port.interface, lambda mac, ip: heard.put_nowait((mac, ip)))
    segment.left.send(arp("02:00:00:00:00:fe", "10.77.0.9", MINE))  # to the guest: not its word
    for name in ("udp", "fragment", "other-protocol"):
        guest_sends(port.tap_fd, GOOD[name])
    for data in (GOOD["arp"], GOOD["solicit"], GOOD["advertise"], GOOD["dhcp"], BAD["gratuitous"]):
        guest_sends(port.tap_fd, data)
    async with asyncio.timeout(5):
        first = [await heard.get() for _ in range(5)]
    assert first == [(MAC, MINE), (MAC, LOCAL), (MAC, SIX), (MAC, "10.77.1.9"), (MAC, OTHERS)]
    listener.close()
    listener.close()


async def test_a_flood_of_arp_does_not_hold_the_agent_up(port: Port) -> None:
    heard = 0

    def hear(_: str, __: str) -> None:
        nonlocal heard
        heard += 1

    listener = Listener(port.interface, hear)
    began_s, longest_s, sent = time.monotonic(), 0.0, 0
    while (now_s := time.monotonic()) < began_s + 0.5:
        for _ in range(200):
            guest_sends(port.tap_fd, GOOD["arp"])
            sent += 1
        before_s = time.monotonic()
        await asyncio.sleep(0)
        longest_s = max(longest_s, time.monotonic() - before_s)
    assert sent > 10 * BATCH
    assert 0 < heard <= BATCH * (1 + (now_s - began_s) / 0.1)
    print(f"{sent} frames, {heard} looked at, the loop was held up {longest_s * 1e3:.1f} ms at most")
    listener.close()


async def test_a_listener_needs_a_tap(segment: Segment) -> None:
    with pytest.raises(HostError, match="emp9"):
        Listener("emp9", lambda mac, ip: None)
