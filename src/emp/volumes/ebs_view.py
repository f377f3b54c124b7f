"""A volume as EC2 describes it, with what EMP's tags on it say: its pool, its fence, for whom it was attached."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from emp.model.errors import Conflict, Refused, StaleEpoch
from emp.model.volume import Attachment, Volume, VolumeType

GIB = 1 << 30
MAX_NODES = 16
"""of a Multi-Attach volume: https://docs.aws.amazon.com/ebs/latest/userguide/ebs-volumes-multi.html"""
TYPES = tuple(kind for kind in VolumeType if kind is not VolumeType.SHARED)
POOL, FENCE, EPOCH = "emp:pool", "emp:fence", "emp:epoch:"
"""tags: the pool that made it; the oldest epoch that may be served; with an instance: for whom it was attached"""


class EbsView:
    """A volume as EC2 has just described it."""

    def __init__(self, record: Mapping[str, Any], nodes: Mapping[str, str]) -> None:
        self._record = record
        self._nodes = nodes
        self.id = str(record["VolumeId"])
        self.state = str(record["State"])
        self.tags = {str(tag["Key"]): str(tag["Value"]) for tag in record.get("Tags", ())}

    @property
    def zone(self) -> str:
        return str(self._record["AvailabilityZone"])

    @property
    def fence(self) -> int:
        return _number(self.tags.get(FENCE))

    @property
    def volume(self) -> Volume:
        kind = self._record["VolumeType"]
        if kind not in TYPES:
            hint = f"EMP moves {', '.join(TYPES)}"
            raise Refused(f"{self.id} is of the type {kind}", field="volume", hint=hint)
        return Volume(
            id=self.id,
            type=VolumeType(kind),
            size_bytes=self._record["Size"] * GIB,
            serial=serial_of(self.id),
            fault="EC2 says that its hardware has failed: error" if self.state == "error" else None,
            attachments=tuple(
                attachment_of(self.id, self._nodes.get(instance, instance), self.epoch_on(instance))
                for instance in self.instances()
            ),
        )

    def on(self, instance: str) -> Mapping[str, Any] | None:
        return next((held for held in self._held() if held["InstanceId"] == instance), None)

    def instances(self) -> Iterator[str]:
        return (str(held["InstanceId"]) for held in self._held())

    def _held(self) -> Iterator[Mapping[str, Any]]:
        return (held for held in self._record.get("Attachments", ()) if held["State"] != "detached")

    def epoch_on(self, instance: str) -> int:
        """Return for whom it was attached there; 0: by nobody that told us."""
        return _number(self.tags.get(EPOCH + instance))

    def check_epoch(self, epoch: int, instance: str) -> None:
        """Raise ``StaleEpoch`` below the fence, and below the epoch that the instance has it under."""
        if epoch < self.fence:
            message = f"{self.id} is fenced: epoch {epoch} is older than {self.fence}"
            raise StaleEpoch(message, field="epoch", fence=self.fence)
        if self.on(instance) and epoch < (known := self.epoch_on(instance)):
            message = f"{instance} has {self.id} under {known}, newer than {epoch}"
            raise StaleEpoch(message, field="epoch", fence=self.fence)

    def check_free(self) -> None:
        """Raise ``Conflict`` while it is attached to anybody."""
        if nodes := sorted(self._nodes.get(instance, instance) for instance in self.instances()):
            raise Conflict(f"{self.id} is attached to {', '.join(nodes)}", field="volume", hint="detach it first")

    def check_room(self, node: str) -> None:
        """Raise ``Conflict`` where it is attached to as many others as it can be, or is about to go."""
        if self.state not in ("available", "in-use"):
            raise Conflict(f"{self.id} is {self.state}", field="volume", hint="take another volume")
        others = sorted(self._nodes.get(instance, instance) for instance in self.instances())
        most = MAX_NODES if self._record.get("MultiAttachEnabled") else 1
        if len(others) >= most:
            raise Conflict(
                f"{self.id} is attached to {', '.join(others)}, and takes {most} at once; not {node}",
                field="node",
                hint="detach it there first" if most == 1 else "detach it from one of them first",
            )


def serial_of(volume: str) -> str:
    """Return the serial that a node sees; 20 characters, as many as a disk of a guest is given room for."""
    return volume.replace("-", "")


def attachment_of(volume: str, node: str, epoch: int) -> Attachment:
    """Return an attachment as the pool knows it: without an endpoint, as the node finds the device."""
    return Attachment(volume=volume, node=node, epoch=epoch)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
