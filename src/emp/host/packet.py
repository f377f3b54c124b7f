"""Packet sockets: the frames of an interface as they pass, and a way to put some there (packet(7)).

A frame is a virtio-net header of ``HEADER_BYTES`` and the Ethernet frame, as at a tap: the header says what the sender
has left to the hardware (checksum, segmentation), and without it such a frame would be garbage.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
from collections.abc import Iterable, Sequence

from emp.host.run import command_failed

HEADER_BYTES = 10
"""``struct virtio_net_hdr`` (virtio 1.2, 5.1.6) without the number of merged buffers"""
PLAIN = bytes(HEADER_BYTES)
"""header of a frame that is complete as it is"""
LONGEST_BYTES = HEADER_BYTES + 14 + 4 + 65535
RECEIVER, SENDER = slice(HEADER_BYTES, HEADER_BYTES + 6), slice(HEADER_BYTES + 6, HEADER_BYTES + 12)
"""where the MACs are in a frame"""
OUTGOING = 4
"""third part of a received frame's address: it leaves by the interface (packet(7), PACKET_OUTGOING)"""

_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_VNET_HEADER, _IGNORE_OUTGOING = 15, 23
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_LOAD_BYTE, _LOAD_HALF, _LOAD_WORD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x30, 0x28, 0x20, 0x15, 0x45, 0x06
_PACKET_TYPE = 0xFFFFF004
"""where a filter finds in which direction a frame passes: SKF_AD_OFF + SKF_AD_PKTTYPE (linux/filter.h)"""

Instruction = tuple[int, int, int, int]
"""of classic BPF: code, how many to skip if true, if false, constant"""
Program = Sequence[Instruction]


class _Filter(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_void_p))


def attach(receiving: socket.socket, program: Program) -> None:
    """Let a socket have only the frames that the program lets through (socket(7), SO_ATTACH_FILTER)."""
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    lines = _Filter(len(program), ctypes.cast(buffer, ctypes.c_void_p))
    receiving.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, bytes(lines))


def sent_by(macs: Iterable[str], *, most_bytes: int = 0xFFFF) -> Program:
    """Frames from these MACs, cut off after ``most_bytes``."""
    lines: list[tuple[int, int, int, int]] = []
    for mac in macs:
        sender = bytes.fromhex(mac.replace(":", ""))
        lines += [
            (_LOAD_WORD, 0, 0, 6),
            (_JUMP_EQUAL, 0, 3, int.from_bytes(sender[:4], "big")),
            (_LOAD_HALF, 0, 0, 10),
            (_JUMP_EQUAL, 0, 1, int.from_bytes(sender[4:], "big")),
            (_RETURN, 0, 0, most_bytes),
        ]
    return [*lines, (_RETURN, 0, 0, 0)]


def leaving(*, to_groups_only: bool = False) -> Program:
    """Frames that leave by the interface: at a tap, to the machine. ``to_groups_only``: broadcast and multicast."""
    groups = [(_LOAD_BYTE, 0, 0, 0), (_JUMP_SET, 0, 1, 1)] if to_groups_only else []
    lines = [(_LOAD_BYTE, 0, 0, _PACKET_TYPE), (_JUMP_EQUAL, 0, 1 + len(groups), OUTGOING)]
    return [*lines, *groups, (_RETURN, 0, 0, 0x40000), (_RETURN, 0, 0, 0)]


def open_packet(interface: str, *, program: Program | None, receive_bytes: int = 0) -> socket.socket:
    """Return a non-blocking socket at ``interface`` that takes and gives frames with their header.

    ``program``: what it receives; None: nothing, it only sends. ``receive_bytes``: how much may wait in it, counted as
    the kernel does (socket(7), SO_RCVBUFFORCE). Raise ``CommandFailed``.
    """
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        opened.setsockopt(_SOL_PACKET, _VNET_HEADER, 1)
        if program is not None:
            attach(opened, program)
        if receive_bytes:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_bytes)
        opened.bind((interface, 0 if program is None else _ETH_P_ALL))
    except OSError as error:
        opened.close()
        raise command_failed(["packet socket", interface], error.errno or -1, str(error.strerror)) from error
    return opened


def open_capture(interface: str, program: Program, *, buffer_bytes: int) -> socket.socket:
    """Return a non-blocking socket that gets the frames, without a header, that come *in* at ``interface``.

    What goes out there is not looked at: for that the kernel would copy the head of every such frame. What does not fit
    ``buffer_bytes`` is lost. Raise ``CommandFailed``, also without such an interface.
    """
    capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        capture.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
        capture.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        attach(capture, program)
        capture.bind((interface, _ETH_P_ALL))
    except OSError as error:
        capture.close()
        raise command_failed(["capture", interface], error.errno or -1, str(error.strerror)) from error
    return capture


def close_later(opened: socket.socket) -> None:
    """Close a packet socket in a thread: the kernel waits until no processor looks at it any more, some 10 ms."""
    asyncio.get_running_loop().run_in_executor(None, opened.close)
