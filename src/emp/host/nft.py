"""nftables: rules through the ``nft`` command, in one transaction; counters and tables read by netlink.

Rules change rarely, and ``nft`` knows how to spell them. What is read once a second for every EVM costs a system call
instead of a process. Everything works in the network namespace of the calling thread.
"""

from __future__ import annotations

import struct

from emp.host import nfnetlink
from emp.host.netlink import attribute
from emp.host.nfnetlink import attributes
from emp.host.run import run

# linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_SUBSYSTEM = 10 << 8
_GET_TABLE, _GET_OBJECT = _SUBSYSTEM | 1, _SUBSYSTEM | 19
_FAMILY_NETDEV = 5
_TABLE_NAME = 1
_OBJECT_TABLE, _OBJECT_NAME, _OBJECT_TYPE, _OBJECT_DATA = 1, 2, 3, 4
_COUNTER = 1
_COUNTER_PACKETS = 2


async def apply(script: str) -> None:
    """Carry out ``nft -f``: all of it or nothing. Raise ``CommandFailed``, ``MissingDependency`` without ``nft``."""
    await run("nft", "-f", "-", stdin=script)


def packets(table: str, counter: str) -> int | None:
    """Return what a named counter of a ``netdev`` table has counted; None: there is none. Raise ``CommandFailed``."""
    wanted = _text(_OBJECT_TABLE, table) + _text(_OBJECT_NAME, counter) + attribute(_OBJECT_TYPE, struct.pack("!I", 1))
    for answer in nfnetlink.ask(_GET_OBJECT, nfnetlink.ACK, _FAMILY_NETDEV, wanted):
        data = dict(attributes(answer.body[4:])).get(_OBJECT_DATA)
        counted = dict(attributes(data or b"")).get(_COUNTER_PACKETS)
        if counted is not None:
            return int(struct.unpack("!Q", counted)[0])
    return None


def tables() -> list[str]:
    """Return the names of the ``netdev`` tables. Raise ``CommandFailed``."""
    told = nfnetlink.ask(_GET_TABLE, nfnetlink.DUMP, _FAMILY_NETDEV, b"")
    found = (dict(attributes(answer.body[4:])).get(_TABLE_NAME) for answer in told)
    return [name.rstrip(b"\0").decode() for name in found if name]


def _text(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")
