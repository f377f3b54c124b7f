"""What QEMU opens for a volume on this node: the endpoint that it was told of, or the device that has its serial.

A device shows a moment after the cloud says that it is attached, so it is waited for; one that has the serial and is
not the volume is never opened. Nothing is remembered: a device's name is good for one use.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from emp.hypervisor.base import BlockDevice
from emp.model.errors import HostError, Refused, Unavailable
from emp.model.names import format_size
from emp.model.orders import VolumeGrant
from emp.model.volume import HostDevice, NbdEndpoint, RbdImage, Volume
from emp.volumes.base import DeviceResolver, VolumeProbe

PATIENCE_S = 20.0
"""for the devices of one EVM to show; the controller waits longer for the answer to its order"""
PAUSE_S = 0.1

Source = NbdEndpoint | HostDevice
MakeProbe = Callable[[VolumeGrant], VolumeProbe]


class Devices:
    def __init__(self, resolver: DeviceResolver, *, patience_s: float = PATIENCE_S) -> None:
        self._resolver = resolver
        self._patience_s = patience_s

    async def open_all(self, grants: Sequence[VolumeGrant]) -> tuple[BlockDevice, ...]:
        """Return one device per grant, in their order, all of them within the one patience. Raises as ``open``."""
        deadline_s = self._deadline_s()
        return tuple([await self.open(grant, deadline_s=deadline_s) for grant in grants])

    async def open(
        self, grant: VolumeGrant, *, deadline_s: float | None = None, was_bytes: int | None = None
    ) -> BlockDevice:
        """Return what a volume is opened from; ``deadline_s``: by the loop's clock, to be waited for.

        ``was_bytes``: its size before it grew; a device that still shows that is waited for too.

        Raises ``HostError`` for a device that does not show, ``Refused`` for one that is not the volume.
        """
        volume, endpoint = grant.volume, grant.endpoint
        source = (
            endpoint
            if isinstance(endpoint, RbdImage)
            else await self.source(grant, deadline_s=deadline_s, was_bytes=was_bytes)
        )
        return BlockDevice(volume.id, volume.serial, volume.size_bytes, source)

    async def source(
        self, grant: VolumeGrant, *, deadline_s: float | None = None, was_bytes: int | None = None
    ) -> Source:
        """Return where this node reaches a volume, for others than QEMU. Raises as ``open``."""
        if isinstance(grant.endpoint, RbdImage):
            raise Refused(f"{grant.volume.id} is a Ceph image, which QEMU alone opens", field="volumes")
        if grant.endpoint is not None:  # of the volume service, or of the relay of the node that has it
            return grant.endpoint
        return await self._resolve(grant.volume, deadline_s or self._deadline_s(), was_bytes)

    async def aclose(self) -> None:
        await self._resolver.aclose()

    async def _resolve(self, volume: Volume, deadline_s: float, was_bytes: int | None) -> Source:
        clock = asyncio.get_running_loop().time
        while True:
            try:
                return _checked(volume, await self._resolver.resolve(volume))
            except Unavailable as error:
                if clock() >= deadline_s:
                    raise HostError(
                        f"{volume.id} does not show on this node: {error.message}",
                        field="volumes",
                        hint="see whether it is attached here, and what the node's kernel says of it",
                    ) from error
            except Refused:
                if was_bytes is None:
                    raise
                if clock() >= deadline_s or not await self._is_as_before(volume, was_bytes):
                    # It may have grown between the two looks.
                    return _checked(volume, await self._resolver.resolve(volume))
            await asyncio.sleep(PAUSE_S)  # sysfs tells nobody when something shows

    async def _is_as_before(self, volume: Volume, was_bytes: int) -> bool:
        """Whether the volume's device is here, and has not grown yet."""
        before = volume.model_copy(update={"size_bytes": was_bytes})
        try:
            _checked(before, await self._resolver.resolve(before))
        except (Refused, Unavailable):
            return False
        return True

    def _deadline_s(self) -> float:
        return asyncio.get_running_loop().time() + self._patience_s


def _checked(volume: Volume, found: Source) -> Source:
    """The last look before it is opened, whoever found it."""
    if isinstance(found, HostDevice) and (found.serial, found.size_bytes) != (volume.serial, volume.size_bytes):
        raise Refused(
            f"{found.path} is {found.serial} of {format_size(found.size_bytes)}, not {volume.serial} of "
            f"{format_size(volume.size_bytes)}",
            field="volumes",
            hint="do not open it: it is another device",
        )
    return found


class GrantProbe:
    """See ``emp.volumes.base.VolumeProbe``: of a volume that is looked for at the first read, and after each failure.

    ``make`` reads from what was found.
    """

    def __init__(self, devices: Devices, grant: VolumeGrant, make: Callable[[Source], VolumeProbe]) -> None:
        self._devices = devices
        self._grant = grant
        self._make = make
        self._probe: VolumeProbe | None = None

    async def read(self) -> None:
        if self._probe is None:
            now_s = asyncio.get_running_loop().time()
            self._probe = self._make(await self._devices.source(self._grant, deadline_s=now_s))
        try:
            await self._probe.read()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        probe, self._probe = self._probe, None
        if probe is not None:
            with contextlib.suppress(OSError):
                await probe.close()
