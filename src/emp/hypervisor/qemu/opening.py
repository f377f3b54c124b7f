"""Opens what a volume is read from, for a QEMU that may open nothing of the node itself: it gets the descriptors."""

from __future__ import annotations

import os
import stat

from emp.hypervisor.base import RelaySocket
from emp.model.errors import HypervisorError
from emp.model.volume import HostDevice


def open_device(device: HostDevice) -> int:
    """Return a descriptor of the node's block device; the caller closes it.

    Raises ``HypervisorError`` for what cannot be opened, is no block device, or is smaller than told: a name is no
    proof of what is behind it. ``O_DIRECT`` is in effect for whoever shares the descriptor, as QEMU will.
    """
    try:
        descriptor = os.open(device.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise HypervisorError(f"cannot open the volume's device {device.path}: {error.strerror}") from error
    try:
        if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
            raise HypervisorError(f"{device.path} is no block device")
        size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
        if size_bytes < device.size_bytes:
            raise HypervisorError(f"{device.path} has {size_bytes} bytes, and the volume {device.size_bytes}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_relays(socket: RelaySocket) -> int:
    """Return a descriptor of the directory that the relay's socket is in; the caller closes it.

    QEMU connects through it, now and whenever the relay has been started anew: the directory must let its user pass,
    and no directory above needs to. Raises ``HypervisorError``.
    """
    try:
        return os.open(socket.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise HypervisorError(f"cannot open the relay's directory {socket.path.parent}: {error.strerror}") from error
