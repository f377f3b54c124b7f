"""Who may have a volume: what AWS refuses at AttachVolume and DetachVolume, rule by rule.

Pages: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_AttachVolume.html and ``API_DetachVolume.html`` there;
codes: ``errors-overview.html`` there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from emp.lab.cloud.errors import CloudError
from emp.lab.cloud.records import MAX_NODES, Attachment, Instance, Volume

ROOT_DEVICE = "/dev/xvda"
_DEVICE = re.compile(r"(/dev/)?(sd[b-z]|xvd[b-z]|xvd[b-d][a-z])")
"""https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/device_naming.html; no partitions"""


def check_attach(
    volume: Volume, instance: Instance, device: str, *, others: Iterable[Volume], now_s: float, taken: int = 0
) -> None:
    """Raise what AWS says where ``volume`` may not become ``device`` of ``instance``. ``others``: all volumes.

    ``taken``: how many of the places for volumes are taken by network interfaces.

    - an instance that is not running or stopped: IncorrectState
    - one in another Availability Zone: InvalidVolume.ZoneMismatch
    - a volume that is still ``creating``, or ``deleting``: IncorrectState
    - a volume with an attachment (also one that is ``detaching``), unless it is Multi-Attach enabled, and any volume at
      an instance that has it already: VolumeInUse
    - a 17th instance (https://docs.aws.amazon.com/ebs/latest/userguide/ebs-volumes-multi.html): the page gives no code
    - a device that is no name for one, or is taken: InvalidParameterValue
    - more volumes than the instance takes: AttachmentLimitExceeded
    """
    if instance.state not in ("running", "stopped"):
        raise CloudError("IncorrectState", f"Instance '{instance.id}' is not 'running'.")
    if volume.zone != instance.zone:
        raise CloudError(
            "InvalidVolume.ZoneMismatch",
            f"The volume '{volume.id}' is not in the same availability zone as instance '{instance.id}'",
        )
    if volume.state(now_s) in ("creating", "deleting"):
        raise CloudError("IncorrectState", f"{volume.id} is not 'available'.")
    if volume.attachments and (not volume.multi_attach or instance.id in volume.attachments):
        raise CloudError("VolumeInUse", f"{volume.id} is already attached to an instance")
    if len(volume.attachments) >= MAX_NODES:
        raise CloudError("AttachmentLimitExceeded", f"{volume.id} is attached to {MAX_NODES} instances already")
    if not _DEVICE.fullmatch(device):
        message = f"Value ({device}) for parameter device is invalid. {device} is not a valid EBS device name."
        raise CloudError("InvalidParameterValue", message)
    here = [attachment for other in others if (attachment := other.attachments.get(instance.id))]
    if any(_same_device(device, attachment.device) for attachment in here):
        message = f"Invalid value '{device}' for unixDevice. Attachment point {device} is already in use"
        raise CloudError("InvalidParameterValue", message)
    if len(here) + taken >= instance.max_volumes:
        raise CloudError("AttachmentLimitExceeded", f"{instance.id} takes {instance.max_volumes} volumes")


def check_detach(volume: Volume, instance: str | None, device: str | None, *, force: bool, now_s: float) -> Attachment:
    """Return the attachment that is to end.

    - without an instance a Multi-Attach enabled volume is not detached: MissingParameter
    - a volume that is attached to nobody: IncorrectState
    - one that is not attached to that instance, or not as that device: InvalidAttachment.NotFound
    - while it is ``attaching``, and again while it is ``detaching`` or ``busy``: IncorrectState. Force helps with the
      second alone
    """
    if instance is None and volume.multi_attach:
        raise CloudError("MissingParameter", "The request must contain the parameter instanceId")
    if not volume.attachments:
        raise CloudError("IncorrectState", f"Volume '{volume.id}' is in the '{volume.state(now_s)}' state.")
    found = volume.attachments.get(instance) if instance else next(iter(volume.attachments.values()))
    if found is None:
        message = f"The volume '{volume.id}' is not attached to instance '{instance}'."
        raise CloudError("InvalidAttachment.NotFound", message)
    if device is not None and not _same_device(device, found.device):
        raise CloudError("InvalidAttachment.NotFound", f"The volume '{volume.id}' is not attached as '{device}'.")
    if found.state == "attaching" or (found.state.is_going and not force):
        raise CloudError("IncorrectState", f"The attachment of '{volume.id}' is in the '{found.state}' state.")
    return found


def _same_device(one: str, other: str) -> bool:
    return one.removeprefix("/dev/") == other.removeprefix("/dev/")
