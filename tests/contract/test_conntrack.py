"""What the kernel's connection tracking tells of connections is taken by it again, and means the same."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from emp.host import conntrack, nft
from tests.segment import Segment

NODE, CLIENT = "10.77.0.11", "10.77.0.4"
STRANGER = "10.77.0.99"
PORT = 4000
RULES = """
table inet state {{
    chain in {{ type filter hook input priority 0; policy {policy}; ct state established accept; }}
}}
"""
TRANSLATED = """
table inet translate {
    chain in { type nat hook prerouting priority dstnat; udp dport 7 redirect to :4000; }
}
"""
EMPTY = "add table inet state\ndelete table inet state\n"


@pytest.fixture
async def node(segment: Segment) -> AsyncIterator[Segment]:
    """A node that tracks connections, and a client on its wire; the test is on the node."""
    segment.ip("left", f"addr add {NODE}/16 dev eth0")
    segment.ip("client", f"addr add {CLIENT}/16 dev fabric")
    await nft.apply(RULES.format(policy="accept"))
    yield segment


async def let_in_only_what_is_established() -> None:
    await nft.apply(EMPTY + RULES.format(policy="drop"))


@contextmanager
def streams(segment: Segment) -> Iterator[tuple[socket.socket, socket.socket, socket.socket, socket.socket]]:
    """Give a TCP connection and a UDP exchange that have both been used: client's and node's end of each."""
    with ExitStack() as made:
        listener = made.enter_context(socket.create_server((NODE, PORT)))
        answering = made.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        answering.bind((NODE, PORT))
        with segment.inside("client"):
            tcp = made.enter_context(socket.create_connection((NODE, PORT), timeout=5))
            udp = made.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        accepted = made.enter_context(listener.accept()[0])
        udp.connect((NODE, PORT))
        udp.send(b"hello")
        said, peer = answering.recvfrom(64)
        answering.sendto(said, peer)
        tcp.sendall(b"hello")
        assert accepted.recv(64) == udp.recv(64) == b"hello"
        for each in (accepted, answering):
            each.settimeout(0.3)
        yield tcp, accepted, udp, answering


def arrives(sender: socket.socket, receiver: socket.socket, word: bytes) -> bool:
    sender.send(word)
    try:
        return word in receiver.recv(64)
    except TimeoutError:
        return False


async def test_connections_go_on_where_they_were_made_known(node: Segment) -> None:
    with streams(node) as (tcp, accepted, udp, answering):
        known = conntrack.read([CLIENT])
        assert len(known) == 2
        assert {each.timeout_s > 1000 for each in known} == {True, False}, "TCP's for days, UDP's for seconds"
        await let_in_only_what_is_established()
        assert conntrack.remove(known) == 2
        assert conntrack.read([CLIENT]) == []
        assert not arrives(udp, answering, b"dropped")
        assert not arrives(tcp, accepted, b"again and again")

        heard = [conntrack.parse(each.wire, [NODE]) for each in known]
        assert heard == known
        assert conntrack.add(each for each in heard if each) == 2
        assert arrives(udp, answering, b"passes")
        accepted.settimeout(5)
        assert accepted.recv(64) == b"again and again"
        accepted.send(b"and back")
        assert tcp.recv(64) == b"and back"
        now = {each.original: each for each in conntrack.read([NODE])}
        assert now.keys() == {each.original for each in known}
        (before,) = (each for each in known if each.timeout_s > 1000)
        assert now[before.original].state == before.state, "established, as it was"


async def test_the_same_again_changes_nothing(node: Segment) -> None:
    with streams(node):
        known = conntrack.read([NODE])
        assert conntrack.add(known) == 2
        assert [each.original for each in conntrack.read([NODE])] == [each.original for each in known]


async def test_others_connections_are_neither_read_nor_taken(node: Segment) -> None:
    with streams(node):
        assert conntrack.read([STRANGER]) == []
        assert [conntrack.parse(each.wire, [STRANGER]) for each in conntrack.read([NODE])] == [None, None]
    for nonsense in (b"", b"\x02", b"\x02" + bytes(40), b"\x02\x05\x00\x01\x80\x01", b"\xff" * 200):
        assert conntrack.parse(nonsense, [NODE]) is None


async def test_what_the_node_itself_translates_stays_here(node: Segment) -> None:
    await nft.apply(TRANSLATED)
    with streams(node) as (_, _, _, answering):
        before = len(conntrack.read([NODE]))
        with node.inside("client"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as translated:
            translated.sendto(b"by another port", (NODE, 7))
            assert answering.recv(64) == b"by another port"
        assert len(conntrack.read([NODE])) == before


async def test_nothing_is_known_where_nothing_is_tracked(segment: Segment) -> None:
    segment.ip("left", f"addr add {NODE}/16 dev eth0")
    segment.ip("client", f"addr add {CLIENT}/16 dev fabric")
    with streams(segment):
        assert conntrack.read([NODE]) == []
