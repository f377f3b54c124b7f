"""A packet socket on one interface with a classic BPF filter (socket(7), packet(7)): the kernel picks the frames."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Sequence

from emp.host.run import command_failed

_ETH_P_ALL = 0x0003
_SO_ATTACH_FILTER = 26
_SOL_PACKET = 263
_PACKET_IGNORE_OUTGOING = 23

Instruction = tuple[int, int, int, int]
"""code, how many to skip if true, if false, operand"""


class _Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_void_p))


def open_capture(interface: str, program: Sequence[Instruction], *, buffer_bytes: int) -> socket.socket:
    """Return a non-blocking socket that gets the frames that come *in* at ``interface`` and that the program lets by.

    What goes out there is not looked at: for that the kernel would copy the head of every such frame. What does not fit
    ``buffer_bytes`` is lost. Raise ``CommandFailed``, also without such an interface.
    """
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    kept = ctypes.create_string_buffer(code)
    capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        capture.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
        capture.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        capture.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(_Program(len(program), ctypes.addressof(kept))))
        capture.bind((interface, _ETH_P_ALL))
    except OSError as error:
        capture.close()
        words = ["capture", interface]
        raise command_failed(words, error.errno or -1, error.strerror or os.strerror(error.errno or 0)) from error
    return capture
