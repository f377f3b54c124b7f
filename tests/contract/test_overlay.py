"""``l2`` in a VLAN of the uplink, or over a VXLAN between nodes: whatever of it this kernel has is used."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from emp.host.netlink import Netlink
from emp.model.errors import CommandFailed, HostError
from emp.network.base import Port
from emp.network.l2 import L2Driver
from emp.network.uplink import VXLAN_PORT, Vxlan
from tests.contract.test_network import CLIENT, MAC, spec
from tests.segment import Segment, frame, guest_receives, guest_sends

LEFT, RIGHT, THIRD = "192.0.2.1", "192.0.2.2", "192.0.2.3"
THERE = "52:54:00:00:00:02"


async def has_vlans() -> bool:
    links = Netlink()
    await links.connect()
    try:
        uplink = await links.link("eth0")
        assert uplink is not None
        await links.add_vlan("probe", parent=uplink.index, vlan=9)
    except CommandFailed:
        return False
    finally:
        await links.close()
    return True


# ---- VLAN


async def test_the_vlan_of_the_uplink_is_joined_and_not_the_uplink(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel without VLANs gets another link in the place of the one that it was asked for."""
    asked: list[dict[str, Any]] = []
    if not await has_vlans():

        async def add_vlan(links: Netlink, name: str, *, parent: int, vlan: int) -> None:
            asked.append({"name": name, "parent": parent, "vlan": vlan})
            segment.ip("left", f"link add {name} type veth peer name inside")

        monkeypatch.setattr(Netlink, "add_vlan", add_vlan)
    driver = L2Driver(bridge="emp0", uplink="eth0", vlan=5)
    for _ in range(2):
        await driver.start()
    assert asked in ([], [{"name": "eth0.5", "parent": socket.if_nametoindex("eth0"), "vlan": 5}])
    links = Netlink()
    await links.connect()
    bridge, card, port = await links.link("emp0"), await links.link("eth0"), await links.link("eth0.5")
    assert bridge and card and port
    assert (card.master, port.master, port.up) == (None, bridge.index, True)
    await links.close()
    await driver.close()


async def test_a_kernel_without_vlans_is_told_by_its_field(segment: Segment) -> None:
    if await has_vlans():
        pytest.skip("this kernel has VLANs")
    driver = L2Driver(bridge="emp0", uplink="eth0", vlan=5)
    with pytest.raises(HostError, match="no VLAN 5 on eth0") as caught:
        await driver.start()
    assert caught.value.field == "vlan"
    assert "8021q" in (caught.value.hint or "")
    await driver.close()


# ---- VXLAN


