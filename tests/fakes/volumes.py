"""Volume services in memory, keeping the contract of ``emp.volumes.base``: one as the pool's own, one as EBS."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from emp.model.errors import BadInput, Conflict, EmpError, NotFound, StaleEpoch
from emp.model.volume import Attachment, ClaimPoint, NbdEndpoint, Volume, VolumeType

HOST = "127.0.0.1"
CLAIM = ClaimPoint(url=f"https://{HOST}:1", server_name="volumes-main")

Attachments = list[tuple[str, str, int]]
"""(volume, node, epoch)"""


class FakeVolumes:
    """As the pool's own service: an attachment per node and epoch, and agents claim theirs.

    ``failing[verb]`` is raised while it is there; ``log`` has what was done, in order.
    """

    name = "fake"
    move_s: float | None = 2.0

    def __init__(self, prefix: str = "vol-") -> None:
        self._prefix = prefix
        self.volumes: dict[str, Volume] = {}
        self.fences: dict[str, int] = {}
        self.failing: dict[str, EmpError] = {}
        self.attached: Attachments = []
        self.expected: Attachments = []
        self.log: list[tuple[str, str, int, bool]] = []
        """(verb, node, epoch, unheld)"""
        self.obstructed: dict[str, dict[str, str]] = {}
        """node -> volume -> why it could not be attached there"""
        self.silent: set[str] = set()
        """verbs that are not answered before ``go_on``; ``asked``: one has come"""
        self.asked, self.go_on = asyncio.Event(), asyncio.Event()
        self.hold = asyncio.Event()
        """while it is clear, a deletion does not end"""
        self.hold.set()

    async def create(
        self,
        *,
        type: VolumeType,  # noqa: A002 - the protocol's name
        size_bytes: int,
        image: str | None = None,
    ) -> Volume:
        self._check("create")
        name = f"{self._prefix}{len(self.volumes) + 1:04}"
        self.volumes[name] = Volume(id=name, type=type, size_bytes=size_bytes, image=image, serial=name)
        return self.volumes[name]

    async def describe(self, volume: str) -> Volume:
        self._check("describe")
        if volume not in self.volumes:
            raise NotFound(f"no volume {volume}")
        return self.volumes[volume]

    async def list(self) -> tuple[Volume, ...]:
        self._check("list")
        return tuple(self.volumes.values())

    async def delete(self, volume: str) -> None:
        self._check("delete")
        await self.hold.wait()
        if (await self.describe(volume)).attachments:
            raise Conflict(f"{volume} is attached")
        del self.volumes[volume]

    async def resize(self, volume: str, size_bytes: int) -> Volume:
        self._check("resize")
        found = await self.describe(volume)
        if size_bytes < found.size_bytes:
            raise BadInput(f"{volume} cannot shrink", field="size_bytes")
        self.volumes[volume] = found.model_copy(update={"size_bytes": size_bytes})
        return self.volumes[volume]

    async def expect(self, volume: str, *, node: str, epoch: int) -> None:
        self._check("expect")
        self.expected.append((volume, node, epoch))

    async def attach(self, volume: str, *, node: str, epoch: int) -> Attachment:
        self._check("attach")
        found = await self.describe(volume)
        if epoch < self.fences.get(volume, 0):
            raise StaleEpoch(f"{volume} is fenced at {self.fences[volume]}")
        others = {a.node for a in found.attachments} - {node}
        if others and not found.type.multi_attach:
            raise Conflict(f"{volume} is attached to {', '.join(sorted(others))}, and takes 1 at once; not {node}")
        made = self._made(volume, node, epoch)
        self.attached.append((volume, node, epoch))
        self.log.append(("attach", node, epoch, False))
        self._set(volume, (*(a for a in found.attachments if not self._is_same(a, made)), made))
        return made

    def _made(self, volume: str, node: str, epoch: int) -> Attachment:
        endpoint = NbdEndpoint(host=HOST, port=10809, export=f"{volume}-{node}-{epoch}", tls_hostname="volumes-main")
        return Attachment(volume=volume, node=node, epoch=epoch, endpoint=endpoint, claim=CLAIM)

    def _is_same(self, one: Attachment, other: Attachment) -> bool:
        return (one.node, one.epoch) == (other.node, other.epoch)

    async def detach(self, volume: str, *, node: str, epoch: int, unheld: bool = False) -> None:
        self._check("detach")
        found = await self.describe(volume)
        left = tuple(a for a in found.attachments if (a.node, a.epoch) != (node, epoch))
        if left != found.attachments:
            self.log.append(("detach", node, epoch, unheld))
        self._set(volume, left)

    async def fence(self, volume: str, *, epoch: int, unheld: bool = False) -> None:
        self._check("fence")
        found = await self.describe(volume)
        self.fences[volume] = max(epoch, self.fences.get(volume, 0))
        self.log.append(("fence", "", epoch, unheld))
        self._set(volume, tuple(a for a in found.attachments if a.tag >= self.fences[volume]))

    async def aclose(self) -> None: ...

    async def obstacles(self, volumes: Sequence[str], *, nodes: Sequence[str]) -> dict[str, dict[str, str]]:
        self._check("obstacles")
        self.asked.set()
        if "obstacles" in self.silent:
            await self.go_on.wait()
        there = {node: self.obstructed.get(node, {}) for node in nodes}
        return {node: {v: why[v] for v in volumes if v in why} for node, why in there.items()}

    def holders(self, volume: str) -> dict[str, int]:
        """Node -> epoch under which it may use the volume."""
        return {a.node: a.epoch for a in self.volumes[volume].attachments}

    def _set(self, volume: str, attachments: tuple[Attachment, ...]) -> None:
        self.volumes[volume] = self.volumes[volume].model_copy(update={"attachments": attachments})

    def _check(self, verb: str) -> None:
        if verb in self.failing:
            raise self.failing[verb]


class FakeEbs(FakeVolumes):
    """As EBS: one attachment of a volume to a node, which a newer epoch takes over; a device; nobody claims."""

    async def attach(self, volume: str, *, node: str, epoch: int) -> Attachment:
        if (held := self.holders(volume).get(node, 0) if volume in self.volumes else 0) > epoch:
            raise StaleEpoch(f"{node} has {volume} under {held}")
        return await super().attach(volume, node=node, epoch=epoch)

    def attach_by_hand(self, volume: str, instance: str) -> None:
        """Somebody attaches it to an instance of his own, in the cloud's console."""
        held = self.volumes[volume].attachments
        self._set(volume, (*held, Attachment(volume=volume, node=instance, epoch=0)))

    def _made(self, volume: str, node: str, epoch: int) -> Attachment:
        return Attachment(volume=volume, node=node, epoch=epoch)

    def _is_same(self, one: Attachment, other: Attachment) -> bool:
        return one.node == other.node
