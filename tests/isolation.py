"""Puts the whole test session into network and mount namespaces of its own, where it may, with labs of its own.

What tests make and break there is never the machine's: other people's labs, containers and networks are out of sight,
their coming and going is not mistaken for a leak, two sessions may use the same names at the same time, and the kernel
clears all that is left when a session ends. Without root there is nothing to isolate: such tests as can run then make
no namespaces.

To look into a running session from a shell: ``nsenter --target PID --net --mount``.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import tempfile
from pathlib import Path

import pytest

NETNS = Path("/run/netns")
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job: tests press Ctrl-C, and it is inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.geteuid() == 0:
        isolate()
    labs = Path(tempfile.mkdtemp(prefix="emp-tests-", dir="/var/tmp"))  # on a disk, which /tmp may not be
    labs.chmod(0o755)
    config.add_cleanup(lambda: shutil.rmtree(labs, ignore_errors=True))
    os.environ["EMP_LAB_DIR"] = str(labs / "labs")
    os.environ["EMP_CONTEXT_DIR"] = str(labs / "contexts")


def isolate() -> None:
    """Move this process, and all that it starts from now on, into new namespaces with loopback up and no named ones.

    :raises OSError: root without CAP_SYS_ADMIN, as in an unprivileged container: EMP's lab cannot run there either
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def must(result: int, doing: str) -> None:
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(
                number, f"{doing}: {os.strerror(number)}; as root, tests need a privileged container or machine"
            )

    must(libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET), "entering namespaces for the tests")
    must(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None), "keeping the tests' mounts to themselves")
    # All of /run: a mount on the machine's own /run/netns is gone as soon as somebody removes that directory.
    must(libc.mount(b"emp-tests", b"/run", b"tmpfs", 0, b"mode=0755"), "hiding the machine's named namespaces")
    NETNS.mkdir()
    # Where it is no mount of its own, the first named namespace makes it one, which a test would be blamed for.
    must(libc.mount(b"emp-tests", bytes(NETNS), b"tmpfs", 0, None), "making room for named namespaces")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))
