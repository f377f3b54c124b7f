"""The ``l2`` driver with a real QEMU on its taps."""

# ruff: noqa: ASYNC110 - a test waits for files and counters, and blocks nobody

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from emp.host.processes import Process, spawn, take_descriptor
from emp.host.tap import find_taps
from emp.model.errors import HostError
from emp.model.evm import Nic
from emp.network.l2 import L2Driver
from tests.fakes.values import a_spec
from tests.segment import Segment

MAC = "52:54:00:00:00:01"
ARP, RARP = b"\x08\x06", b"\x80\x35"
SPEC = a_spec(
    nics=(Nic(mac=MAC, address="10.77.1.1", prefix_length=16),),
)


@pytest.fixture
async def driver(segment: Segment) -> AsyncIterator[L2Driver]:
    made = L2Driver(bridge="emp0", uplink="eth0")
    await made.start()
    yield made
    await made.close()


class Machine:
    """A QEMU without a guest: firmware, one NIC on the tap, a monitor."""

    def __init__(self, directory: Path, tap_fd: int, *extra: str) -> None:
        directory.mkdir()
        self.directory = directory
        arguments = [
            *("-machine", "q35,accel=tcg", "-m", "64", "-nodefaults", "-display", "none", "-S", *extra),
            *("-netdev", f"tap,id=n0,fd={tap_fd}", "-device", f"virtio-net-pci,netdev=n0,mac={MAC}"),
            *("-qmp", f"unix:{directory}/qmp,server=on,wait=off"),
        ]
        os.set_inheritable(tap_fd, True)
        qemu = os.environ.get("EMP_QEMU", "qemu-system-x86_64")
        self.process: Process = spawn([qemu, *arguments], log=directory / "log", pass_fds=[tap_fd])

    async def connect(self) -> None:
        async with asyncio.timeout(20):
            while True:
                assert self.process.alive, (self.directory / "log").read_text()
                try:
                    self.reader, self.writer = await asyncio.open_unix_connection(str(self.directory / "qmp"))
                    break
                except OSError:
                    await asyncio.sleep(0.02)
            await self.reader.readline()
            await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: object) -> dict[str, object]:
        self.writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(await self.reader.readline())
            if "event" not in answer:
                assert "return" in answer, answer
                result: dict[str, object] = answer["return"]
                return result

    async def until_migrated(self) -> None:
        async with asyncio.timeout(30):
            while (await self.execute("query-migrate")).get("status") != "completed":
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        await self.process.stop(grace_s=0)
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


Boot = Callable[..., Awaitable[Machine]]


@pytest.fixture
async def boot(tmp_path: Path) -> AsyncIterator[Boot]:
    """Start machines; whichever still runs is stopped."""
    machines: list[Machine] = []

    async def start(name: str, tap_fd: int, *extra: str) -> Machine:
        machines.append(Machine(tmp_path / name, tap_fd, *extra))
        await machines[-1].connect()
        return machines[-1]

    yield start
    for machine in machines:
        await machine.stop()


def sent_by_machine(segment: Segment, interface: str) -> int:
    """Return how many frames QEMU has written to the tap."""
    (link,) = json.loads(segment.command("left", "ip", "-j", "-s", "link", "show", interface))
    return int(link["stats64"]["rx"]["packets"])


