"""What an agent knows of an EVM's addresses: heard, asked for, allowed, handed over, kept, forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

from emp.agent.addresses import ASK_S, FORGET_S, MOST, Addresses, Seen, SeenFiles
from emp.model.errors import HostError
from emp.model.evm import Nic, Pod
from emp.model.network import LearntAddress, Traffic
from tests.fakes.values import a_spec

NIC, POD, STRANGER = "52:54:00:00:00:01", "52:54:00:00:01:01", "52:54:00:00:00:99"
SPEC = a_spec(
    nics=(
        Nic(mac=NIC, address="10.77.1.1", prefix_length=16),
        Nic(mac="52:54:00:00:00:02", address="10.78.1.2", prefix_length=24),
    ),
    pods=(Pod(name="shop", mac=POD, address="10.77.2.1", prefix_length=16),),
)


class TapOfTest:
    """A port that remembers what it was told."""

    def __init__(self, counted: Traffic = Traffic()) -> None:  # noqa: B008 - frozen
        self.allowed: list[frozenset[str]] = []
        self.announced: list[list[tuple[str, str]]] = []
        self.heard: Callable[[str, str], None] = lambda mac, ip: None
        self.counted = counted
        self.broken = False
        self.interface, self.tap_fd, self.mtu_bytes = "tap", -1, 1500

    async def allow(self, addresses: Collection[str]) -> None:
        if self.broken:
            raise HostError("no nft here")
        self.allowed.append(frozenset(addresses))

    async def announce(self, addresses: Sequence[tuple[str, str]]) -> None:
        self.announced.append(list(addresses))

    def listen(self, heard: Callable[[str, str], None]) -> None:
        self.heard = heard

    def traffic(self) -> Traffic:
        return self.counted


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class World:
    def __init__(self, directory: Path, seen: Seen | None = None) -> None:
        self.ports, self.clock, self.files = [TapOfTest(), TapOfTest()], Clock(), SeenFiles(directory)
        ports: Any = self.ports  # of what a port can do, this needs little
        self.addresses = Addresses(SPEC, ports, self.files, seen=seen, clock=self.clock)
        self.told = 0
        self.addresses.tell = self.tell
        self.addresses.listen()

    def tell(self) -> None:
        self.told += 1

    def hears(self, address: str, mac: str = NIC, nic: int = 0) -> None:
        self.ports[nic].heard(mac, address)

    @property
    def asked(self) -> set[str]:
        return {one.address for one in self.addresses.asked}

    @property
    def learnt(self) -> set[str]:
        return {one.address for one in self.addresses.learnt}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "addresses")


@pytest.mark.parametrize("address", ["10.77.9.9", "10.78.1.77", "fe80::5054:ff:fe00:1", "fd00::9"])
def test_what_is_heard_is_asked_for_and_not_used(world: World, address: str) -> None:
    world.hears(address)
    assert (world.asked, world.learnt, world.told) == ({address}, set(), 1)
    assert world.ports[0].allowed == []


@pytest.mark.parametrize("address", ["10.77.1.1", "10.77.2.1", "192.0.2.1", "10.79.1.1", "10.77.0.0", "10.77.255.255"])
def test_what_is_declared_or_of_no_subnet_is_not_asked_for(world: World, address: str) -> None:
    world.hears(address)
    assert (world.asked, world.told) == (set(), 0)


def test_a_mac_that_is_not_the_evms_says_nothing(world: World) -> None:
    world.hears("10.77.9.9", STRANGER)
    assert world.asked == set()


async def test_what_is_allowed_is_put_in_force_at_every_card_and_announced(world: World) -> None:
    world.hears("10.77.9.9", POD)
    world.hears("10.78.1.9", "52:54:00:00:00:02", nic=1)
    world.hears("10.77.8.8")
    await world.addresses.allow({"10.77.9.9", "10.78.1.9", "10.77.7.7"})
    assert (world.learnt, world.asked) == ({"10.77.9.9", "10.78.1.9"}, {"10.77.8.8"})
    usable = {"10.77.1.1", "10.78.1.2", "10.77.2.1", "10.77.9.9", "10.78.1.9"}
    for port in world.ports:
        assert port.allowed == [usable]
    assert world.ports[0].announced == [[(NIC, "10.77.1.1"), (POD, "10.77.2.1"), (POD, "10.77.9.9")]]
    assert world.ports[1].announced == [[("52:54:00:00:00:02", "10.78.1.2"), ("52:54:00:00:00:02", "10.78.1.9")]]
    await world.addresses.allow({"10.77.9.9", "10.78.1.9"})
    assert len(world.ports[0].allowed) == 1, "nothing new costs nothing"


async def test_what_is_taken_back_is_dropped_at_once(world: World) -> None:
    world.hears("10.77.9.9")
    await world.addresses.allow({"10.77.9.9"})
    await world.addresses.allow(set())
    assert world.ports[0].allowed[-1] == {"10.77.1.1", "10.78.1.2", "10.77.2.1"}
    assert (world.learnt, world.asked) == (set(), {"10.77.9.9"})
    assert len(world.ports[0].announced) == 1


async def test_rules_that_cannot_be_set_are_tried_with_the_next_word(world: World) -> None:
    world.hears("10.77.9.9")
    world.ports[0].broken = True
    await world.addresses.allow({"10.77.9.9"})
    assert world.ports[0].allowed == []
    world.ports[0].broken = False
    await world.addresses.allow({"10.77.9.9"})
    assert "10.77.9.9" in world.ports[0].allowed[-1]


async def test_silence_forgets_and_a_word_keeps(world: World) -> None:
    for address in ("10.77.9.8", "10.77.9.9"):
        world.hears(address)
    await world.addresses.allow({"10.77.9.8", "10.77.9.9"})
    world.clock.now_s += FORGET_S - 1
    world.hears("10.77.9.9")
    world.clock.now_s += 2
    assert world.learnt == {"10.77.9.9"}
    await world.addresses.allow({"10.77.9.8", "10.77.9.9"})
    assert "10.77.9.8" not in world.ports[0].allowed[-1]


async def test_a_guest_that_invents_addresses_costs_little_and_pushes_out_none_that_it_uses(world: World) -> None:
    world.hears("10.77.9.9")
    await world.addresses.allow({"10.77.9.9"})
    for number in range(3 * MOST):
        world.hears(f"10.77.{10 + number // 200}.{1 + number % 200}")
    assert len(world.asked) + len(world.learnt) == MOST
    assert world.learnt == {"10.77.9.9"}
    assert world.told == 1, "the next heartbeat tells of the rest"
    world.clock.now_s += ASK_S
    world.hears("10.77.100.1")
    assert world.told == 2


async def test_an_address_follows_the_mac_that_has_it_now(world: World) -> None:
    world.hears("10.77.9.9")
    await world.addresses.allow({"10.77.9.9"})
    world.hears("10.77.9.9", POD)
    assert world.addresses.learnt == (LearntAddress(mac=POD, address="10.77.9.9", nic=0),)


async def test_the_target_takes_what_the_source_learnt_and_announces_nothing_yet(world: World) -> None:
    before = world.addresses.changed.version
    await world.addresses.take(
        [
            LearntAddress(mac=POD, address="10.77.9.9"),
            LearntAddress(mac=STRANGER, address="10.77.9.8"),
            LearntAddress(mac=NIC, address="10.77.9.7", nic=5),
            LearntAddress(mac=NIC, address="10.77.2.1"),
        ]
    )
    assert (world.learnt, world.asked) == ({"10.77.9.9"}, set())
    assert world.ports[0].allowed == [{"10.77.1.1", "10.78.1.2", "10.77.2.1", "10.77.9.9"}]
    assert world.ports[0].announced == []
    assert world.addresses.changed.version > before
    await world.addresses.take([])
    assert world.learnt == set(), "it went during the brownout"
    await world.addresses.announce()
    assert world.ports[0].announced == [[(NIC, "10.77.1.1"), (POD, "10.77.2.1")]]


async def test_counts_go_on_over_a_migration(world: World) -> None:
    world.ports[0].counted = Traffic(received_frames=5, sent_bytes=70, spoofed_frames=1)
    world.ports[1].counted = Traffic(received_frames=1)
    world.addresses.came_with(Traffic(received_frames=100, dropped_frames=3))
    expected = Traffic(received_frames=106, sent_bytes=70, spoofed_frames=1, dropped_frames=3)
    assert world.addresses.traffic == expected


async def test_a_restarted_agent_goes_on_with_what_was_allowed_and_counted(world: World, tmp_path: Path) -> None:
    world.hears("10.77.9.9")
    await world.addresses.allow({"10.77.9.9"})
    world.addresses.came_with(Traffic(sent_frames=9))
    again = World(tmp_path / "addresses", world.files.get("web"))
    assert (again.learnt, again.addresses.traffic.sent_frames) == ({"10.77.9.9"}, 9)
    await again.addresses.allow({"10.77.9.9"})
    assert len(again.ports[0].allowed) == 1, "whatever befell the rules while no agent ran, they are made again"
    assert again.ports[0].announced == []
    again.addresses.forget()
    again.addresses.forget()
    assert again.files.get("web") == Seen()


async def test_a_file_that_cannot_be_read_is_learnt_again(world: World, tmp_path: Path) -> None:
    (tmp_path / "addresses" / "web").write_text("{")
    assert world.files.get("web") == Seen()


async def test_words_that_come_at_once_end_with_the_last(world: World) -> None:
    for number in (1, 2, 3):
        world.hears(f"10.77.9.{number}")
    await asyncio.gather(*(world.addresses.allow({f"10.77.9.{number}"}) for number in (1, 2, 3)))
    assert world.learnt == {"10.77.9.3"}
    assert "10.77.9.3" in world.ports[0].allowed[-1]
