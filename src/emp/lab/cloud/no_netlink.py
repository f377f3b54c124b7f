"""Runs a program that gets no netlink sockets: ``python -S -m emp.lab.cloud.no_netlink PROGRAM ARGUMENTS...``

nfs-ganesha reads ``Bind_addr`` by getaddrinfo(3), which gives it an IPv4 address on a machine without IPv6 addresses
and a mapped IPv6 one on others; and it binds by the kind of socket that it gets. Where the two differ it listens on
every address (measured with 4.3), and a mount target is one address among others of the same machine. glibc finds out
by netlink which machine it is, and takes it to have both where that is refused: then it is a mapped address on an IPv6
socket everywhere. So the kernel is told to refuse it, by a seccomp filter (seccomp(2)). The program takes this process
over.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from typing import NoReturn

MODULE = "emp.lab.cloud.no_netlink"

# linux/bpf_common.h, linux/seccomp.h, linux/audit.h; the offsets are those of struct seccomp_data
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_X86_64, _SOCKET = 0xC000003E, 41
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

FILTER = (
    (_LOAD, 0, 0, _ARCHITECTURE),
    (_JUMP_IF_EQUAL, 0, 5, _X86_64),
    (_LOAD, 0, 0, _NUMBER),
    (_JUMP_IF_EQUAL, 0, 3, _SOCKET),
    (_LOAD, 0, 0, _FIRST_ARGUMENT),
    (_JUMP_IF_EQUAL, 0, 1, int(socket.AF_NETLINK)),
    (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
    (_RETURN, 0, 0, _ALLOW),
)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def refuse_netlink() -> None:
    """Refuse this process, and what it becomes, every new netlink socket; needs root. Raises ``OSError``."""
    code = b"".join(struct.pack("HBBI", *step) for step in FILTER)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(FILTER), ctypes.addressof(buffer))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(program), 0, 0) != 0:
        code_ = ctypes.get_errno()
        raise OSError(code_, f"seccomp: {os.strerror(code_)}")


def main(argv: list[str]) -> NoReturn:
    refuse_netlink()
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
