"""Sends the same frame over and over, faster than Python's own ``send`` can: ``sendmmsg(2)``, many in one call."""

from __future__ import annotations

import ctypes
import os
import socket
import time

from emp.lab.checkers.witness import Witness
from emp.lab.kernel import in_network
from emp.lab.places import NAMESPACES
from emp.lab.topology import Topology

_BATCH = 256
_libc = ctypes.CDLL(None, use_errno=True)


class _Vector(ctypes.Structure):
    """``struct iovec``"""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """``struct mmsghdr`` (sendmmsg(2)): a ``struct msghdr`` and how much of it was sent"""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.POINTER(_Vector)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("sent", ctypes.c_uint),
    )


def packet_socket(topology: Topology, where: str, interface: str) -> socket.socket:
    """Return a socket that sends Ethernet frames by an interface of a place of the lab, and receives none."""

    def bound() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        made.bind((interface, 0))
        return made

    return in_network(str(NAMESPACES / topology.namespace(where)), bound)


class Flood(Witness):
    """``with Flood(socket, frame, rate_hz): ...`` sends in a thread until its end, never faster than that."""

    def __init__(self, sender: socket.socket, frame: bytes, rate_hz: int) -> None:
        super().__init__("flood")
        self._sender = sender
        self._rate_hz = rate_hz
        self._buffer = ctypes.create_string_buffer(frame, len(frame))
        vector = _Vector(ctypes.cast(self._buffer, ctypes.c_void_p), len(frame))
        self._vector = ctypes.pointer(vector)
        self._messages = (_Message * _BATCH)(*(_Message(vectors=self._vector, vector_count=1) for _ in range(_BATCH)))
        self._sent = [(time.monotonic(), 0)]
        """after each call: when, and how many in all"""

    @property
    def sent(self) -> int:
        return self._sent[-1][1]

    @property
    def best_hz(self) -> float:
        """Frames a second over the fastest four calls, some 1,000 frames: on a machine with other work the mean says
        more of that work."""
        spans = zip(self._sent, self._sent[4:], strict=False)
        return max((after[1] - before[1]) / (after[0] - before[0]) for before, after in spans)

    def watch(self) -> None:
        due_s = time.monotonic()
        while not self._stop.wait(max(0.0, due_s - time.monotonic())):
            count = _libc.sendmmsg(self._sender.fileno(), self._messages, _BATCH, 0)
            if count < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            self._sent.append((time.monotonic(), self.sent + count))
            due_s = max(due_s + count / self._rate_hz, time.monotonic() - 0.1)
