"""The Linux calls behind a place that Python 3.11 has no function for: namespaces and mounts.

A failure is an ``OSError`` naming the path. Numbers are those of ``linux/sched.h``, ``linux/mount.h`` and the system
call table (the newer calls have one number on every architecture).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SHARED = 0x100000
MNT_DETACH = 2

_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, path: str | None = None) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(ctypes.c_int(flags)))


def join_namespace(path: str, kind: int) -> None:
    """Enter the namespace that ``path`` stands for; ``kind`` is its CLONE_ flag."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)), path)
    finally:
        os.close(descriptor)


def in_network(path: str, work: Callable[[], T]) -> T:
    """Do ``work`` in the network namespace that ``path`` stands for, and return or raise what it does.

    Network namespaces belong to threads: one of its own leaves ours and ends there.
    """

    def visit() -> T:
        join_namespace(path, CLONE_NEWNET)
        return work()

    with ThreadPoolExecutor(1, thread_name_prefix=f"in {path}") as visitor:
        return visitor.submit(visit).result()


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    names = source.encode(), os.fsencode(target), kind and kind.encode()
    _check(_libc.mount(*names, ctypes.c_ulong(flags), options.encode() or None), target)


def unmount(target: str, flags: int = 0) -> None:
    _check(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), target)


def clone_tree(path: str) -> int:
    """Return a descriptor of a copy of the mount at ``path``, not yet anywhere in the tree (open_tree(2))."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    return _check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, ctypes.c_char_p(os.fsencode(path)), flags), path)


def attach_tree(descriptor: int, target: str) -> None:
    """Mount what ``clone_tree`` returned at ``target`` and close the descriptor."""
    try:
        _check(
            _libc.syscall(
                _SYS_MOVE_MOUNT,
                descriptor,
                b"",
                _AT_FDCWD,
                ctypes.c_char_p(os.fsencode(target)),
                _MOVE_MOUNT_F_EMPTY_PATH,
            ),
            target,
        )
    finally:
        os.close(descriptor)


def set_read_only(where: str | int, *, recursive: bool = False) -> None:
    """Make a mount (a path, or a descriptor of ``clone_tree``) read-only, with all below it if ``recursive``."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY, 0, 0, 0)  # set, clear, propagation, user namespace
    flags = _AT_RECURSIVE if recursive else 0
    directory, path = (_AT_FDCWD, where) if isinstance(where, str) else (where, "")
    if not path:
        flags |= _AT_EMPTY_PATH
    _check(
        _libc.syscall(
            _SYS_MOUNT_SETATTR,
            directory,
            ctypes.c_char_p(os.fsencode(path)),
            flags,
            ctypes.c_char_p(attributes),
            ctypes.c_size_t(len(attributes)),
        ),
        path or None,
    )


class Mount:
    """One line of proc_pid_mountinfo(5)."""

    def __init__(self, line: str) -> None:
        fields = line.split()
        after = fields.index("-")
        self.number = int(fields[0])
        self.parent = int(fields[1])
        self.device = fields[2]
        self.root = _unescape(fields[3])
        self.point = _unescape(fields[4])
        self.options = frozenset(fields[5].split(","))
        self.kind = fields[after + 1]
        self.source = _unescape(fields[after + 2])
        self.super_options = frozenset(fields[after + 3].split(","))

    @property
    def writable(self) -> bool:
        return "ro" not in self.options and "ro" not in self.super_options


def mounts(mountinfo: str = "/proc/self/mountinfo") -> list[Mount]:
    """Return every mount of a mount namespace, parents before children."""
    return [Mount(line) for line in Path(mountinfo).read_text().splitlines()]


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
