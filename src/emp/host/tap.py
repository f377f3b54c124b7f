"""Tap devices: a network interface whose other end is a file descriptor.

A tap made here is **not persistent**: it lives exactly as long as a descriptor of it is open. The agent and QEMU
share one open file, so the tap survives the restart of either and is gone when both are. A second TUNSETIFF on a tap in
use is EBUSY; a restarted agent copies QEMU's descriptor (``find_taps``, ``processes.take_descriptor``), with the frames
queued on it.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

from emp.host import packet
from emp.host.run import command_failed
from emp.model.errors import MissingDependency

_TUN = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_TUNGETIFF = 0x800454D2
_TUNGETVNETHDRSZ = 0x800454D7
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFREQ = struct.Struct("16sH22x")


def open_tap(interface: str) -> int:
    """Make the tap ``interface`` and return its descriptor: non-blocking, closed on exec, with a virtio-net header.

    Raises ``MissingDependency`` without a usable /dev/net/tun, ``CommandFailed`` if the name is taken.
    """
    try:
        descriptor = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise MissingDependency(
            f"cannot open {_TUN}: {error.strerror}", hint="load the tun module and run as root"
        ) from error
    try:
        request = _IFREQ.pack(interface.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR)
        fcntl.ioctl(descriptor, _TUNSETIFF, request)
    except OSError as error:
        os.close(descriptor)
        raise command_failed(["TUNSETIFF", interface], error.errno or -1, str(error.strerror)) from error
    return descriptor


def tap_interface(descriptor: int) -> str:
    """Return the name of the interface behind a tap's descriptor; raise ``CommandFailed`` if it is none (any more)."""
    try:
        answer = fcntl.ioctl(descriptor, _TUNGETIFF, bytes(_IFREQ.size))
    except OSError as error:
        raise command_failed(["TUNGETIFF", str(descriptor)], error.errno or -1, str(error.strerror)) from error
    name: bytes = _IFREQ.unpack(answer)[0]
    return name.rstrip(b"\0").decode()


def header_bytes(descriptor: int) -> int:
    """Return the length of the virtio-net header before each frame: 10, or 12 once QEMU says so. Raise ``OSError``."""
    return int(struct.unpack("i", fcntl.ioctl(descriptor, _TUNGETVNETHDRSZ, bytes(4)))[0])


def read_frames(descriptor: int, most: int) -> list[bytes]:
    """Take up to ``most`` frames that wait for the machine, each with its header as ``emp.host.packet`` has it.

    Raise ``OSError`` when the tap is down or gone.
    """
    header, frames = header_bytes(descriptor), []
    for _ in range(most):
        try:
            data = os.read(descriptor, header + packet.LONGEST_BYTES)
        except BlockingIOError:
            break
        frames.append(data[: packet.HEADER_BYTES] + data[header:])
    return frames


def find_taps(pid: int) -> dict[str, int]:
    """Return interface name -> descriptor number *in that process*, of every tap that it holds; empty if it is gone."""
    found: dict[str, int] = {}
    try:
        for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
            for line in entry.read_text().splitlines():
                if line.startswith("iff:"):
                    found[line.partition(":")[2].strip()] = int(entry.name)
    except (FileNotFoundError, ProcessLookupError):
        return found
    return found
