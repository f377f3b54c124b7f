"""Finds an attached volume by asking the volume service what it has attached to this node.

For a cloud whose volumes do not become devices of the node's kernel: the lab's, whose data is served over NBD. The
service tells a node's agent of that node's volumes alone, each with the serial and the size that it shows there.

``GET /devices`` -> [``Device``]
"""

from __future__ import annotations

from emp.model.base import Model
from emp.model.errors import Refused, Unavailable
from emp.model.names import format_size
from emp.model.volume import NbdEndpoint, Volume
from emp.wire.http import WireClient

PATH = "/devices"


class Device(Model):
    """A volume as it shows at one node."""

    serial: str
    size_bytes: int
    endpoint: NbdEndpoint


class ServiceResolver:
    """See ``emp.volumes.base.DeviceResolver``. ``client`` speaks as the node's agent."""

    def __init__(self, client: WireClient) -> None:
        self._client = client

    async def resolve(self, volume: Volume) -> NbdEndpoint:
        devices = await self._client.request("GET", PATH, response_model=tuple[Device, ...])
        found = [device for device in devices if device.serial == volume.serial]
        if not found:
            hint = "it shows a moment after it was attached; ask again"
            raise Unavailable(f"no device here has the serial {volume.serial}", field="volume", hint=hint)
        if len(found) > 1:
            names = ", ".join(device.endpoint.export for device in found)
            hint = "a serial is one volume's alone: look at the node before anything is opened"
            raise Refused(f"{names} have the serial {volume.serial}", field="volume", hint=hint)
        (device,) = found
        if device.size_bytes != volume.size_bytes:
            shown, wanted = format_size(device.size_bytes), format_size(volume.size_bytes)
            message = f"{device.endpoint.export} has the serial {volume.serial} and {shown} ({device.size_bytes} bytes)"
            hint = "do not open it; if the volume was resized, renew its record"
            raise Refused(f"{message}, not {wanted}", field="size_bytes", hint=hint)
        return device.endpoint

    async def aclose(self) -> None:
        await self._client.aclose()
