"""Volumes of Amazon EBS, by the EC2 API: the same code against AWS and against the lab's simulated cloud.

AWS knows no epochs, so the volume's tags carry them: ``emp:fence`` the oldest epoch that may be served, and
``emp:epoch:INSTANCE`` for whom an attachment was made, written before it is made. There is one attachment of a volume
to a node: a newer epoch takes it over and the node keeps its device; an order with an older one is refused. What keeps
an older QEMU of the same node from the device is its agent. Tags are not compared and set in one step, so one
controller at a time may call, as everywhere in the pool.

Each order is a loop that looks, acts if there is something to do, and looks again: a reply that was lost, an order that
was given twice and a controller that died in between are one and the same case. EBS knows no claims either: agents do
not call the cloud, and shutting out an older epoch is the controller's ``fence``.

An attachment names no endpoint. The node's agent finds the device by the volume's serial
(``emp.volumes.base.DeviceResolver``), which is the volume's id without its dash:
https://docs.aws.amazon.com/ebs/latest/userguide/identify-nvme-ebs-device.html
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emp.aws.api import READ_S, Ec2Api, code_of, make_client
from emp.aws.patience import Pace, Time
from emp.model.errors import BadInput, EmpError, NotFound, OutcomeUnknown, Refused
from emp.model.names import format_size
from emp.model.volume import Attachment, Volume, VolumeType
from emp.volumes.ebs_looks import Looks, check_volume_id
from emp.volumes.ebs_obstacles import obstacles
from emp.volumes.ebs_view import EPOCH, FENCE, GIB, MAX_NODES, POOL, EbsView, attachment_of

log = logging.getLogger(__name__)

SMALLEST_GIB = {VolumeType.IO2: 4, VolumeType.IO1: 4, VolumeType.GP3: 1, VolumeType.GP2: 1}
"""https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CreateVolume.html"""
IOPS = 3_000
IOPS_PER_GIB = 50
"""what io1 takes at most; io2 takes more"""
DEVICES = [f"/dev/xvd{first}{second}" for first in "bc" for second in "abcdefghijklmnopqrstuvwxyz"]
"""https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/device_naming.html; a node's kernel takes no notice of them"""
_LOOKS = Pace(first_s=0.05, share=0.01)
"""a guest may be waiting: of 7 s that detaching and attaching take, a look is late by 0.1 s"""
_INSTANCE_ID = re.compile(r"i-[0-9a-f]{8,17}")


@dataclass(frozen=True)
class Limits:
    """How long to wait for a state, in seconds; then ``OutcomeUnknown``, and the same order may be given again."""

    create_s: float = 60.0
    attach_s: float = 60.0
    detach_s: float = 120.0
    resize_s: float = 300.0
    force_after_s: float = 20.0
    """how long an orderly detach is tried first where nothing holds the volume"""