class Overlaid:
    """Two nodes that reach each other by IP alone, with an EVM on each; a third that only listens."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.drivers: dict[str, L2Driver] = {}
        self.ports: dict[str, Port] = {}

    async def start(self) -> None:
        self.segment.ip("client", f"address add {THIRD}/24 dev fabric")
        addresses = {"left": LEFT, "right": RIGHT, "third": THIRD}
        for name, evm in (("left", "web"), ("right", "db")):
            self.segment.ip(name, f"address add {addresses[name]}/24 dev eth0")
            with self.segment.inside(name):
                peers = {peer: address for peer, address in addresses.items() if peer != name}
                driver = L2Driver(bridge="emp0", uplink="eth0", vxlan=Vxlan(7, addresses[name], peers))
                for _ in range(2):
                    await driver.start()
                made = spec(evm)
                if evm == "db":
                    nic = made.nics[0].model_copy(update={"mac": THERE, "address": "10.77.1.2"})
                    made = made.model_copy(update={"nics": (nic,), "pods": ()})
                (port,) = await driver.plug(made)
                await port.open()
            self.drivers[name], self.ports[name] = driver, port
        macs = {
            LEFT: self._mac("left", "eth0"),
            RIGHT: self._mac("right", "eth0"),
            THIRD: self._mac("client", "fabric"),
        }
        for name in self.drivers:  # the underlay's own ARP is not what is tested
            for far, mac in macs.items():
                self.segment.ip(name, f"neighbour replace {far} lladdr {mac} dev eth0 nud permanent")
        self.segment.settle()
        self.segment.left.drain()

    def _mac(self, name: str, interface: str) -> str:
        (link,) = json.loads(self.segment.command(name, "ip", "-j", "link", "show", interface))
        return str(link["address"])

    def sends(self, data: bytes) -> list[str]:
        """The left EVM sends; return to whom the node did."""
        guest_sends(self.ports["left"].tap_fd, data)
        self.segment.settle()
        outer = [seen for seen in self.segment.left.drain() if seen[36:38] == VXLAN_PORT.to_bytes(2, "big")]
        assert all(seen[50:] == data for seen in outer)
        return sorted(socket.inet_ntoa(seen[30:34]) for seen in outer)

    async def close(self) -> None:
        for name, driver in self.drivers.items():
            with self.segment.inside(name):
                await self.ports[name].remove()
                await driver.close()


@pytest.fixture
async def overlaid(segment: Segment) -> AsyncIterator[Overlaid]:
    made = Overlaid(segment)
    await made.start()
    yield made
    await made.close()


async def test_frames_reach_the_other_nodes_evm_and_come_back(overlaid: Overlaid) -> None:
    assert overlaid.sends(frame(MAC)) == [RIGHT, THIRD]
    assert guest_receives(overlaid.ports["right"].tap_fd) == [frame(MAC)]
    guest_sends(overlaid.ports["right"].tap_fd, frame(THERE, MAC))
    overlaid.segment.settle()
    assert guest_receives(overlaid.ports["left"].tap_fd) == [frame(THERE, MAC)]


async def test_a_mac_that_is_placed_goes_to_its_node_alone_and_moves(overlaid: Overlaid) -> None:
    left, data = overlaid.drivers["left"], frame(MAC, THERE)
    assert overlaid.sends(data) == [RIGHT, THIRD], "nobody has said where it is"
    await left.place({THERE: "right", CLIENT: "unknown"})
    assert overlaid.sends(data) == [RIGHT]
    assert overlaid.sends(frame(MAC, CLIENT)) == [RIGHT, THIRD]
    await left.place({THERE: "third"})
    assert overlaid.sends(data) == [THIRD]
    await left.start()
    assert overlaid.sends(data) == [THIRD], "a restarted agent leaves it"
    await left.place({})
    assert overlaid.sends(data) == [RIGHT, THIRD]


async def test_the_wire_teaches_an_overlay_nothing(overlaid: Overlaid) -> None:
    """A stranger on the underlay says that he has the MAC; a VXLAN that learns would send everything to him."""
    left, data = overlaid.drivers["left"], frame(MAC, THERE)
    await left.place({THERE: "right"})
    segment = overlaid.segment
    with segment.inside("client"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"\x08\0\0\0\0\0\x07\0" + frame(THERE), (LEFT, VXLAN_PORT))
    segment.settle()
    assert guest_receives(overlaid.ports["left"].tap_fd) == [frame(THERE)]
    assert overlaid.sends(data) == [RIGHT]


async def test_what_fits_is_less_by_the_outer_headers(overlaid: Overlaid) -> None:
    assert overlaid.drivers["left"].mtu_bytes == 1450
    assert overlaid.ports["left"].mtu_bytes == 1450
    large = frame(MAC, THERE, payload=bytes(1450))
    await overlaid.drivers["left"].place({THERE: "right"})
    assert overlaid.sends(large) == [RIGHT]
    assert guest_receives(overlaid.ports["right"].tap_fd) == [large]


async def test_a_link_of_that_name_that_is_no_overlay_is_told(segment: Segment) -> None:
    segment.ip("left", "link add emp-vxlan7 type veth peer name inside")
    driver = L2Driver(bridge="emp0", uplink="eth0", vxlan=Vxlan(7, LEFT, {}))
    with pytest.raises(HostError, match="emp-vxlan7 is not a VXLAN") as caught:
        await driver.start()
    assert caught.value.field == "vxlan"
    await driver.close()
