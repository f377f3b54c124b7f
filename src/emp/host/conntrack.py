"""The kernel's connection tracking: what a node knows of some addresses' connections, read here and made known there.

For nodes whose own rules look at the state of connections (``ct state`` of nft, ``-m conntrack`` of iptables). Each
connection is handed on as the kernel describes it (linux/netfilter/nfnetlink_conntrack.h), apart from what belongs to
the node: its counters, its helpers, and the sequence numbers of TCP, which the kernel does not tell. So there TCP's
window is not looked at from then on, as conntrackd does it too (``TCPWindowTracking Off``). A connection whose
addresses this node translates is not handed on: that is between its peer and this node.

By hand, because it is done in the blackout too: the library that we otherwise use takes many times as long to
write them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from emp.host import nfnetlink
from emp.host.netlink import attribute
from emp.host.nfnetlink import attributes

# linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h, nf_conntrack_common.h, nf_conntrack_tcp.h
_SUBSYSTEM = 1 << 8
_NEW, _GET, _DELETE = _SUBSYSTEM | 0, _SUBSYSTEM | 1, _SUBSYSTEM | 2
_ORIGINAL, _REPLY, _STATUS, _PROTOCOL, _TIMEOUT, _MARK, _ZONE, _LABELS = 1, 2, 3, 4, 7, 8, 18, 22
_TUPLE_IP = 1
_TCP = 1
_TCP_FLAGS = (4, 5)
_NESTED = 0x8000
_SEEN_REPLY, _ASSURED, _CONFIRMED, _TRANSLATED = 2, 4, 8, 16 | 32
_LIBERAL = 8
_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_AT_ONCE = 64
"""messages whose answers fit a socket's buffer"""


@dataclass(frozen=True)
class Connection:
    """One tracked connection; ``wire`` makes one of what another node has said of it."""

    family: int
    original: bytes
    """what tells it from all others: the addresses and ports of its first packet"""
    zone: bytes | None
    state: bytes
    """the rest but for its time limit, so that two looks can be compared"""
    timeout_s: int

    @property
    def wire(self) -> bytes:
        return bytes([self.family]) + self._identity() + self.state + self._timeout()

    def _identity(self) -> bytes:
        zone = b"" if self.zone is None else attribute(_ZONE, self.zone)
        return attribute(_ORIGINAL | _NESTED, self.original) + zone

    def _timeout(self) -> bytes:
        return attribute(_TIMEOUT, struct.pack("!I", self.timeout_s))

    def request_new(self, number: int) -> bytes:
        body = self._identity() + self.state + self._timeout()
        return nfnetlink.message(_NEW, nfnetlink.ACK | nfnetlink.CREATE, self.family, body, number=number)

    def request_delete(self, number: int) -> bytes:
        return nfnetlink.message(_DELETE, nfnetlink.ACK, self.family, self._identity(), number=number)


def read(addresses: Collection[str]) -> list[Connection]:
    """Return the connections that begin or end at one of ``addresses``. Raise ``CommandFailed``.

    Costs next to nothing where the kernel tracks none, as on a node without such rules.
    """
    try:
        if int(_COUNT.read_text()) == 0:
            return []
    except FileNotFoundError:
        return []
    packed = frozenset(ip_address(address).packed for address in addresses)
    perhaps = re.compile(b"|".join(re.escape(address) for address in packed))
    told = nfnetlink.ask(_GET, nfnetlink.DUMP, 0, b"")
    found = (_parse(one.body[0], one.body[4:], packed) for one in told if perhaps.search(one.body))
    return [connection for connection in found if connection is not None]


def parse(wire: bytes, addresses: Collection[str]) -> Connection | None:
    """Return what ``Connection.wire`` says; None if it is not a connection of one of ``addresses``, or nonsense."""
    packed = frozenset(ip_address(address).packed for address in addresses)
    return _parse(wire[0], wire[1:], packed) if wire else None


def add(connections: Iterable[Connection]) -> int:
    """Make connections known to the kernel, or what it knows of them new. Return how many it took."""
    return _each([one.request_new(number) for number, one in enumerate(connections)])


def remove(connections: Iterable[Connection]) -> int:
    """Have the kernel forget connections. Return how many it knew."""
    return _each([one.request_delete(number) for number, one in enumerate(connections)])


def _each(requests: Sequence[bytes]) -> int:
    """Send requests, which the kernel works on inside ``send``, and return how many succeeded."""
    succeeded = 0
    with nfnetlink.connect() as asking:
        for at in range(0, len(requests), _AT_ONCE):
            some = requests[at : at + _AT_ONCE]
            asking.send(b"".join(some))
            for _ in some:
                (answer,) = nfnetlink.parsed(asking.recv(4096))
                succeeded += struct.unpack_from("=i", answer.body)[0] == 0
    return succeeded


def _parse(family: int, data: bytes, addresses: frozenset[bytes]) -> Connection | None:
    try:
        said = dict(attributes(data))
        original, reply = said[_ORIGINAL], said[_REPLY]
        ends = [address for _, address in attributes(dict(attributes(original))[_TUPLE_IP])]
        (status,) = struct.unpack("!I", said[_STATUS])
        (timeout_s,) = struct.unpack("!I", said[_TIMEOUT])
        protocol = _protocol(said[_PROTOCOL]) if _PROTOCOL in said else None
    except (KeyError, IndexError, struct.error):
        return None
    if addresses.isdisjoint(ends) or status & _TRANSLATED:
        return None
    known = status & (_SEEN_REPLY | _ASSURED) | _CONFIRMED
    state = attribute(_REPLY | _NESTED, reply) + attribute(_STATUS, struct.pack("!I", known))
    if protocol is not None:
        state += attribute(_PROTOCOL | _NESTED, protocol)
    state += b"".join(attribute(kind, said[kind]) for kind in (_MARK, _LABELS) if kind in said)
    return Connection(family, original, said.get(_ZONE), state, timeout_s)


def _protocol(said: bytes) -> bytes:
    """Return the protocol's state; TCP's flags with a mask, without which the kernel leaves them alone."""
    made = b""
    for kind, state in attributes(said):
        if kind == _TCP:
            parts = (
                (part, bytes([value[0] | _LIBERAL, 0xFF]) if part in _TCP_FLAGS else value)
                for part, value in attributes(state)
            )
            state = b"".join(attribute(part, value) for part, value in parts)
        made += attribute(kind | _NESTED, state)
    return made