class EbsVolumeDriver:
    """See ``emp.volumes.base.VolumeDriver``. ``instances``: node -> instance id. New volumes are made in ``zone``.

    A node that is not in ``instances`` is shown under its instance id. Besides the errors named there: ``Refused``
    where AWS does not do it and why (zone, limits), ``Forbidden`` and ``Unauthenticated`` for credentials;
    ``Unreachable`` and ``Unavailable`` (nothing was done), ``OutcomeUnknown`` (it may have been), after all of which
    the same order may be given again. ``endpoint_url`` and ``ca_file`` are for a cloud that is not Amazon's;
    ``credentials_file``: see ``emp.aws.api.make_client``.
    """

    name = "ebs"
    move_s = 7.0
    """of gp2 and gp3, as the seed of this project states"""

    def __init__(
        self,
        instances: Mapping[str, str],
        *,
        pool: str,
        region: str,
        zone: str,
        endpoint_url: str | None = None,
        ca_file: Path | None = None,
        credentials_file: Path | None = None,
        client: Callable[[], Any] | None = None,
        times: Time | None = None,
        limits: Limits | None = None,
        read_s: float = READ_S,
    ) -> None:
        self._instances = dict(instances)
        self._nodes = {instance: node for node, instance in instances.items()}
        self._pool = pool
        self._zone = zone
        self._times = times or Time()
        self._limits = limits or Limits()

        def make() -> Any:
            return make_client(
                region, endpoint_url=endpoint_url, ca_file=ca_file, credentials_file=credentials_file, read_s=read_s
            )

        self._api = Ec2Api(client or make, self._times)
        self._looks = Looks(self._api, self._times, self._nodes)
        self._expected: dict[tuple[str, str], str] = {}
        """volume and instance -> device name that is chosen ahead"""
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def aclose(self) -> None:
        await self._looks.aclose()
        await self._api.aclose()

    # ------------------------------------------------------------------ volumes

    async def create(
        self,
        *,
        type: VolumeType,  # noqa: A002 - the protocol's name
        size_bytes: int,
        image: str | None = None,
    ) -> Volume:
        """Make a volume, Multi-Attach enabled if its type can be; return when it is available.

        Raises ``BadInput`` for a size that is not whole GiB or too small for the type, ``Refused`` for an image.
        """
        if image is not None:
            hint = "images are copied by a pool's own volume server"
            raise Refused(f"EBS has no image {image!r}", field="image", hint=hint)
        parameters: dict[str, Any] = {
            "AvailabilityZone": self._zone,
            "Size": _gib(type, size_bytes),
            "VolumeType": type.value,
            "ClientToken": uuid.uuid4().hex,  # makes the order the same one, however often it is sent
            "TagSpecifications": [{"ResourceType": "volume", "Tags": [{"Key": POOL, "Value": self._pool}]}],
        }
        if type.multi_attach:
            iops = min(IOPS, IOPS_PER_GIB * parameters["Size"])
            parameters |= {"MultiAttachEnabled": True, "Iops": iops}
        patience = self._times.patience(self._limits.create_s, _LOOKS)
        while True:
            try:
                made = str((await self._api.ask("create_volume", **parameters))["VolumeId"])
                break
            except OutcomeUnknown as error:
                lost = error
            await patience.pause(lost)
        while True:
            try:
                if (seen := await self._looks.see(made)).state == "available":
                    return seen.volume
                state = seen.state
                if state == "error":
                    raise Refused(f"EC2 could not make {made}: its state is error", field="volume", hint="delete it")
            except NotFound:
                state = "not yet to be seen"  # describing lags behind creating
            await patience.pause(_pending(f"{made} is made, and {state}"))

    async def describe(self, volume: str) -> Volume:
        return (await self._looks.see(volume)).volume

    async def list(self) -> tuple[Volume, ...]:
        """Return the volumes that this pool has made."""
        filters = [{"Name": f"tag:{POOL}", "Values": [self._pool]}]
        found: list[Volume] = []
        token: dict[str, str] = {}
        while True:
            answer = await self._api.ask("describe_volumes", Filters=filters, MaxResults=500, **token)
            seen = (EbsView(record, self._nodes) for record in answer["Volumes"])
            found += [each.volume for each in seen if each.state != "deleting"]
            if not answer.get("NextToken"):
                return tuple(found)
            token = {"NextToken": answer["NextToken"]}

    async def delete(self, volume: str) -> None:
        """Idempotent. Raise ``Refused`` for a volume that this pool has not made."""
        patience = self._times.patience(self._limits.create_s, _LOOKS)
        while True:
            try:
                seen = await self._looks.see(volume)
                if seen.state == "deleting":
                    return
                if seen.tags.get(POOL) != self._pool:
                    hint = "delete it where it was made, or tag it emp:pool"
                    raise Refused(f"{volume} was not made by the pool {self._pool}", field="volume", hint=hint)
                seen.check_free()
                await self._api.ask("delete_volume", VolumeId=volume)
                return
            except NotFound:
                return
            except OutcomeUnknown as error:
                lost = error
            await patience.pause(lost)

    async def resize(self, volume: str, size_bytes: int) -> Volume:
        """As the protocol says; returns when the volume has its new size, on which AWS works on for hours.

        Raises ``Refused`` where AWS does not modify it: for six hours after the last time, for example.
        """
        async with self._lock(volume):
            patience = self._times.patience(self._limits.resize_s, _LOOKS)
            is_ordered = False
            while True:
                seen = await self._looks.see(volume)
                size_gib = self._size_to_grow_to(seen.volume, size_bytes)
                last = await self._last_modification(volume)
                state, is_ours = str(last.get("ModificationState")), last.get("TargetSize") == size_gib
                if size_gib * GIB == seen.volume.size_bytes and not (is_ours and state == "modifying"):
                    return seen.volume
                if state == "failed":
                    if is_ordered and is_ours:
                        raise Refused(f"EC2 could not resize {volume}: {last.get('StatusMessage')}", field="volume")
                    is_ours = False
                failure: EmpError = _pending(f"{volume} is {state}")
                if not is_ours:
                    failure = await self._order_resize(volume, size_gib, is_ordered=is_ordered) or failure
                    is_ordered = True
                await patience.pause(failure)

    async def _order_resize(self, volume: str, size_gib: int, *, is_ordered: bool) -> EmpError | None:
        """Return why it is not known what came of it. ``is_ordered``: it was ordered before, and does not show yet."""
        try:
            await self._api.ask("modify_volume", VolumeId=volume, Size=size_gib)
        except OutcomeUnknown as error:
            log.warning("%s", error)
            return error
        except Refused as error:
            if not is_ordered or code_of(error) != "IncorrectModificationState":
                raise
            return error
        return None

    async def _last_modification(self, volume: str) -> Mapping[str, Any]:
        """Return nothing for a volume that has never been modified: asked for by its id, that would be an error."""
        filters = [{"Name": "volume-id", "Values": [volume]}]
        answer = await self._api.ask("describe_volumes_modifications", Filters=filters)
        return max(answer["VolumesModifications"], key=lambda each: each["StartTime"], default={})

    def _size_to_grow_to(self, seen: Volume, size_bytes: int) -> int:
        if size_bytes < seen.size_bytes:
            message = f"{seen.id} has {format_size(seen.size_bytes)} and cannot shrink to {format_size(size_bytes)}"
            raise BadInput(message, field="size_bytes", hint="volumes only grow")
        return _gib(seen.type, size_bytes)

    # ------------------------------------------------------------------ attaching

    async def expect(self, volume: str, *, node: str, epoch: int) -> None:
        """Write for whom it will be attached, and choose its device: two of the three calls that attaching takes."""
        instance = self._instance(node)
        async with self._lock(volume):
            seen = await self._looks.see(volume)
            seen.check_epoch(epoch, instance)
            if seen.on(instance) is None:  # else the tag says for whom it is attached now
                await self._tag(seen, EPOCH + instance, epoch)
                self._expected[volume, instance] = await self._free_device(instance)

    async def attach(self, volume: str, *, node: str, epoch: int) -> Attachment:
        """As the protocol says; returns when EC2 says ``attached``, a moment before the node's kernel has the device.

        Raises ``Refused`` for a node in another zone or with no room.
        """
        instance = self._instance(node)
        async with self._lock(volume):
            patience = self._times.patience(self._limits.attach_s, _LOOKS)
            while True:
                seen = await self._looks.see(volume)
                seen.check_epoch(epoch, instance)
                held = seen.on(instance)
                state = str(held["State"]) if held else "not attached"
                refusal: EmpError | None = None
                if held is None and seen.state != "creating":
                    seen.check_room(node)
                    refusal = await self._order_attach(seen, instance, epoch)
                elif held and seen.epoch_on(instance) != epoch:
                    if state in ("attaching", "attached"):
                        await self._tag(seen, EPOCH + instance, epoch)
                elif state == "attached":  # and the tag has been read back: a later look goes by it
                    return attachment_of(volume, node, epoch)
                await patience.pause(refusal or _pending(f"{volume} at {node} is {state}"))

    async def _order_attach(self, seen: EbsView, instance: str, epoch: int) -> EmpError | None:
        """Say for whom, then attach; the next look shows what came of it. Return a refusal that need not last."""
        await self._forget(seen)
        await self._tag(seen, EPOCH + instance, epoch)
        device = self._expected.pop((seen.id, instance), None) or await self._free_device(instance)
        try:
            await self._api.ask("attach_volume", VolumeId=seen.id, InstanceId=instance, Device=device)
        except OutcomeUnknown as error:
            log.warning("%s", error)
        except EmpError as error:
            # In use: by an order of ours whose reply was lost, or by somebody else's. In an incorrect state: it, or the
            # instance, is only now getting ready. The device: another volume took it in this very moment.
            is_taken = code_of(error) == "InvalidParameterValue" and "already in use" in error.message
            if not is_taken and code_of(error) not in ("VolumeInUse", "IncorrectState"):
                raise
            log.info("%s", error)
            return error
        return None

    async def _free_device(self, instance: str) -> str:
        answer = await self._api.ask("describe_instances", InstanceIds=[instance])
        found = [i for reservation in answer["Reservations"] for i in reservation["Instances"]]
        taken = {mapping["DeviceName"] for i in found for mapping in i.get("BlockDeviceMappings", ())}
        free = [device for device in DEVICES if device not in taken]
        if not free:
            hint = "detach another volume of this node, or choose another node"
            raise Refused(f"all device names of {instance} are taken", field="node", hint=hint)
        expected = {device for (_, at), device in self._expected.items() if at == instance}
        free = [device for device in free if device not in expected] or free
        return self._times.chance.choice(free)  # several volumes may be attached to one node at the same time

    # ------------------------------------------------------------------ detaching

    async def detach(self, volume: str, *, node: str, epoch: int, unheld: bool = False) -> None:
        """As the protocol says. ``unheld``: no QEMU has it open and none will (it has ended, or its node is fenced).

        Only an ``unheld`` volume is ever detached by force, and only when detaching in order has not ended in time.
        Otherwise one that hangs raises ``OutcomeUnknown``: the order stands, and may end at any moment.
        """
        instance = self._instance(node)
        async with self._lock(volume):
            await self._detach(volume, instance, lambda found: found == epoch, unheld=unheld)

    async def fence(self, volume: str, *, epoch: int, unheld: bool = False) -> None:
        """As the protocol says, for every instance that has it. ``unheld``: see ``detach``; of all that are older."""
        async with self._lock(volume):
            patience = self._times.patience(self._limits.create_s, _LOOKS)
            while (seen := await self._looks.see(volume)).fence < epoch:  # until it is read back
                await self._tag(seen, FENCE, epoch)
                await patience.pause(_pending(f"the fence of {volume} is not seen yet"))
            fence = seen.fence
            older = [instance for instance in seen.instances() if seen.epoch_on(instance) < fence]
            orders = (self._detach(volume, instance, lambda found: found < fence, unheld=unheld) for instance in older)
            results = await asyncio.gather(*orders, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _detach(self, volume: str, instance: str, is_meant: Callable[[int], bool], *, unheld: bool) -> None:
        patience = self._times.patience(self._limits.detach_s, _LOOKS)
        while True:
            try:
                seen = await self._looks.see(volume)
            except NotFound:
                return
            held, epoch = seen.on(instance), seen.epoch_on(instance)
            if held is None or not is_meant(epoch):
                return
            is_going = held["State"] in ("detaching", "busy")
            force = unheld and is_going and patience.spent_s >= self._limits.force_after_s
            if force or not is_going:
                await self._order_detach(volume, instance, force=force)
            where = self._nodes.get(instance, instance)
            await patience.pause(_stuck(volume, where, str(held["State"])))

    async def _order_detach(self, volume: str, instance: str, *, force: bool) -> None:
        if force:
            log.warning("%s does not leave %s, and nothing holds it there: it is detached by force", volume, instance)
        try:
            await self._api.ask("detach_volume", VolumeId=volume, InstanceId=instance, Force=force)
        except OutcomeUnknown as error:
            log.warning("%s", error)
        except EmpError as error:
            if code_of(error) not in ("IncorrectState", "InvalidAttachment.NotFound", "InvalidVolume.NotFound"):
                raise
            log.info("%s", error)  # it has changed since the last look: the next one says to what

    # ------------------------------------------------------------------ before a move

    async def obstacles(self, volumes: Sequence[str], *, nodes: Sequence[str]) -> dict[str, dict[str, str]]:
        known = {node: self._instances[node] for node in nodes if node in self._instances}
        hint = "no instance is named for it in the controller's configuration"
        found = {node: dict.fromkeys(volumes, f"{node}: {hint}") for node in nodes if node not in known}
        return found | await obstacles(self._api, self._looks, volumes, known)

    # ------------------------------------------------------------------ tags and looks

    async def _tag(self, seen: EbsView, key: str, epoch: int) -> None:
        if seen.tags.get(key) != str(epoch):
            await self._insist("create_tags", Resources=[seen.id], Tags=[{"Key": key, "Value": str(epoch)}])

    async def _forget(self, seen: EbsView) -> None:
        """Remove the tags of instances that have left. AWS takes 50 of a volume, and some are people's own."""
        there = {EPOCH + instance for instance in seen.instances()}
        gone = [key for key in seen.tags if key.startswith(EPOCH) and key not in there]
        if len(gone) >= MAX_NODES:
            await self._insist("delete_tags", Resources=[seen.id], Tags=[{"Key": key} for key in gone])

    async def _insist(self, call: str, **parameters: Any) -> None:
        """Give an order that may simply be given again until it has been answered."""
        patience = self._times.patience(self._limits.create_s, _LOOKS)
        while True:
            try:
                await self._api.ask(call, **parameters)
                return
            except OutcomeUnknown as error:
                lost = error
            await patience.pause(lost)

    def _lock(self, volume: str) -> asyncio.Lock:
        return self._locks[check_volume_id(volume)]

    def _instance(self, node: str) -> str:
        if node in self._instances:
            return self._instances[node]
        if _INSTANCE_ID.fullmatch(node):
            return node
        hint = "add it to volumes.instances in the controller's configuration"
        raise BadInput(f"no instance is named for node {node}", field="node", hint=hint)


def _gib(kind: VolumeType, size_bytes: int) -> int:
    if kind not in SMALLEST_GIB:
        raise BadInput(f"EBS has no volumes of the type {kind}", field="type", hint=f"one of {', '.join(SMALLEST_GIB)}")
    size_gib, rest = divmod(size_bytes, GIB)
    if rest or size_gib < SMALLEST_GIB[kind]:
        hint = f"whole GiB, at least {SMALLEST_GIB[kind]} for {kind}"
        raise BadInput(f"{format_size(size_bytes)} is no size for a volume of EBS", field="size_bytes", hint=hint)
    return size_gib


def _pending(message: str) -> OutcomeUnknown:
    return OutcomeUnknown(message, field="volume", hint="the order stands; give it again to go on waiting")


def _stuck(volume: str, node: str, state: str) -> OutcomeUnknown:
    hint = "the order stands: see that nothing on the node has it open, then detach it again"
    return OutcomeUnknown(f"{volume} is still {state} at {node}", field="volume", hint=hint)
