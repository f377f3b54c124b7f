"""Storage that needs no attachment: one URL that every node reaches, such as an NBD server or a Ceph cluster.

The pool is told of it and does not make it; deleting such a volume makes the pool forget it and touches nothing on it.
An attachment is a note of who has been given the URL, and under which epoch. There is no service that could shut a node
out, so ``fence`` refuses: an EVM with such a volume starts elsewhere only behind RETIRED or proof that its node is off
(rule R8), which the controller demands for every EVM, and here it is the only wall.

A volume's id is made of its URL, so that one storage cannot be two volumes, which two EVMs would write to.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from emp.model.errors import AlreadyExists, BadInput, Conflict, NotFound, Refused, StaleEpoch, Unreachable
from emp.model.names import check_name, format_size
from emp.model.volume import Attachment, NbdEndpoint, Volume, VolumeType
from emp.volumes.shared_url import format_url, parse_url, storage_of

PREFIX = "shared-"
SECTOR_BYTES = 512
_ID = re.compile(PREFIX + "[0-9a-f]{12}")


class Registry(Protocol):
    """Where the volumes are remembered, on disk."""

    def all(self) -> Sequence[Volume]: ...

    def find(self, volume: str) -> Volume | None: ...

    async def change(self, volume: str, update: Callable[[Volume | None], Volume | None]) -> None:
        """Write what ``update`` makes of the record, in one step; None: no record. It may raise, and is called again
        where the record has changed meanwhile."""
        ...


class SharedVolumeDriver:
    """See ``emp.volumes.base.VolumeDriver``. ``size_of`` asks an NBD server how large an export is."""

    name = "shared"
    move_s = None

    def __init__(self, registry: Registry, size_of: Callable[[NbdEndpoint], Awaitable[int]]) -> None:
        self._registry = registry
        self._size_of = size_of

    async def register(self, url: str, *, size_bytes: int | None = None) -> Volume:
        """Tell the pool of storage that is there. The size is read where it can be, and must be the one given.

        Raises ``BadInput`` for a URL that is none, ``AlreadyExists``, ``Refused`` where the size is another one, or the
        server has no such export or is not believed, ``Unreachable`` where the size can neither be read nor was given.
        """
        where = parse_url(url)
        name = PREFIX + hashlib.sha256(storage_of(where).encode()).hexdigest()[:12]
        self._check_new(name, self._registry.find(name))
        size = _check_size(await self._size(where, size_bytes) if isinstance(where, NbdEndpoint) else size_bytes)
        made = Volume(
            id=name, type=VolumeType.SHARED, size_bytes=size, serial=name.replace("-", ""), url=format_url(where)
        )

        def record(old: Volume | None) -> Volume:
            self._check_new(name, old)
            return made

        await self._registry.change(name, record)
        return made

    @staticmethod
    def _check_new(volume: str, known: Volume | None) -> None:
        if known is not None:
            hint = f"see: emp volume show {volume}"
            raise AlreadyExists(f"this storage is the volume {volume} already", field="url", hint=hint)

    async def _size(self, where: NbdEndpoint, wanted_bytes: int | None) -> int:
        try:
            found_bytes = await self._size_of(where)
        except Unreachable as error:
            if wanted_bytes is not None:
                return wanted_bytes  # the nodes' network need not be the controller's
            hint = "see that it is served under TLS with a certificate of the pool's CA, or say --size"
            raise Unreachable(error.message, field="url", hint=hint) from error
        if wanted_bytes not in (None, found_bytes):
            raise Refused(
                f"the export has {found_bytes} bytes ({format_size(found_bytes)}), not {wanted_bytes}",
                field="size",
                hint="leave the size out, or name the export that was meant",
            )
        return found_bytes

    async def create(
        self,
        *,
        type: VolumeType,  # noqa: A002 - the protocol's name
        size_bytes: int,
        image: str | None = None,
    ) -> Volume:
        """Raise ``BadInput``: nothing is made here."""
        raise BadInput(f"shared storage is not made by the pool: {type}", field="type", hint="register its URL")

    async def describe(self, volume: str) -> Volume:
        if (known := self._registry.find(_check_id(volume))) is None:
            raise _unknown(volume)
        return known

    async def list(self) -> tuple[Volume, ...]:
        return tuple(self._registry.all())

    async def delete(self, volume: str) -> None:
        """Forget it; what is on it stays."""

        def forget(old: Volume | None) -> None:
            if old is not None and old.attachments:
                nodes = ", ".join(sorted({attachment.node for attachment in old.attachments}))
                raise Conflict(f"{volume} is attached to {nodes}", field="volume", hint="detach it first")

        await self._registry.change(_check_id(volume), forget)

    async def expect(self, volume: str, *, node: str, epoch: int) -> None:
        """Attaching is a note."""

    async def attach(self, volume: str, *, node: str, epoch: int) -> Attachment:
        """Note who is given the URL: one note for each node, under its newest epoch. Raises ``StaleEpoch``."""
        if epoch < 1:
            raise BadInput(f"{epoch} is no epoch", field="epoch", hint="epochs begin at 1")
        where = parse_url((await self.describe(volume)).url or "")
        made = Attachment(volume=volume, node=check_name(node, field="node"), epoch=epoch, endpoint=where)

        def add(old: Volume | None) -> Volume:
            if old is None:
                raise _unknown(volume)
            newer = [a.epoch for a in old.attachments if a.node == node and a.epoch > epoch]
            if newer:
                raise StaleEpoch(f"{node} has {volume} under {newer[0]}, newer than {epoch}", field="epoch")
            others = (a for a in old.attachments if a.node != node)
            return old.model_copy(update={"attachments": (*others, made)})

        await self._registry.change(volume, add)
        return made

    async def resize(self, volume: str, size_bytes: int) -> Volume:
        """Take over the size that it has grown to, which is read where it can be. Nothing is made bigger here."""
        known = await self.describe(volume)
        where = parse_url(known.url or "")
        if size_bytes < known.size_bytes:
            hint = "a guest may have data behind the new end"
            raise BadInput(f"{volume} has {known.size_bytes} bytes, and cannot shrink", field="size_bytes", hint=hint)
        if isinstance(where, NbdEndpoint):
            size_bytes = await self._size(where, size_bytes)

        def grow(old: Volume | None) -> Volume:
            if old is None:
                raise _unknown(volume)
            return old.model_copy(update={"size_bytes": _check_size(size_bytes)})

        await self._registry.change(volume, grow)
        return await self.describe(volume)

    async def detach(self, volume: str, *, node: str, epoch: int, unheld: bool = False) -> None:
        """Note that the node has let go. Nothing is closed: it must have, or be off."""

        def remove(old: Volume | None) -> Volume | None:
            if old is None:
                return None
            left = tuple(a for a in old.attachments if (a.node, a.epoch) != (node, epoch))
            return old.model_copy(update={"attachments": left})

        await self._registry.change(_check_id(volume), remove)

    async def fence(self, volume: str, *, epoch: int, unheld: bool = False) -> None:
        """Raise ``Refused``, or ``NotFound``: nobody can be shut out of it."""
        await self.describe(volume)
        raise Refused(
            f"nothing can shut a node out of {volume}, which every node reaches by its URL; not below {epoch} either",
            field="volume",
            hint="prove the node off: emp node fence",
        )

    async def obstacles(self, volumes: Sequence[str], *, nodes: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
        """Nothing is known here: a node that does not reach it finds out when its QEMU opens it."""
        return {}

    async def aclose(self) -> None: ...


def _check_id(volume: str) -> str:
    if not _ID.fullmatch(volume):
        raise BadInput(f"{volume[:40]!r} is not the id of shared storage", field="volume", hint="see: emp volume list")
    return volume


def _check_size(size_bytes: int | None) -> int:
    if size_bytes is None:
        raise BadInput("the size of this storage cannot be read", field="size", hint="say --size, such as 8GiB")
    if size_bytes < SECTOR_BYTES or size_bytes % SECTOR_BYTES:
        hint = f"a multiple of {SECTOR_BYTES} bytes"
        raise Refused(f"a disk of {size_bytes} bytes has no whole number of sectors", field="size", hint=hint)
    return size_bytes


def _unknown(volume: str) -> NotFound:
    return NotFound(f"there is no volume {volume}", field="volume")
