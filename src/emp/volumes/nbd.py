"""The drivers for the pool's own volume service (``emp.volumes.server``): the controller's, and the agent's claims."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence

from emp.model.errors import BadInput, Unavailable
from emp.model.names import check_name, format_size
from emp.model.volume import Attachment, ClaimPoint, Volume, VolumeType
from emp.volumes.server.protocol import (
    PREFIX,
    SIZE_STEP_BYTES,
    Claim,
    CreateVolume,
    Fence,
    Resize,
    check_volume_id,
    new_volume_id,
)
from emp.wire.http import WireClient
from emp.wire.identity import Identity

COPY_S = 60.0
"""for the service to copy an image"""


class NbdVolumeDriver:
    """See ``emp.volumes.base.VolumeDriver``. ``client`` speaks as the controller to the daemon of role ``volumes``.

    The service ends an export whoever has it open, so ``unheld`` makes no difference. Besides the errors named there:
    ``Unreachable`` and ``Unavailable``, after which the same order may be given again.
    """

    name = "nbd"
    move_s = 0.3
    """an export ends and another begins; pytest -s tests/contract/test_volumes.py -k quick_enough"""

    def __init__(self, client: WireClient) -> None:
        self._client = client

    async def create(
        self,
        *,
        type: VolumeType,  # noqa: A002 - the protocol's name
        size_bytes: int,
        image: str | None = None,
    ) -> Volume:
        path = _path(new_volume_id())
        order = CreateVolume(type=type, size_bytes=_in_steps(size_bytes), image=image)
        try:
            return await self._make(path, order)
        except Unavailable:
            # The answer may be lost and the volume made. Only now is its id known, so ask again at once.
            return await self._make(path, order)

    async def _make(self, path: str, order: CreateVolume) -> Volume:
        timeout_s = COPY_S if order.image else None
        return await self._client.request(
            "PUT", path, order, response_model=Volume, idempotent=True, timeout_s=timeout_s
        )

    async def describe(self, volume: str) -> Volume:
        return await self._client.request("GET", _path(volume), response_model=Volume)

    async def list(self) -> tuple[Volume, ...]:
        return await self._client.request("GET", PREFIX, response_model=tuple[Volume, ...])

    async def delete(self, volume: str) -> None:
        await self._client.request("DELETE", _path(volume), idempotent=True)

    async def resize(self, volume: str, size_bytes: int) -> Volume:
        order = Resize(size_bytes=_in_steps(size_bytes))
        return await self._client.request("PUT", f"{_path(volume)}/size", order, response_model=Volume, idempotent=True)

    async def expect(self, volume: str, *, node: str, epoch: int) -> None:
        """Attaching is one request."""

    async def attach(self, volume: str, *, node: str, epoch: int) -> Attachment:
        path = _attachment_path(volume, node, epoch)
        return await self._client.request("PUT", path, response_model=Attachment, idempotent=True)

    async def detach(self, volume: str, *, node: str, epoch: int, unheld: bool = False) -> None:
        await self._client.request("DELETE", _attachment_path(volume, node, epoch), idempotent=True)

    async def fence(self, volume: str, *, epoch: int, unheld: bool = False) -> None:
        await self._client.request("PUT", f"{_path(volume)}/fence", Fence(epoch=epoch), idempotent=True)

    async def obstacles(self, volumes: Sequence[str], *, nodes: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
        """Every node is as good as another."""
        return {}

    async def aclose(self) -> None:
        await self._client.aclose()


class NbdVolumeClaims:
    """See ``emp.volumes.base.VolumeClaims``. ``tls`` shows the agent's certificate; connections stay open."""

    def __init__(self, tls: ssl.SSLContext) -> None:
        self._tls = tls
        self._clients: dict[ClaimPoint, WireClient] = {}

    async def claim(self, attachment: Attachment, *, epoch: int) -> None:
        point = attachment.claim
        if point is None:
            return
        client = self._clients.get(point)
        if client is None:
            server = Identity.parse(point.server_name)
            client = self._clients[point] = WireClient(point.url, tls=self._tls, server=server)
        await client.request("PUT", f"{_path(attachment.volume)}/claim", Claim(epoch=epoch), idempotent=True)

    async def aclose(self) -> None:
        for client in self._clients.values():
            await client.aclose()


def _in_steps(size_bytes: int) -> int:
    if size_bytes % SIZE_STEP_BYTES:
        hint = f"a multiple of {format_size(SIZE_STEP_BYTES)}"
        raise BadInput(f"{size_bytes} bytes is no size for a volume", field="size_bytes", hint=hint)
    return size_bytes


def _path(volume: str) -> str:
    return f"{PREFIX}/{check_volume_id(volume)}"


def _attachment_path(volume: str, node: str, epoch: int) -> str:
    return f"{_path(volume)}/attachments/{check_name(node, field='node')}/{epoch:d}"
