"""What the simulated cloud remembers. Times are seconds of its clock, but for those that answers show."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from emp.lab.cloud.errors import CloudError

MAX_NODES = 16
"""that may have a Multi-Attach volume at once: https://docs.aws.amazon.com/ebs/latest/userguide/ebs-volumes-multi.html"""
MAX_VOLUMES = 27
"""of one Nitro instance, if nothing else is said: 28 attachments less one network interface
(https://docs.aws.amazon.com/ebs/latest/userguide/instance-volume-limits.html)"""
_NOUNS = {"vol": "InvalidVolumeID", "i": "InvalidInstanceID", "eni": "InvalidNetworkInterfaceId"}


class AttachmentState(StrEnum):
    """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_VolumeAttachment.html"""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"
    BUSY = "busy"
    """wants to detach and cannot, because the node still has the device in use"""

    @property
    def is_going(self) -> bool:
        return self in (AttachmentState.DETACHING, AttachmentState.BUSY)


class ModificationState(StrEnum):
    """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_VolumeModification.html"""

    MODIFYING = "modifying"
    """it has its old size"""
    OPTIMIZING = "optimizing"
    """it has its new one, and cannot be modified again yet"""
    COMPLETED = "completed"


@dataclass
class Modification:
    """The last one of a volume."""

    original_gib: int
    target_gib: int
    began: datetime
    began_s: float
    state: ModificationState = ModificationState.MODIFYING
    due_s: float | None = None
    """when the data plane is to grow it, then when it is completed; None: it is being asked, or all is done"""
    ended: datetime | None = None

    @property
    def is_growing(self) -> bool:
        """The data plane has been asked, and has not answered."""
        return self.state is ModificationState.MODIFYING and self.due_s is None


@dataclass
class Attachment:
    """One volume at one instance; gone from the record once it is detached."""

    instance: str
    device: str
    epoch: int
    """the how-manieth attachment of this volume it is: names it for good, and never comes back"""
    at: datetime
    state: AttachmentState = AttachmentState.ATTACHING
    due_s: float | None = None
    """when the data plane is to be asked; None: nothing is due, or it has been asked"""
    is_stuck: bool = False
    """detaching does not end by itself"""
    shows_s: float | None = None
    """from when on its node sees the device; None: it has not been opened yet"""
    grown_s: float | None = None
    """till then its node sees the device as it was before the volume grew; None: it has not grown meanwhile"""
    before: tuple[int, int] | None = None
    """epoch and size in GiB of that"""


@dataclass
class Volume:
    id: str
    type: str
    size_gib: int
    zone: str
    created: datetime
    iops: int | None
    throughput: int | None
    multi_attach: bool
    encrypted: bool
    tags: dict[str, str]
    visible_s: float
    """before this it is unknown to every action but the one that made it"""
    available_s: float
    """before this it is ``creating``"""
    deleted_s: float | None = None
    """at this its data goes, and then it; ``deleting`` till then"""
    is_emptied: bool = False
    """the data plane has been asked to remove its data"""
    attachments: dict[str, Attachment] = field(default_factory=dict)
    """by instance"""
    epochs: int = 0
    modification: Modification | None = None

    @property
    def is_growing(self) -> bool:
        return self.modification is not None and self.modification.is_growing

    @property
    def is_changing_hands(self) -> bool:
        """The data plane opens or closes an attachment at this moment."""
        held = (each for each in self.attachments.values() if each.state is not AttachmentState.ATTACHED)
        return any(each.due_s is None and not each.is_stuck for each in held)

    def state(self, now_s: float) -> str:
        """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_Volume.html: in use until the last is detached."""
        if self.deleted_s is not None:
            return "deleting"
        if now_s < self.available_s:
            return "creating"
        return "in-use" if self.attachments else "available"


@dataclass(frozen=True)
class Instance:
    """A bare-metal node. It is there from the start: the simulator runs no instances."""

    id: str
    zone: str
    state: str = "running"
    """``running`` or ``stopped``: volumes can be attached in both"""
    type: str = "m5.metal"
    max_volumes: int = MAX_VOLUMES
    subnet: str | None = None
    vpc: str | None = None
    groups: tuple[str, ...] = ()
    """security groups of its network interface"""
    address: str | None = None
    """of its primary network interface, in ``subnet``; None: it has no interface"""
    more_addresses: tuple[str, ...] = ()
    """of its other network interfaces, one each, likewise"""
    ipv6: str | None = None
    """of its primary network interface"""
    source_dest_check: bool = True
    """of its interfaces, at first"""


def check_id(kind: str, value: str) -> str:
    """Return a well-formed id of ``kind`` (vol, i or eni); InvalidVolumeID.Malformed and the like otherwise."""
    if not re.fullmatch(kind + r"-([0-9a-f]{8}|[0-9a-f]{17})", value):
        raise CloudError(f"{_NOUNS[kind]}.Malformed", f'Invalid id: "{value}" (expecting "{kind}-...")')
    return value
