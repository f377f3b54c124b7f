"""The two captures on namespaces of their own: who sent a frame, and what passes a tap."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from bench.network_capture import TapCapture
from emp.host.run import run_sync
from emp.lab.checkers.frames import FrameWitness
from emp.lab.kernel import in_network
from emp.lab.places import NAMESPACES
from emp.lab.topology import FABRIC, Topology

MAC, OTHER = "02:00:00:00:00:01", "02:00:00:00:00:02"
TOPOLOGY = Topology("captures", 1)
WIRE, NODE = TOPOLOGY.namespace(FABRIC), TOPOLOGY.namespace("n1")
IPV4, ARP = bytes.fromhex("0800"), bytes.fromhex("0806")
TCP, UDP = 6, 17


@pytest.fixture
def wire() -> Iterator[None]:
    """One port of a switch, ``n1`` on the fabric, whose other end is the node's ``eth0``."""
    made = []
    try:
        for namespace in (WIRE, NODE):
            run_sync("ip", "netns", "add", namespace)
            made.append(namespace)
        run_sync("ip", "-n", WIRE, "link", "add", "n1", "type", "veth", "peer", "name", "eth0", "netns", NODE)
        run_sync("ip", "-n", WIRE, "link", "set", "n1", "up")
        run_sync("ip", "-n", NODE, "link", "set", "eth0", "up")
        yield
    finally:
        for namespace in made:
            run_sync("ip", "netns", "del", namespace)


def frame(source: str, destination: str, kind: bytes, payload: bytes = b"") -> bytes:
    ends = bytes.fromhex(destination.replace(":", "")) + bytes.fromhex(source.replace(":", ""))
    return (ends + kind + payload).ljust(60, b"\0")


def packet(source: str, destination: str, protocol: int) -> bytes:
    ends = ip_address(source).packed + ip_address(destination).packed
    return frame(MAC, OTHER, IPV4, bytes(9) + bytes([protocol]) + bytes(2) + ends)


def send(namespace: str, interface: str, *frames: bytes) -> None:
    def sent() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as port:
            port.bind((interface, 0))
            for each in frames:
                port.send(each)

    in_network(str(NAMESPACES / namespace), sent)


def test_the_witness_sees_what_comes_from_a_mac_and_not_what_goes_to_its_node(wire: None) -> None:
    with FrameWitness(TOPOLOGY, [MAC]) as witness:
        send(NODE, "eth0", packet("10.0.0.1", "10.0.0.2", UDP), frame(MAC, OTHER, ARP), frame(OTHER, MAC, ARP))
        send(WIRE, "n1", frame(MAC, OTHER, ARP))
        deadline_s = time.monotonic() + 5
        while len(witness.seen) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.01)
    assert [(seen.node, seen.kind) for seen in witness.seen] == [("n1", 0x0800), ("n1", 0x0806)]
    assert witness.dropped == 0


def test_where_nodes_route_an_evm_is_known_by_its_addresses(wire: None) -> None:
    with FrameWitness(TOPOLOGY, [], ["10.0.0.1"]) as witness:
        send(
            NODE,
            "eth0",
            packet("10.0.0.2", "10.0.0.1", UDP),
            frame(MAC, OTHER, ARP),
            packet("10.0.0.1", "10.0.0.2", TCP),
        )
        deadline_s = time.monotonic() + 5
        while not witness.seen and time.monotonic() < deadline_s:
            time.sleep(0.01)
    assert [(seen.node, seen.kind) for seen in witness.seen] == [("n1", 0x0800)]


def test_what_came_faster_than_it_was_taken_is_counted(wire: None) -> None:
    witness = FrameWitness(TOPOLOGY, [MAC])
    send(NODE, "eth0", *[frame(MAC, OTHER, ARP)] * 10_000)  # before anybody takes them
    with witness:
        pass
    assert witness.dropped > 0
    assert witness.dropped + len(witness.seen) <= 10_000


def test_udp_to_the_guest_and_from_it_is_told_apart_by_the_direction_on_its_tap(wire: None) -> None:
    """``eth0`` plays the tap: what its node sends there is for the guest, what arrives is the guest's."""
    guest, client, pod = "10.0.0.1", "10.0.0.2", "10.0.0.3"
    with TapCapture(TOPOLOGY, "n1", "eth0", guest) as capture:
        send(NODE, "eth0", frame(OTHER, MAC, ARP), packet(client, guest, TCP), packet(client, pod, UDP))
        sent_s = time.monotonic()
        send(NODE, "eth0", packet(client, guest, UDP))
        answered_s = time.monotonic()
        send(WIRE, "n1", frame(MAC, OTHER, ARP), packet(guest, client, TCP), packet(pod, client, UDP))
        send(WIRE, "n1", packet(guest, client, UDP))
        deadline_s = time.monotonic() + 5
        while not capture.passed.from_guest_s and time.monotonic() < deadline_s:
            time.sleep(0.01)
    (to_guest_s,), (from_guest_s,) = capture.passed.to_guest_s, capture.passed.from_guest_s
    assert sent_s - 0.01 <= to_guest_s <= answered_s + 0.01
    assert answered_s - 0.01 <= from_guest_s <= time.monotonic()