async def test_nothing_that_a_machine_sends_by_itself_leaves_a_blocked_port(
    segment: Segment, driver: L2Driver, boot: Boot, tmp_path: Path
) -> None:
    """QEMU announces by itself when a stream has loaded; 10.0 keeps that back until ``cont``, and sends all then."""
    stream = f"file:{tmp_path}/stream"
    (port,) = await driver.plug(SPEC)
    source = await boot("source", port.tap_fd)
    await source.execute("migrate", uri=stream)
    await source.until_migrated()
    await source.stop()
    await port.remove()

    (port,) = await driver.plug(SPEC)
    target = await boot("target", port.tap_fd, "-incoming", "defer")
    await target.execute("migrate-incoming", uri=stream)
    await target.until_migrated()
    await target.execute("cont")
    async with asyncio.timeout(10):
        while not sent_by_machine(segment, port.interface):
            await asyncio.sleep(0.02)
    segment.settle()
    assert segment.left.drain() == []

    await port.open()
    await target.execute("announce-self", initial=10, max=10, rounds=2, step=0)
    await port.announce([(MAC, SPEC.nics[0].address)])
    seen: list[bytes] = []
    async with asyncio.timeout(10):
        while not any(data[12:14] == ARP for data in seen):
            await asyncio.sleep(0.02)
            seen += segment.left.drain()
    assert {data[6:12] for data in seen} == {bytes.fromhex(MAC.replace(":", ""))}
    assert RARP not in {data[12:14] for data in seen}, "QEMU's own announcement comes too early"
    await port.remove()


async def test_an_agent_that_was_killed_gets_the_tap_back_from_the_machine(
    segment: Segment, driver: L2Driver, boot: Boot
) -> None:
    (port,) = await driver.plug(SPEC)
    machine = await boot("machine", port.tap_fd)
    await port.open()
    await port.close()

    taps = find_taps(machine.process.pid)
    assert list(taps) == [port.interface]
    (adopted,) = await driver.adopt(SPEC, [take_descriptor(machine.process, taps[port.interface])])
    await adopted.announce([(MAC, "10.77.1.1")])
    segment.settle()
    assert {data[6:14] for data in segment.left.drain()} == {bytes.fromhex("5254000000010806")}

    await machine.stop()
    assert await driver.leftovers() == {"web"}, "the agent's copy keeps it"
    await adopted.remove()
    assert await driver.leftovers() == frozenset()
    assert find_taps(machine.process.pid) == {}


async def test_nothing_is_left_when_agent_and_machine_are_both_gone(
    segment: Segment, driver: L2Driver, boot: Boot
) -> None:
    (port,) = await driver.plug(SPEC)
    machine = await boot("machine", port.tap_fd)
    await port.close()
    assert await driver.leftovers() == {"web"}
    await machine.stop()
    assert await driver.leftovers() == frozenset()


async def test_start_keeps_a_bridge_that_carries_the_nodes_address(segment: Segment) -> None:
    segment.ip(
        "left",
        "link add emp0 type bridge",
        "link set eth0 master emp0",
        "address add 10.77.0.1/16 dev emp0",
        "link set emp0 up",
    )
    driver = L2Driver(bridge="emp0", uplink="eth0")
    for _ in range(2):
        await driver.start()
    (bridge,) = json.loads(segment.command("left", "ip", "-j", "-d", "address", "show", "emp0"))
    settings = bridge["linkinfo"]["info_data"]
    assert (settings["forward_delay"], settings["stp_state"], settings["mcast_snooping"]) == (0, 0, 0)
    assert "10.77.0.1" in [address.get("local") for address in bridge["addr_info"]]
    mac = bridge["address"]
    (port,) = await driver.plug(SPEC)
    assert json.loads(segment.command("left", "ip", "-j", "link", "show", "emp0"))[0]["address"] == mac
    await port.remove()
    await driver.close()


async def test_start_says_what_is_missing(segment: Segment) -> None:
    driver = L2Driver(bridge="emp0", uplink="eth7")
    with pytest.raises(HostError, match="eth7"):
        await driver.start()
    await driver.close()

    driver = L2Driver(bridge="lo", uplink="eth0")
    with pytest.raises(HostError, match="lo is not a bridge"):
        await driver.start()
    await driver.close()

    segment.ip("left", "address add 10.77.0.1/16 dev eth0")
    driver = L2Driver(bridge="emp0", uplink="eth0")
    with pytest.raises(HostError, match=r"10\.77\.0\.1") as caught:
        await driver.start()
    assert "move the address" in str(caught.value)
    await driver.close()
