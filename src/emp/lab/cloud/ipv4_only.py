"""Runs a program that gets no IPv6 sockets: ``python -S -m emp.lab.cloud.ipv4_only PROGRAM ARGUMENTS...``

nfs-ganesha listens on every address, whatever ``Bind_addr`` says, wherever it gets an IPv6 socket (measured with 4.3),
and a mount target is one address among others of the same machine. So the kernel is told to refuse it one, by a seccomp
filter (seccomp(2)), as it would where IPv6 is switched off. The program takes this process over.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from typing import NoReturn

MODULE = "emp.lab.cloud.ipv4_only"

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
    (_JUMP_IF_EQUAL, 0, 1, int(socket.AF_INET6)),
    (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
    (_RETURN, 0, 0, _ALLOW),
)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def refuse_ipv6() -> None:
    """Refuse this process, and what it becomes, every new IPv6 socket; needs root. Raises ``OSError``."""
    code = b"".join(struct.pack("HBBI", *step) for step in FILTER)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(FILTER), ctypes.addressof(buffer))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(program), 0, 0) != 0:
        code_ = ctypes.get_errno()
        raise OSError(code_, f"seccomp: {os.strerror(code_)}")


def main(argv: list[str]) -> NoReturn:
    refuse_ipv6()
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1:])
