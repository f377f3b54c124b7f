"""The pool's volumes: the service that holds them, and the controller's record of whose they are and where attached.

The volume service is the truth about a volume; the record adds the EVM that it belongs to, and lets people watch it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

from emp.controller.book import Book, Edit, VolumeWish, gone, put
from emp.controller.survey import Survey, expected_ms
from emp.controller.tasks import all_of
from emp.controller.volume_states import state_of
from emp.model.errors import BadInput, Conflict, EmpError, NotFound, StaleEpoch
from emp.model.names import format_size, parse_size
from emp.model.orders import VolumeGrant
from emp.model.volume import Attachment, Volume, VolumeType
from emp.volumes.base import SharedStorage, VolumeDriver

log = logging.getLogger(__name__)

MADE_TYPES = tuple(kind for kind in VolumeType if kind is not VolumeType.SHARED)
"""What the pool makes."""
SHOW_S = 5.0
"""for the service to say how one volume is; then its record is shown"""
SURVEY_S = 10.0
"""for the services to say what stands in the way of a migration"""
SMALLEST_BYTES = 1 << 20
SECTOR_BYTES = 4096


def check_size(size_bytes: int, *, field: str) -> int:
    """Return a size that a volume may have. Raises ``BadInput``."""
    if size_bytes < SMALLEST_BYTES or size_bytes % SECTOR_BYTES:
        raise BadInput(
            f"{size_bytes} bytes ({format_size(size_bytes)}) is no size for a volume",
            field=field,
            hint=f"at least {format_size(SMALLEST_BYTES)}, a multiple of {SECTOR_BYTES} bytes",
        )
    return size_bytes


def parse_wish(text: str, *, field: str) -> VolumeWish:
    """Read ``TYPE:SIZE`` or an id. Raises ``BadInput`` naming ``field``."""
    kind, is_new, size = text.partition(":")
    if not is_new:
        return VolumeWish(id=text)
    if kind not in MADE_TYPES:
        hint = f"{', '.join(f'{t}:SIZE' for t in MADE_TYPES)}, or the id of a volume"
        raise BadInput(f"{kind[:40]!r} is not a volume type", field=field, hint=hint)
    size_bytes = check_size(parse_size(size, field=field), field=field)
    return VolumeWish(type=VolumeType(kind), size_bytes=size_bytes)


def parse_wishes(texts: Sequence[str]) -> tuple[VolumeWish, ...]:
    """Read several. Raises ``BadInput`` naming the place."""
    wishes: list[VolumeWish] = []
    for index, text in enumerate(texts):
        field = f"volumes[{index}]"
        wish = parse_wish(text, field=field)
        if wish.id and wish in wishes:
            raise BadInput(f"{text} is named twice", field=field, hint="name each volume once")
        wishes.append(wish)
    return tuple(wishes)


class Volumes:
    def __init__(self, book: Book, driver: VolumeDriver, shared: SharedStorage) -> None:
        self._book = book
        self._driver = driver
        self._shared = shared
        self._deleting: set[str] = set()

    async def load(self) -> None:
        """Take over what the service has. Where it does not answer, the records stand as they are."""
        try:
            found = await self._driver.list()
        except EmpError as error:
            log.warning("the volume service could not be asked: %s", error)
            return
        for volume in found:
            await self._note(volume)
        listed = {volume.id for volume in found}
        for record in self._book.volumes.all():
            if record.id not in listed:  # a cloud lists what the pool has made, and it may be used for others too
                await self._look_at(record.id)

    async def _look_at(self, volume: str) -> None:
        """Take over what the service says of one that has a record. Where it does not answer, that stands."""
        try:
            update = _merged(await self._driver.describe(volume))
        except NotFound as error:
            update = _faulty(f"its service does not know it any more: {error.message}")
        except EmpError as error:
            log.warning("the service of volume %s could not be asked: %s", volume, error)
            return
        # one that has been deleted meanwhile does not come back
        await self._book.write(Edit(self._book.volumes, volume, lambda old: update(old) if old else None))

    # -------------------------------------------------------------- showing

    def shown(self, volume: Volume) -> Volume:
        """Return a record with what is worked out for people: its state, its driver."""
        evm = self._book.evms.find(volume.evm) if volume.evm else None
        migration = self._book.migrations.find(evm.migration) if evm and evm.migration else None
        state = state_of(volume, evm, migration, deleting=volume.id in self._deleting)
        driver = "shared" if volume.type is VolumeType.SHARED else self._driver.name
        return volume.model_copy(update={"state": state, "driver": driver})

    def all(self) -> tuple[Volume, ...]:
        """Return every record as it is shown."""
        return tuple(self.shown(volume) for volume in self._book.volumes.all())

    async def show(self, volume: str) -> Volume:
        """Ask its service, which should answer within ``SHOW_S``, and return it as it is shown. Raises ``NotFound``."""
        await self.get(volume)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHOW_S):
                await self._look_at(volume)
        return self.shown(await self.get(volume))

    async def create(
        self,
        type: VolumeType,  # noqa: A002
        size_bytes: int,
        *,
        image: str | None = None,
        evm: str | None = None,
    ) -> Volume:
        if type not in MADE_TYPES:
            hint = f"one of {', '.join(MADE_TYPES)}"
            raise BadInput(f"the pool makes no volumes of the type {type}", field="type", hint=hint)
        made = await self._driver.create(type=type, size_bytes=size_bytes, image=image)
        volume = made.model_copy(update={"evm": evm})
        await self._book.write(put(self._book.volumes, volume.id, volume))
        return volume

    async def register(self, url: str, size_bytes: int | None) -> Volume:
        """Take in storage that every node reaches. Raises as ``SharedStorage.register`` does."""
        return await self._note(await self._shared.register(url, size_bytes=size_bytes))

    async def get(self, volume: str, *, field: str = "volume") -> Volume:
        """Return the record; a volume that only the service knows gets one. Raises ``NotFound``."""
        if known := self._book.volumes.find(volume):
            return known
        try:
            return await self._note(await self._driver.describe(volume))
        except (NotFound, BadInput):
            shown = volume if len(volume) <= 60 else volume[:57] + "..."
            raise NotFound(f"no volume has the id {shown!r}", field=field, hint="see: emp volume list") from None

    async def look(self, volume: str) -> Volume:
        """Return the volume as the service has it now. Raises ``NotFound``."""
        return await self._note(await self._driver.describe(volume))

    async def delete(self, volume: str) -> None:
        """Raises ``NotFound``, or ``Conflict`` while an EVM has it."""
        record = await self.get(volume)
        if record.evm is not None:
            raise Conflict(
                f"volume {volume} belongs to EVM {record.evm}",
                field="volume",
                hint=f"emp evm delete {record.evm} first",
            )
        await self._destroy(volume)

    async def _destroy(self, volume: str) -> None:
        self._deleting.add(volume)
        try:
            with contextlib.suppress(NotFound):  # it was gone already
                await self._driver.delete(volume)
            await self._book.write(gone(self._book.volumes, volume))
        finally:
            self._deleting.discard(volume)

    async def resize(self, volume: str, size_bytes: int) -> Volume:
        return await self._note(await self._driver.resize(volume, size_bytes))

    async def survey(self, volumes: Sequence[str], *, nodes: Sequence[str]) -> Survey:
        """Find out what stands in the way of moving them to each of ``nodes``, within ``SURVEY_S``."""
        obstacles: Mapping[str, Mapping[str, str]] = {}
        unanswered: str | None = None
        if volumes:
            try:
                async with asyncio.timeout(SURVEY_S):
                    await all_of(self._look_at(volume) for volume in volumes)
                    obstacles = await self._driver.obstacles(volumes, nodes=nodes)
            except TimeoutError:
                unanswered = f"its service has not said within {SURVEY_S:g} s whether it can move"
            except EmpError as error:
                unanswered = f"its service could not be asked whether it can move: {error.message}"
        found = tuple(self._book.volumes.get(volume) for volume in volumes)
        return Survey(found, obstacles, self.expected_ms(), unanswered)

    def expected_ms(self) -> dict[VolumeType, float]:
        """Return what detach and attach take, for each type that one node alone can have; by earlier moves if any."""
        return expected_ms(self._book.volumes.all(), usual_s=self._driver.move_s)

    # -------------------------------------------------------------- attaching

    async def expect(self, volume: str, *, node: str, epoch: int) -> None:
        """Have what can be done before an ``attach`` done now. What fails is left to ``attach``."""
        try:
            await self._driver.expect(volume, node=node, epoch=epoch)
        except EmpError as error:
            log.warning("%s is not made ready for %s: %s", volume, node, error)

    async def attach(self, volumes: Sequence[str], *, node: str, epoch: int) -> tuple[VolumeGrant, ...]:
        """Open all to ``node`` under ``epoch``, at the same time; in the order given."""
        return tuple(await all_of(self._attach(volume, node, epoch) for volume in volumes))

    async def _attach(self, volume: str, node: str, epoch: int) -> VolumeGrant:
        attachment = await self._driver.attach(volume, node=node, epoch=epoch)
        await self.get(volume)
        record = await self._change_attachments(volume, add=attachment)
        return VolumeGrant(volume=record, attachment=attachment)

    def unfenceable(self, volumes: Sequence[str]) -> tuple[str, ...]:
        """Return those of which only a node's own word, or proof that it is off, says that it has let go."""
        known = (self._book.volumes.find(volume) for volume in volumes)
        return tuple(volume.id for volume in known if volume is not None and not volume.type.fenceable)

    def check_given_up(self, volumes: Sequence[str], *, node: str) -> None:
        """Raise ``Conflict`` if another node may still write to one of those that it cannot be shut out of."""
        for volume in self.unfenceable(volumes):
            held = sorted({a.node for a in self._book.volumes.get(volume).attachments} - {node})
            if held:
                raise Conflict(
                    f"{', '.join(held)} may still write to {volume}, and nothing can shut a node out of it",
                    field="volumes",
                    hint=f"its EVM must be stopped there, or the node proven off: emp node fence {held[0]}",
                )

    async def release(
        self,
        volumes: Sequence[str],
        *,
        node: str | None = None,
        keep_node: str | None = None,
        keep_epoch: int | None = None,
        older_than: int | None = None,
        unheld: bool = False,
    ) -> None:
        """Detach all from ``node``, or from every node but ``keep_node``; an attachment under ``keep_epoch`` stays.

        ``older_than``: only what was attached under an older epoch. ``unheld``: no QEMU has them open there any more.
        What nobody of the pool has attached, so that it has no epoch, is somebody else's and stays.
        """

        def is_meant(held: Attachment) -> bool:
            return (
                held.epoch > 0
                and node in (None, held.node)
                and held.node != keep_node
                and held.epoch != keep_epoch
                and (older_than is None or held.tag < older_than)
            )

        await all_of(self._release(volume, is_meant, unheld=unheld) for volume in volumes)

    async def _release(self, volume: str, is_meant: Callable[[Attachment], bool], *, unheld: bool) -> None:
        try:
            found = await self._driver.describe(volume)
        except NotFound:
            return
        if self._book.volumes.find(volume):
            await self._note(found)  # the owner's claim may have closed some already
        for held in filter(is_meant, found.attachments):
            await self._driver.detach(volume, node=held.node, epoch=held.epoch, unheld=unheld)
            if self._book.volumes.find(volume):
                await self._change_attachments(volume, remove=held)

    async def fence(self, volumes: Sequence[str], *, epoch: int, unheld: bool = False) -> None:
        """Have the service refuse every attachment older than ``epoch``, whoever holds it. What is gone needs none.

        ``unheld``: no QEMU has any of those open any more. Of a volume that nobody can be shut out of this promises
        nothing: its older holders have sworn that they let go (RETIRED), or are proven off, before the new one was
        given it, as rule R8 demands for every EVM.
        """
        await all_of(self._fence(volume, epoch, unheld=unheld) for volume in volumes)

    async def take_back(self, volumes: Sequence[str], *, node: str, epoch: int) -> None:
        """Have ``node``, to which an EVM went back, hold all under ``epoch``, and shut out what is older.

        Where the service takes claims, the node's agent sees to that. Where it does not, the attachment is still one
        of an older epoch: it is taken over before the fence, which would close it otherwise.
        """
        await all_of(self._take_back(volume, node, epoch) for volume in volumes)

    async def _take_back(self, volume: str, node: str, epoch: int) -> None:
        try:
            found = await self._driver.describe(volume)
            held = [attachment for attachment in found.attachments if attachment.node == node]
            if not held or any(attachment.claim for attachment in held):
                return
            await self._attach(volume, node, epoch)
            await self._fence(volume, epoch, unheld=False)
        except NotFound:
            log.warning("volume %s is gone", volume)
        except StaleEpoch as error:
            log.warning("a newer owner has it: %s", error)

    async def _fence(self, volume: str, epoch: int, *, unheld: bool) -> None:
        if (known := self._book.volumes.find(volume)) is not None and not known.type.fenceable:
            return
        with contextlib.suppress(NotFound):
            await self._driver.fence(volume, epoch=epoch, unheld=unheld)
            await self._note(await self._driver.describe(volume))  # its nodes may have claimed newer epochs

    async def disown(self, volumes: Sequence[str], own: Sequence[str]) -> None:
        """Detach an EVM's volumes from everywhere, delete those made with it, and let go of the others.

        Every node that could have had it running has sworn that it has not.
        """
        await self.release(volumes, unheld=True)
        for volume in own:
            await self._destroy(volume)
        for volume in volumes:
            if volume not in own and self._book.volumes.find(volume):
                await self._book.update(self._book.volumes, volume, lambda v: v.model_copy(update={"evm": None}))

    async def _change_attachments(
        self, volume: str, *, add: Attachment | None = None, remove: Attachment | None = None
    ) -> Volume:
        def apply(old: Volume) -> Volume:
            named = add or remove
            others = [a for a in old.attachments if named and not _replaces(named, a)]
            return old.model_copy(update={"attachments": (*others, add) if add else tuple(others)})

        return await self._book.update(self._book.volumes, volume, apply)

    async def _note(self, found: Volume) -> Volume:
        """Take over the service's word, keeping whose it is and how it came there."""
        merged = _merged(found)
        await self._book.write(Edit(self._book.volumes, found.id, lambda old: merged(old) if old else found))
        return self._book.volumes.get(found.id)


def _replaces(named: Attachment, other: Attachment) -> bool:
    """Whether ``named`` is the same attachment: a device of a node is attached there once, whatever its epoch."""
    return named.node == other.node and (named.epoch == other.epoch or named.endpoint is None)


def _merged(found: Volume) -> Callable[[Volume], Volume]:
    return lambda old: found.model_copy(update={"evm": old.evm, "handover": old.handover})


def _faulty(fault: str) -> Callable[[Volume], Volume]:
    return lambda old: old.model_copy(update={"fault": fault})
