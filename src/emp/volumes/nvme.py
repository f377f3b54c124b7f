"""Finds an EBS volume among the NVMe devices of a bare-metal node, by its serial.

A volume's serial is its id without the dash, and its first namespace is the volume:
https://docs.aws.amazon.com/ebs/latest/userguide/identify-nvme-ebs-device.html. Device names say nothing: they follow
the order in which devices answered, and one that is detached leaves its name to the next. Serial, model and size are
checked each time, and nothing is remembered. **Not run here on AWS**: tested on files laid out as the kernel has them.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from emp.model.errors import Refused, Unavailable
from emp.model.names import format_size
from emp.model.volume import HostDevice, Volume

MODEL = "Amazon Elastic Block Store"
SECTOR_BYTES = 512
"""what Linux counts in, whatever the device's own sectors are (``sector_t``, include/linux/types.h)"""


def find_device(volume: Volume, *, sysfs: Path, dev: Path) -> HostDevice:
    """Return the device that is ``volume``. Raises what ``emp.volumes.base.DeviceResolver`` says.

    Reads ``class/nvme`` and ``class/block`` below ``sysfs``; the device's path is below ``dev``.
    """
    controllers = [
        path for path in sorted((sysfs / "class/nvme").glob("nvme*")) if _read(path / "serial") == volume.serial
    ]
    if not controllers:
        hint = "it shows a moment after it was attached; ask again"
        raise Unavailable(f"no NVMe device here has the serial {volume.serial}", field="volume", hint=hint)
    if len(controllers) > 1:
        names = ", ".join(path.name for path in controllers)
        hint = "a serial is one volume's alone: look at the node before anything is opened"
        raise Refused(f"{names} have the serial {volume.serial}", field="volume", hint=hint)
    (controller,) = controllers
    if (model := _read(controller / "model")) != MODEL:
        message = f"{controller.name} has the serial {volume.serial} and is {model or 'of no model'}, not {MODEL}"
        raise Refused(message, field="volume", hint="do not open it: it is another device")
    name = f"{controller.name}n1"
    sectors = _read(sysfs / "class/block" / name / "size")
    if not sectors.isdecimal() or sectors == "0":
        hint = "it is coming or going; ask again"
        raise Unavailable(
            f"{controller.name} has the serial {volume.serial} and no size yet", field="volume", hint=hint
        )
    size_bytes = int(sectors) * SECTOR_BYTES
    if size_bytes != volume.size_bytes:
        found, wanted = format_size(size_bytes), format_size(volume.size_bytes)
        message = f"{name} has the serial {volume.serial} and {found} ({size_bytes} bytes), not {wanted}"
        raise Refused(message, field="size_bytes", hint="do not open it; if the volume was resized, renew its record")
    return HostDevice(path=str(dev / name), serial=volume.serial, size_bytes=size_bytes)


class NvmeResolver:
    """See ``emp.volumes.base.DeviceResolver``."""

    def __init__(self, *, sysfs: Path = Path("/sys"), dev: Path = Path("/dev")) -> None:
        self._sysfs = sysfs
        self._dev = dev

    async def resolve(self, volume: Volume) -> HostDevice:
        return await asyncio.to_thread(find_device, volume, sysfs=self._sysfs, dev=self._dev)

    async def aclose(self) -> None:
        """Nothing is kept open."""


def _read(path: Path) -> str:
    """Return a file's text without the blanks that NVMe pads its fields with; empty where it is gone."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
