"""Frames of the switchover link: 4 bytes length of the payload, 1 byte kind, payload. Pure: bytes in, frames out."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum

from emp.model.errors import BadInput

MAX_PAYLOAD_BYTES = 1 << 20
_HEADER = struct.Struct("!IB")


class Kind(IntEnum):
    HEARTBEAT = 0
    """nothing to say, still here"""
    WELCOME = 1
    """first frame of the accepting side: it has verified the other one"""
    MESSAGE = 2
    """one JSON object"""
    BYE = 3
    """last frame of a link that is closed on purpose; a JSON error when it is closed for a reason"""
    DATA = 4
    """bytes, for whoever has said that they are expected"""


def encode(kind: Kind, payload: bytes = b"") -> bytes:
    """Return one frame; ``BadInput`` when the payload is beyond the bound."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise BadInput(f"a message of {len(payload)} bytes is beyond the link's bound of {MAX_PAYLOAD_BYTES}")
    return _HEADER.pack(len(payload), kind) + payload


class Decoder:
    """Cuts a byte stream into frames, however it was chopped on its way."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Kind, bytes]]:
        """Yield the frames that ``data`` completes; ``BadInput`` on an unknown kind or a length beyond the bound."""
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            length, kind = _HEADER.unpack_from(self._buffer)
            if length > MAX_PAYLOAD_BYTES or kind > Kind.DATA:
                raise BadInput(f"not a frame of this protocol: kind {kind}, {length} bytes")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            yield Kind(kind), payload
