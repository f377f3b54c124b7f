"""From a request to a new EVM's record: what was asked is checked, what was left open is chosen."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from emp.controller import compat
from emp.controller.addresses import PodWish, hand_out, parse_ipv6, parse_pods
from emp.controller.book import Book, VolumeWish
from emp.controller.capacity import Capacity
from emp.controller.config import Network
from emp.controller.efs import AskedMount, Efs
from emp.controller.nodes import Nodes
from emp.controller.placement import Placed, needs, place, place_on
from emp.controller.volumes import Volumes, parse_wish, parse_wishes
from emp.model.api import EvmCreate
from emp.model.efs import NO_EFS, EfsFacts
from emp.model.errors import AlreadyExists, BadInput, Conflict, Refused
from emp.model.evm import EvmSpec
from emp.model.names import format_size
from emp.model.node import Versions
from emp.model.volume import Volume

SMALLEST_MEMORY_BYTES = 64 << 20
MEMORY_UNIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Asked:
    """A request that is right in itself."""

    request: EvmCreate
    pods: tuple[PodWish, ...]
    wishes: tuple[VolumeWish, ...]
    existing: tuple[Volume, ...]
    """volumes that are there already and are nobody's"""
    mounts: tuple[AskedMount, ...] = ()
    efs: EfsFacts = NO_EFS
    """what the cloud says of them"""


class Blueprints:
    def __init__(
        self, book: Book, nodes: Nodes, capacity: Capacity, volumes: Volumes, efs: Efs, network: Network
    ) -> None:
        self._book = book
        self._nodes = nodes
        self._capacity = capacity
        self._volumes = volumes
        self._efs = efs
        self._network = network

    async def check(self, request: EvmCreate) -> Asked:
        """Raises ``BadInput``, ``NotFound``, ``Conflict``, ``AlreadyExists`` or ``Refused``, naming the field."""
        _check_memory(request.memory_bytes)
        pods, wishes = parse_pods(request.pods), _wishes(request)
        self.check_free(request.name)
        existing = [await self._free_volume(wish.id, field) for field, wish in wishes if wish.id]
        mounts, facts = await self._efs.check(request.efs)
        return Asked(request, pods, tuple(wish for _, wish in wishes), tuple(existing), mounts, facts)

    def check_free(self, name: str) -> None:
        if self._book.evms.find(name):
            hint = f"choose another, or: emp evm delete {name}"
            raise AlreadyExists(f"EVM {name} exists already", field="name", hint=hint)

    def draw(self, asked: Asked) -> tuple[EvmSpec, Placed]:
        """Choose node, addresses, machine type and CPU model. The caller holds the lock of ``Capacity``.

        Raises ``NotFound``, ``NodeDown``, ``Refused``, ``NoPlacement``, ``BadInput`` or ``Conflict``.
        """
        request = asked.request
        held, ipv6 = set(self._book.claims.held), parse_ipv6(request.ipv6, nics=request.nics)
        cards, pods = hand_out(self._network, held, nics=request.nics, pods=asked.pods, ipv6=ipv6)
        placed = self._place(request, ipv6=bool(ipv6) or any(pod.ipv6 for pod in asked.pods))
        versions = placed.node.report.versions
        _check_pods(request.image, asked.pods, versions)
        peers = compat.same_accelerator(self._nodes.ready(), versions)
        spec = EvmSpec(
            name=request.name,
            uuid=uuid.uuid4(),
            memory_bytes=request.memory_bytes,
            vcpus=request.vcpus,
            image=request.image,
            image_digest=versions.images[request.image],
            machine=compat.common_machine(peers),
            cpu_model=compat.common_cpu_model(peers, request.cpu_model),
            nics=cards,
            pods=pods,
            efs=self._efs.mounts(asked.mounts, asked.efs, placed.node.name),
            restart=request.restart,
        )
        return spec, placed

    def _place(self, request: EvmCreate, *, ipv6: bool) -> Placed:
        ready = self._nodes.ready()
        images = sorted({image for node in ready for image in node.report.versions.images})
        if ready and request.image not in images:
            hint = f"images here: {', '.join(images) or 'none'}"
            raise BadInput(f"no ready node has the image {request.image!r}", field="image", hint=hint)
        unfit = needs(request.memory_bytes, request.vcpus, request.image, ipv6=ipv6)
        if request.node is not None:
            return place_on(self._capacity.candidate(self._nodes.need_ready(request.node)), unfit)
        what = f"{request.name} ({format_size(request.memory_bytes)}, {request.vcpus} vCPU)"
        return place(self._capacity.candidates(), unfit, what=what)

    async def _free_volume(self, volume: str, field: str) -> Volume:
        found = await self._volumes.get(volume, field=field)
        if found.evm is not None:
            hint = "a volume has one EVM; make another volume"
            raise Conflict(f"volume {volume} belongs to EVM {found.evm}", field=field, hint=hint)
        return found


def _wishes(request: EvmCreate) -> list[tuple[str, VolumeWish]]:
    """Return the EVM's volumes in the order of their slots, each with the field that asks for it."""
    wishes = [(f"volumes[{index}]", wish) for index, wish in enumerate(parse_wishes(request.volumes))]
    if request.root is None:
        return wishes
    root = parse_wish(request.root, field="root")
    if root.id is not None and root.id in request.volumes:
        raise BadInput(f"{root.id} is named twice", field="root", hint="name each volume once")
    return [("root", root if root.id else root.model_copy(update={"image": request.image})), *wishes]


def _check_pods(image: str, pods: Sequence[PodWish], there: Versions) -> None:
    if image not in there.images_without_pod_ipv6:
        return
    for index, pod in enumerate(pods):
        if pod.ipv6 is not None:
            raise Refused(
                f"pods of the image {image} have IPv4 addresses alone",
                field=f"pods[{index}]",
                hint="leave the IPv6 address out",
            )


def _check_memory(memory_bytes: int) -> None:
    if memory_bytes < SMALLEST_MEMORY_BYTES or memory_bytes % MEMORY_UNIT_BYTES:
        raise BadInput(
            f"{format_size(memory_bytes)} is no memory size for an EVM",
            field="memory_bytes",
            hint=f"at least {format_size(SMALLEST_MEMORY_BYTES)}, in whole MiB",
        )
