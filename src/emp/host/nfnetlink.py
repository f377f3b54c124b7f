"""Netfilter by netlink (linux/netfilter/nfnetlink.h): requests by hand, in the namespace of the calling thread."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from emp.host.run import command_failed

# linux/netlink.h
_NETLINK_NETFILTER = 12
_REQUEST, ACK, DUMP, CREATE = 0x1, 0x4, 0x300, 0x400
ERROR, _DONE = 2, 3
_TYPE_MASK = 0x3FFF
_RECEIVE_BYTES = 1 << 17


@dataclass(frozen=True)
class Answer:
    """One message: its kind, and what follows its header (with ``nfgenmsg``'s four bytes, unless it is an error)."""

    kind: int
    body: bytes


def connect() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)


def message(kind: int, flags: int, family: int, body: bytes, *, number: int = 1) -> bytes:
    """Return one request; ``body`` are its attributes."""
    body = struct.pack("=BBH", family, 0, 0) + body
    return struct.pack("=IHHII", 16 + len(body), kind, _REQUEST | flags, number, 0) + body


def ask(kind: int, flags: int, family: int, body: bytes) -> Iterator[Answer]:
    """Yield the answers to one request; none where the kernel knows of no such thing. Raise ``CommandFailed``."""
    with connect() as asking:
        asking.send(message(kind, flags, family, body))
        while True:
            for answer in parsed(asking.recv(_RECEIVE_BYTES)):
                if answer.kind == _DONE:
                    return
                if answer.kind == ERROR:
                    code = -struct.unpack_from("=i", answer.body)[0]
                    if code in (0, errno.ENOENT):
                        return
                    raise command_failed(["nfnetlink", str(kind)], code, os.strerror(code))
                yield answer


def parsed(data: bytes) -> Iterator[Answer]:
    """Yield the messages of what was received at once."""
    at = 0
    while at + 16 <= len(data):
        size, kind = struct.unpack_from("=IH", data, at)
        yield Answer(kind, data[at + 16 : at + size])
        at += (max(size, 16) + 3) & ~3


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the kind and the payload of each attribute."""
    at = 0
    while at + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        yield kind & _TYPE_MASK, data[at + 4 : at + size]
        at += (max(size, 4) + 3) & ~3
