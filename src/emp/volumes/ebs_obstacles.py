"""Why EC2 would not attach volumes to an instance: another zone, another state, no room. Asked before a migration.

How many volumes an instance takes depends on its type, and AWS adds types
(https://docs.aws.amazon.com/ebs/latest/userguide/instance-volume-limits.html), so EC2 is asked:
``MaximumEbsAttachments`` (https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_EbsInfo.html). Where the limit is
shared with network interfaces and local disks it may be less; then ``attach`` is refused, which costs an aborted
migration.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from emp.aws.api import Ec2Api
from emp.model.errors import Forbidden, NotFound
from emp.volumes.ebs_looks import Looks
from emp.volumes.ebs_view import EbsView

log = logging.getLogger(__name__)

_TAKES = ("running", "stopped")
"""states of an instance in which a volume can be attached
(https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_AttachVolume.html)"""


async def obstacles(
    api: Ec2Api, looks: Looks, volumes: Sequence[str], instances: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Return node -> volume -> reason; ``instances``: node -> instance id. Raises what ``Ec2Api.ask`` does."""
    views = await asyncio.gather(*(_view(looks, volume) for volume in volumes))  # in one question to EC2
    records = {node: await _instance(api, instance) for node, instance in instances.items()}
    limits = await _limits(api, {str(record["InstanceType"]) for record in records.values() if record})
    return {node: _reasons(node, instances[node], record, views, limits) for node, record in records.items()}


async def _view(looks: Looks, volume: str) -> EbsView | str:
    try:
        return await looks.see(volume)
    except NotFound:
        return volume


async def _instance(api: Ec2Api, instance: str) -> Mapping[str, Any] | None:
    """One at a time: a single one that is gone makes the question about all of them fail."""
    try:
        answer = await api.ask("describe_instances", InstanceIds=[instance])
    except NotFound:
        return None
    found = [record for reservation in answer["Reservations"] for record in reservation["Instances"]]
    return found[0] if found else None


async def _limits(api: Ec2Api, types: set[str]) -> dict[str, int]:
    """Return how many volumes each type takes; a type of which that is not known is left out."""
    if not types:
        return {}
    try:
        answer = await api.ask("describe_instance_types", InstanceTypes=sorted(types))
    except Forbidden as error:
        log.warning("how many volumes an instance takes is not known: %s", error)
        return {}
    told = {str(one["InstanceType"]): one.get("EbsInfo", {}) for one in answer["InstanceTypes"]}
    return {kind: int(ebs["MaximumEbsAttachments"]) for kind, ebs in told.items() if "MaximumEbsAttachments" in ebs}


def _reasons(
    node: str,
    instance: str,
    record: Mapping[str, Any] | None,
    views: Sequence[EbsView | str],
    limits: Mapping[str, int],
) -> dict[str, str]:
    reasons: dict[str, str] = {}
    free = _room(record, limits)
    for view in views:
        if isinstance(view, str):
            reasons[view] = "EC2 does not know it"
        elif record is None:
            reasons[view.id] = f"EC2 does not know {instance}, the instance of {node}"
        elif (zone := str(record["Placement"]["AvailabilityZone"])) != view.zone:
            reasons[view.id] = f"it is in {view.zone}, {node} in {zone}"
        elif (state := str(record["State"]["Name"])) not in _TAKES:
            reasons[view.id] = f"{instance}, the instance of {node}, is {state}"
        elif view.on(instance) is None and free is not None:
            free -= 1
            if free < 0:
                kind, had = str(record["InstanceType"]), len(record.get("BlockDeviceMappings", ()))
                rest = " and the EVM's others take the rest" if had < limits[kind] else ""
                reasons[view.id] = f"{node} ({kind}) takes {limits[kind]} volumes: {had} are there{rest}"
    return reasons


def _room(record: Mapping[str, Any] | None, limits: Mapping[str, int]) -> int | None:
    if record is None or (limit := limits.get(str(record["InstanceType"]))) is None:
        return None
    return limit - len(record.get("BlockDeviceMappings", ()))
