"""Growing a volume: what AWS refuses at ModifyVolume, and what it tells of a modification.

Pages: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_ModifyVolume.html, ``API_VolumeModification.html``
there, https://docs.aws.amazon.com/ebs/latest/userguide/ebs-modify-volume.html. The simulator changes the size alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from emp.lab.cloud.creating import KINDS
from emp.lab.cloud.errors import CloudError
from emp.lab.cloud.records import Modification, ModificationState, Volume


def check_modify(volume: Volume, request: Mapping[str, Any], *, now_s: float, pause_s: float) -> int:
    """Return the size in GiB that ``volume`` is to grow to.

    - another type, other IOPS: not simulated, UnsupportedOperation
    - ``creating`` or ``deleting``: IncorrectState
    - a modification that is not ``completed``: IncorrectModificationState
    - sooner than six hours (``pause_s``) after the last one began: VolumeModificationRateExceeded
    - a Multi-Attach io1 volume: InvalidParameterCombination
      (https://docs.aws.amazon.com/ebs/latest/userguide/ebs-volumes-multi.html)
    - a size that is not bigger, or too big for the type: InvalidParameterValue
    """
    for name in ("VolumeType", "Iops", "Throughput", "MultiAttachEnabled"):
        if name in request:
            raise CloudError("UnsupportedOperation", f"The simulated cloud does not modify {name}")
    if (size := request.get("Size")) is None:
        raise CloudError("MissingParameter", "The request must contain the parameter size")
    if (state := volume.state(now_s)) not in ("available", "in-use"):
        raise CloudError("IncorrectState", f"The volume '{volume.id}' is '{state}'")
    last = volume.modification
    if last is not None and last.state is not ModificationState.COMPLETED:
        message = f"Volume {volume.id} cannot be modified in modification state {last.state.upper()}"
        raise CloudError("IncorrectModificationState", message)
    if last is not None and now_s < last.began_s + pause_s:
        message = "You've reached the maximum modification rate per volume limit. Wait at least 6 hours between them."
        raise CloudError("VolumeModificationRateExceeded", message)
    if volume.multi_attach and volume.type == "io1":
        raise CloudError("InvalidParameterCombination", "A Multi-Attach enabled io1 volume cannot be modified")
    if size <= volume.size_gib:
        raise CloudError("InvalidParameterValue", f"New size must be larger than existing size {volume.size_gib}")
    if size > (most := KINDS[volume.type].size_gib[1]):
        raise CloudError("InvalidParameterValue", f"Volume of {size}GiB is invalid for {volume.type}: at most {most}")
    return int(size)


def modification_answer(volume: Volume, last: Modification) -> dict[str, Any]:
    same = {"Iops": volume.iops, "Throughput": volume.throughput, "VolumeType": volume.type}
    return {
        "VolumeId": volume.id,
        "ModificationState": last.state.value,
        "OriginalSize": last.original_gib,
        "TargetSize": last.target_gib,
        **{f"{when}{name}": value for when in ("Original", "Target") for name, value in same.items()},
        "OriginalMultiAttachEnabled": volume.multi_attach,
        "TargetMultiAttachEnabled": volume.multi_attach,
        "Progress": 100 if last.state is ModificationState.COMPLETED else 0,
        "StartTime": last.began,
        "EndTime": last.ended,
    }


def _text(key: str) -> Callable[[Mapping[str, Any]], list[str]]:
    def read(answer: Mapping[str, Any]) -> list[str]:
        value = answer[key]
        return [value.isoformat() if isinstance(value, datetime) else str(value)]

    return read


FILTERS: Mapping[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "modification-state": _text("ModificationState"),
    "original-size": _text("OriginalSize"),
    "target-size": _text("TargetSize"),
    "target-volume-type": _text("TargetVolumeType"),
    "original-volume-type": _text("OriginalVolumeType"),
    "start-time": _text("StartTime"),
    "volume-id": _text("VolumeId"),
}
"""https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeVolumesModifications.html"""
