"""What may be done with volumes, whoever asks: the rules of attaching and fencing, and their order on disk.

Each change is first on disk, then made: a daemon that is killed between the two finds on its next start what to open
and what to end.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from emp.model.errors import (
    AlreadyExists,
    BadInput,
    Conflict,
    HostError,
    NotFound,
    StaleEpoch,
    Unavailable,
)
from emp.model.volume import Attachment, ClaimPoint, NbdEndpoint, Volume
from emp.volumes.server.config import Config
from emp.volumes.server.disk import copy_image, grow, make_sparse
from emp.volumes.server.epochs import EPOCH_LOG, EpochLog
from emp.volumes.server.export import Export, ExportSpec, end_strays
from emp.volumes.server.protocol import CreateVolume, check_volume_id, serial_of
from emp.volumes.server.state import AttachmentRecord, State, VolumeRecord
from emp.volumes.server.tls import write_tls_directory
from emp.wire.files import make_private_dir
from emp.wire.pki import Credentials

log = logging.getLogger(__name__)

MAX_NODES = 16
"""that may hold a multi-attach volume at once; the cloud's own limit for io2"""


@dataclass(frozen=True)
class Counts:
    """For the metrics."""

    volumes: int
    attachments: int
    restarts: int


class VolumeService:
    """The volumes in one directory. ``start`` serves what was attached; ``stop`` ends every export, forgets nothing."""

    def __init__(self, config: Config, credentials: Credentials, *, epochs: EpochLog | None = None) -> None:
        self._config = config
        self._credentials = credentials
        self._images = config.state_dir / "images"
        self._run = config.state_dir / "run"
        self._tls = config.state_dir / "tls"
        self._state = State(config.state_dir / "state.json")
        self._epochs = epochs or EpochLog(config.state_dir / EPOCH_LOG)
        self._exports: dict[str, Export] = {}
        self._restarts_of_closed = 0
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._lock_fd: int | None = None

    async def start(self) -> None:
        """Raise ``Conflict`` if another daemon works on this directory, ``HostError`` if its records are damaged."""
        for directory in (self._config.state_dir, self._images, self._run):
            make_private_dir(directory)
        self._lock_fd = _lock(self._config.state_dir / "lock")
        write_tls_directory(self._credentials, self._tls)
        self._state.load()
        attached = [(volume, record) for volume in self._state.volumes.values() for record in volume.attachments]
        await end_strays(self._run, {self._spec(volume, record).pid_file for volume, record in attached})
        opened = await asyncio.gather(
            *(self._open(volume, record) for volume, record in attached), return_exceptions=True
        )
        for result in opened:
            if isinstance(result, BaseException) and not isinstance(result, HostError):
                raise result

    async def stop(self) -> None:
        exports, self._exports = self._exports, {}
        await asyncio.gather(*(export.close() for export in exports.values()))
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def list(self) -> tuple[Volume, ...]:
        return tuple(self._volume(record) for record in self._state.volumes.values())

    def describe(self, volume: str) -> Volume:
        """Raise ``NotFound``."""
        return self._volume(self._record(volume))

    def counts(self) -> Counts:
        restarts = self._restarts_of_closed + sum(export.restarts for export in self._exports.values())
        return Counts(len(self._state.volumes), len(self._exports), restarts)

    async def create(self, volume: str, order: CreateVolume) -> Volume:
        """Make a volume of zeros, sparse, or from an image. Raise ``AlreadyExists`` if there is another one of that id.

        Raise ``NotFound`` without that image, ``BadInput`` if it does not fit.
        """
        check_volume_id(volume)
        async with self._locks[volume]:
            known = self._state.volumes.get(volume)
            if known is None:
                if order.image is None:
                    make_sparse(self._image(volume), order.size_bytes)
                else:
                    await asyncio.to_thread(
                        copy_image, self._source(order.image), self._image(volume), order.size_bytes
                    )
                known = VolumeRecord(id=volume, type=order.type, size_bytes=order.size_bytes, image=order.image)
                self._state.put(known)
            elif (known.type, known.size_bytes, known.image) != (order.type, order.size_bytes, order.image):
                raise AlreadyExists(f"{volume} exists with {known.size_bytes} bytes, type {known.type}", field="volume")
            return self._volume(known)

    async def resize(self, volume: str, size_bytes: int) -> Volume:
        """Make it bigger; exports that are open keep the size that they began with. Idempotent. Raise ``BadInput``."""
        async with self._locks[volume]:
            known = self._record(volume)
            if size_bytes < known.size_bytes:
                raise BadInput(
                    f"{volume} has {known.size_bytes} bytes and cannot shrink to {size_bytes}",
                    field="size_bytes",
                    hint="volumes only grow",
                )
            if size_bytes > known.size_bytes:
                grow(self._image(volume), size_bytes)  # before the record: it must never promise what is not there
                known = known.model_copy(update={"size_bytes": size_bytes})
                self._state.put(known)
            return self._volume(known)

    async def delete(self, volume: str) -> None:
        """Raise ``Conflict`` while it is attached. Idempotent."""
        check_volume_id(volume)
        async with self._locks[volume]:
            known = self._state.volumes.get(volume)
            if known is not None:
                if known.attachments:
                    nodes = ", ".join(sorted({attachment.node for attachment in known.attachments}))
                    raise Conflict(f"{volume} is attached to {nodes}", field="volume", hint="detach it first")
                self._image(volume).unlink(missing_ok=True)  # before the record goes: or nobody would know of it
                self._state.drop(volume)

    async def attach(self, volume: str, *, node: str, epoch: int) -> Attachment:
        """Open the volume to ``node``; return when it can connect.

        Raise ``StaleEpoch`` below the fence, ``Conflict`` if too many nodes hold it (one, unless it is multi-attach),
        ``Unavailable`` without a free port, ``HostError`` if it cannot be served.
        """
        async with self._locks[volume]:
            known = self._record(volume)
            if epoch < known.fence:
                raise _stale(known, epoch)
            record = known.find(node, epoch)
            if record is None:
                _check_nodes(known, node)
                record = AttachmentRecord(node=node, epoch=epoch, port=self._free_port())
                known = known.model_copy(update={"attachments": (*known.attachments, record)})
                self._state.put(known)
                self._epochs.note("attach", known.id, node=node, epoch=epoch, tag=record.tag)
                try:
                    await self._open(known, record)
                except HostError:
                    await self._close(known, (record,))
                    raise
            else:
                await self._open(known, record)
            return self._attachment(known, record)

    async def detach(self, volume: str, *, node: str, epoch: int) -> None:
        """Close it; return when nothing can be written through it. Idempotent; another epoch is not touched."""
        async with self._locks[volume]:
            known = self._state.volumes.get(volume)
            if known is not None and (record := known.find(node, epoch)):
                await self._close(known, (record,))

    async def fence(self, volume: str, *, epoch: int) -> None:
        """Refuse epochs older than ``epoch`` from now on, and close what they hold. It only ever rises."""
        async with self._locks[volume]:
            known = self._record(volume)
            if epoch > known.fence:
                known = known.model_copy(update={"fence": epoch})
                await self._shut_out(known, "fence", epoch=epoch)

    async def claim(self, volume: str, *, node: str, epoch: int) -> Attachment:
        """Have ``node`` hold its attachment under ``epoch``, and shut out every older one. Same again, same answer.

        For a target that has activated (its attachment was a candidate until now), and for a source that went back and
        re-tags the live session of its running guest. It is on disk before anything is closed. Raise ``StaleEpoch``
        when a newer epoch has been claimed or fenced, ``Conflict`` when nothing is attached to ``node``.
        """
        async with self._locks[volume]:
            known = self._record(volume)
            if epoch < known.fence:
                raise _stale(known, epoch)
            held = max((a for a in known.attachments if a.node == node), key=lambda a: a.tag, default=None)
            if held is None:
                raise Conflict(f"{volume} is not attached to {node}", field="node", hint="it has been shut out")
            if held.tag > epoch:
                raise StaleEpoch(
                    f"{node} holds {volume} under {held.tag}, newer than {epoch}", field="epoch", fence=known.fence
                )
            claimed = held.model_copy(update={"claimed": epoch})
            if (known.fence, held.tag) != (epoch, epoch):
                others = tuple(claimed if a == held else a for a in known.attachments)
                known = known.model_copy(update={"fence": epoch, "attachments": others})
                await self._shut_out(known, "claim", node=node, epoch=held.epoch, tag=epoch)
            return self._attachment(known, claimed)

    async def _open(self, known: VolumeRecord, record: AttachmentRecord) -> None:
        name = _export_name(known, record)
        if name not in self._exports:
            self._exports[name] = Export(self._spec(known, record))
        await self._exports[name].open()

    async def _close(self, known: VolumeRecord, gone: tuple[AttachmentRecord, ...]) -> None:
        """Put ``known`` without ``gone`` on disk, then end the exports."""
        self._state.put(_without(known, gone))
        await self._end(known, gone)

    async def _shut_out(self, known: VolumeRecord, event: str, **what: str | int) -> None:
        """Put ``known`` without what is older than its fence on disk, then end those exports."""
        older = tuple(record for record in known.attachments if record.tag < known.fence)
        self._state.put(_without(known, older))
        self._epochs.note(event, known.id, **what)
        await self._end(known, older)

    async def _end(self, known: VolumeRecord, gone: tuple[AttachmentRecord, ...]) -> None:
        exports = [self._exports.pop(_export_name(known, record), None) for record in gone]
        await asyncio.gather(*(export.close() for export in exports if export))
        self._restarts_of_closed += sum(export.restarts for export in exports if export)
        for record in gone:
            self._epochs.note("close", known.id, node=record.node, epoch=record.epoch, tag=record.tag)

    def _record(self, volume: str) -> VolumeRecord:
        try:
            return self._state.volumes[check_volume_id(volume)]
        except KeyError:
            raise NotFound(f"there is no volume {volume}", field="volume") from None

    def _volume(self, known: VolumeRecord) -> Volume:
        return Volume(
            id=known.id,
            type=known.type,
            size_bytes=known.size_bytes,
            image=known.image,
            serial=serial_of(known.id),
            attachments=tuple(self._attachment(known, record) for record in known.attachments),
        )

    def _attachment(self, known: VolumeRecord, record: AttachmentRecord) -> Attachment:
        endpoint = NbdEndpoint(
            host=self._config.address,
            port=record.port,
            export=_export_name(known, record),
            tls_hostname=self._credentials.identity.cn,
        )
        return Attachment(
            volume=known.id,
            node=record.node,
            epoch=record.epoch,
            endpoint=endpoint,
            claimed=record.claimed,
            claim=ClaimPoint(url=self._url, server_name=self._credentials.identity.cn),
        )

    @property
    def _url(self) -> str:
        address = self._config.address
        return f"https://{f'[{address}]' if ':' in address else address}:{self._config.port}"

    def _spec(self, known: VolumeRecord, record: AttachmentRecord) -> ExportSpec:
        name = _export_name(known, record)
        return ExportSpec(
            name=name,
            node=record.node,
            image=self._image(known.id),
            address=self._config.address,
            port=record.port,
            tls_directory=self._tls,
            pid_file=self._run / f"{name}.pid",
        )

    def _image(self, volume: str) -> Path:
        return self._images / f"{volume}.raw"

    def _source(self, image: str) -> Path:
        there = (
            {path.stem: path for path in sorted(self._config.images_dir.glob("*.raw"))}
            if self._config.images_dir
            else {}
        )
        if image not in there:
            hint = f"images here: {', '.join(there) or 'none'}"
            raise NotFound(f"the volume server has no image {image!r}", field="image", hint=hint)
        return there[image]

    def _free_port(self) -> int:
        first, last = self._config.nbd_ports
        taken = {record.port for volume in self._state.volumes.values() for record in volume.attachments}
        for port in range(first, last + 1):
            if port not in taken and _is_free(self._config.address, port):
                return port
        raise Unavailable(
            f"all ports from {first} to {last} are taken",
            hint="detach volumes, or widen nbd_ports in the configuration",
        )


def _without(known: VolumeRecord, gone: tuple[AttachmentRecord, ...]) -> VolumeRecord:
    return known.model_copy(update={"attachments": tuple(a for a in known.attachments if a not in gone)})


def _stale(known: VolumeRecord, epoch: int) -> StaleEpoch:
    return StaleEpoch(
        f"{known.id} is fenced: epoch {epoch} is older than {known.fence}", field="epoch", fence=known.fence
    )


def _export_name(known: VolumeRecord, record: AttachmentRecord) -> str:
    return f"{known.id}.{record.node}.{record.epoch}"


def _check_nodes(known: VolumeRecord, node: str) -> None:
    nodes = {attachment.node for attachment in known.attachments} | {node}
    limit = MAX_NODES if known.type.multi_attach else 1
    if len(nodes) > limit:
        others = ", ".join(sorted(nodes - {node}))
        raise Conflict(f"{known.id} is attached to {others}, and type {known.type} takes {limit} at once", field="node")


def _is_free(address: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, port), family=family).close()
    except OSError:
        return False
    return True


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Conflict(f"another volume server works in {path.parent}", field="state_dir") from None
    return descriptor
