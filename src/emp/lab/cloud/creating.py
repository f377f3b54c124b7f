"""What a new volume may be: type, size, performance, zone, tags.

Ranges: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CreateVolume.html
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from emp.lab.cloud.errors import CloudError, check_simulated


@dataclass(frozen=True)
class Kind:
    """Ranges of one type; None where the parameter must be left out."""

    size_gib: tuple[int, int]
    iops: tuple[int, int] | None = None
    iops_per_gib: int = 0
    throughput_mibps: tuple[int, int] | None = None
    must_say_iops: bool = False
    multi_attach: bool = False


KINDS = {
    "gp2": Kind((1, 16_384)),
    "gp3": Kind((1, 65_536), iops=(3_000, 80_000), iops_per_gib=500, throughput_mibps=(125, 2_000)),
    "io1": Kind((4, 16_384), iops=(100, 64_000), iops_per_gib=50, must_say_iops=True, multi_attach=True),
    "io2": Kind((4, 65_536), iops=(100, 256_000), iops_per_gib=1_000, must_say_iops=True, multi_attach=True),
    "st1": Kind((125, 16_384)),
    "sc1": Kind((125, 16_384)),
    "standard": Kind((1, 1_024)),
}
_NOT_SIMULATED = ("KmsKeyId", "OutpostArn", "VolumeInitializationRate", "Operator", "AvailabilityZoneId")
MAX_TAGS = 50
LONGEST_TOKEN = 64
"""https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-idempotency.html"""


@dataclass(frozen=True)
class NewVolume:
    """A request that has been checked."""

    type: str
    size_gib: int
    zone: str
    iops: int | None
    throughput: int | None
    multi_attach: bool
    encrypted: bool
    tags: dict[str, str]


def check_new(request: Mapping[str, Any], zones: Collection[str]) -> NewVolume:
    """Return what is to be made. Raises MissingParameter, InvalidParameterValue, InvalidParameterCombination,
    InvalidZone.NotFound or InvalidSnapshot.NotFound; UnsupportedOperation for what AWS has and the simulator has not.
    """
    check_simulated(request, _NOT_SIMULATED)
    if (zone := request.get("AvailabilityZone")) is None:
        raise CloudError("MissingParameter", "The request must contain the parameter availabilityZone")
    if zone not in zones:
        raise CloudError("InvalidZone.NotFound", f"The zone '{zone}' does not exist.")
    if snapshot := request.get("SnapshotId"):
        raise CloudError("InvalidSnapshot.NotFound", f"The snapshot '{snapshot}' does not exist.")
    name = request.get("VolumeType", "gp2")
    kind = KINDS[name]
    return NewVolume(
        type=name,
        size_gib=_size(request, kind, name),
        zone=zone,
        iops=_iops(request, kind, name),
        throughput=_throughput(request, kind, name),
        multi_attach=_multi_attach(request, kind, name),
        encrypted=request.get("Encrypted", False),
        tags=tags_of_request(request, "volume"),
    )


def check_token(token: str | None) -> str | None:
    """Return a client token that is well-formed, if there is one; InvalidParameterValue otherwise."""
    if token is not None and (not 1 <= len(token) <= LONGEST_TOKEN or not token.isascii()):
        raise CloudError("InvalidParameterValue", f"Value ({token[:80]}) for parameter clientToken is invalid.")
    return token


def check_tags(tags: list[dict[str, Any]], known: Mapping[str, str]) -> dict[str, str]:
    """Return ``known`` with ``tags`` put over it.

    At most 50, keys of 1 to 128 characters without ``aws:``, values of up to 256
    (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/Using_Tags.html#tag-restrictions).
    """
    merged = dict(known)
    for tag in tags:
        key, value = tag.get("Key", ""), tag.get("Value", "")
        if not 1 <= len(key) <= 128 or key.startswith("aws:") or len(value) > 256:
            raise CloudError("InvalidParameterValue", f"Value ( {key[:80]} ) for parameter key is invalid.")
        merged[key] = value
    if len(merged) > MAX_TAGS:
        raise CloudError("TagLimitExceeded", f"The maximum number of Tags for a resource is {MAX_TAGS}.")
    return merged


def _size(request: Mapping[str, Any], kind: Kind, name: str) -> int:
    size: int | None = request.get("Size")
    if size is None:
        raise CloudError("MissingParameter", "The request must contain the parameter size/snapshot")
    least, most = kind.size_gib
    if not least <= size <= most:
        message = f"Volume of {size}GiB is invalid for {name}: it must be from {least} to {most} GiB."
        raise CloudError("InvalidParameterValue", message)
    return size


def _iops(request: Mapping[str, Any], kind: Kind, name: str) -> int | None:
    iops: int | None = request.get("Iops")
    if iops is None:
        if kind.must_say_iops:
            raise CloudError("MissingParameter", f"The parameter iops must be specified for {name} volumes.")
        return kind.iops[0] if kind.iops else None
    if kind.iops is None:
        raise CloudError("InvalidParameterCombination", f"The parameter iops is not supported for {name} volumes.")
    least, most = kind.iops
    if not least <= iops <= most:
        raise CloudError("InvalidParameterValue", f"Volume iops of {iops} is invalid for {name}: {least} to {most}.")
    if iops > max(least, kind.iops_per_gib * (request.get("Size") or 0)):
        message = f"Iops to volume size ratio is too high; maximum is {kind.iops_per_gib}"
        raise CloudError("InvalidParameterValue", message)
    return iops


def _throughput(request: Mapping[str, Any], kind: Kind, name: str) -> int | None:
    throughput: int | None = request.get("Throughput")
    if throughput is None:
        return kind.throughput_mibps[0] if kind.throughput_mibps else None
    if kind.throughput_mibps is None:
        raise CloudError(
            "InvalidParameterCombination", f"The parameter throughput is not supported for {name} volumes."
        )
    least, most = kind.throughput_mibps
    if not least <= throughput <= most:
        raise CloudError(
            "InvalidParameterValue", f"Throughput of {throughput} is invalid for {name}: {least} to {most}."
        )
    return throughput


def _multi_attach(request: Mapping[str, Any], kind: Kind, name: str) -> bool:
    """io1 and io2 only: https://docs.aws.amazon.com/ebs/latest/userguide/ebs-volumes-multi.html"""
    wanted: bool = request.get("MultiAttachEnabled", False)
    if wanted and not kind.multi_attach:
        message = f"The parameter multiAttachEnabled is not supported for {name} volumes."
        raise CloudError("InvalidParameterCombination", message)
    return wanted


def tags_of_request(request: Mapping[str, Any], wanted: str) -> dict[str, str]:
    """Return the tags that a new ``wanted`` (a resource type) is to have."""
    tags: dict[str, str] = {}
    for specification in request.get("TagSpecifications", ()):
        if (kind := specification.get("ResourceType")) != wanted:
            raise CloudError(
                "InvalidParameterValue", f"'{kind}' is not a valid taggable resource type for this operation."
            )
        tags = check_tags(specification.get("Tags", []), tags)
    return tags
