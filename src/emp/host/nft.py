"""nftables: rules through the ``nft`` command, in one transaction; counters and tables read by netlink.

Rules change rarely, and ``nft`` knows how to spell them. What is read once a second for every EVM costs a system call
instead of a process. Everything works in the network namespace of the calling thread.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from emp.host.run import command_failed, run

# linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NETLINK_NETFILTER = 12
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ERROR, _DONE = 2, 3
_SUBSYSTEM = 10 << 8
_GET_TABLE, _GET_OBJECT = _SUBSYSTEM | 1, _SUBSYSTEM | 19
_FAMILY_NETDEV = 5
_TABLE_NAME = 1
_OBJECT_TABLE, _OBJECT_NAME, _OBJECT_TYPE, _OBJECT_DATA = 1, 2, 3, 4
_COUNTER = 1
_COUNTER_PACKETS = 2
_TYPE_MASK = 0x3FFF


@dataclass(frozen=True)
class _Answer:
    kind: int
    body: bytes


async def apply(script: str) -> None:
    """Carry out ``nft -f``: all of it or nothing. Raise ``CommandFailed``, ``MissingDependency`` without ``nft``."""
    await run("nft", "-f", "-", stdin=script)


def packets(table: str, counter: str) -> int | None:
    """Return what a named counter of a ``netdev`` table has counted; None: there is none. Raise ``CommandFailed``."""
    wanted = _text(_OBJECT_TABLE, table) + _text(_OBJECT_NAME, counter) + _attribute(_OBJECT_TYPE, struct.pack("!I", 1))
    for answer in _ask(_GET_OBJECT, _ACK, wanted):
        data = dict(_attributes(answer.body[4:])).get(_OBJECT_DATA)
        counted = dict(_attributes(data or b"")).get(_COUNTER_PACKETS)
        if counted is not None:
            return int(struct.unpack("!Q", counted)[0])
    return None


def tables() -> list[str]:
    """Return the names of the ``netdev`` tables. Raise ``CommandFailed``."""
    found = (dict(_attributes(answer.body[4:])).get(_TABLE_NAME) for answer in _ask(_GET_TABLE, _DUMP, b""))
    return [name.rstrip(b"\0").decode() for name in found if name]


def _ask(kind: int, flags: int, attributes: bytes) -> Iterator[_Answer]:
    """Yield the answers to one request; none where the kernel knows of no such thing."""
    body = struct.pack("=BBH", _FAMILY_NETDEV, 0, 0) + attributes
    request = struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | flags, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as asking:
        asking.send(request)
        while True:
            for answer in _answers(asking.recv(1 << 17)):
                if answer.kind == _DONE:
                    return
                if answer.kind == _ERROR:
                    code = -struct.unpack_from("=i", answer.body)[0]
                    if code in (0, errno.ENOENT):
                        return
                    raise command_failed(["nfnetlink", str(kind)], code, os.strerror(code))
                yield answer


def _answers(data: bytes) -> Iterator[_Answer]:
    at = 0
    while at + 16 <= len(data):
        size, kind = struct.unpack_from("=IH", data, at)
        yield _Answer(kind, data[at + 16 : at + size])
        at += (size + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        yield kind & _TYPE_MASK, data[at + 4 : at + size]
        at += (max(size, 4) + 3) & ~3


def _attribute(kind: int, payload: bytes) -> bytes:
    size = 4 + len(payload)
    return struct.pack("=HH", size, kind) + payload + bytes(-size % 4)


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")
