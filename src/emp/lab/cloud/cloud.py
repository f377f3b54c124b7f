"""The simulated cloud as one state machine: no socket, no task, and its clock is handed in.

An action changes the records and answers at once, as on AWS; what takes time is due later. ``settle`` moves on what is
due and returns what the data plane must now do; ``done`` says that it has. Where a rule comes from is said beside it;
``docs/cloud.md`` has them all.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from emp.lab.cloud import describing
from emp.lab.cloud.attaching import check_attach, check_detach
from emp.lab.cloud.creating import check_new, check_tags, check_token
from emp.lab.cloud.eni_records import Interface
from emp.lab.cloud.errors import DRY_RUN, CloudError
from emp.lab.cloud.knobs import Knobs
from emp.lab.cloud.memory import Memory
from emp.lab.cloud.modifying import FILTERS as MODIFICATION_FILTERS
from emp.lab.cloud.modifying import check_modify, modification_answer
from emp.lab.cloud.network import Network
from emp.lab.cloud.plane import PlaneVolume
from emp.lab.cloud.records import (
    Attachment,
    AttachmentState,
    Instance,
    Modification,
    ModificationState,
    Volume,
    check_id,
)  # fmt: skip
from emp.lab.cloud.vpc import Vpc

RETRY_S = 1.0
"""after the data plane has failed"""

Request = Mapping[str, Any]
Answer = dict[str, Any] | None


class Deed(StrEnum):
    OPEN = "open"
    CLOSE = "close"
    DELETE = "delete"
    GROW = "grow"


@dataclass(frozen=True)
class Change:
    """What the data plane must do for the records to move on."""

    deed: Deed
    volume: PlaneVolume
    instance: str = ""
    epoch: int = 0
    exports: tuple[tuple[str, int], ...] = ()
    """of a volume that grows: instance and the epoch under which it gets the bigger one"""


@dataclass(frozen=True)
class Showing:
    """A volume as a device of an instance: by which attachment, and how big."""

    volume: str
    epoch: int
    size_bytes: int


class Cloud:
    """``clock`` gives seconds that only rise, ``began`` is the time of day at its present reading.

    ``new_id`` gives 16 hexadecimal digits.
    """

    def __init__(
        self,
        instances: Iterable[Instance],
        *,
        clock: Callable[[], float],
        began: datetime,
        knobs: Knobs | None = None,
        vpc: Vpc | None = None,
        new_id: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        self.knobs = knobs or Knobs()
        self.instances = {instance.id: instance for instance in instances}
        self.clock = clock
        self._began = began
        self._began_s = clock()
        self._new_id = new_id
        self._volumes: dict[str, Volume] = {}
        self._tokens: dict[str, tuple[dict[str, Any], str]] = {}
        self._actions: dict[str, Callable[[Request], Answer]] = {
            "CreateVolume": self._create_volume,
            "DeleteVolume": self._delete_volume,
            "AttachVolume": self._attach_volume,
            "DetachVolume": self._detach_volume,
            "ModifyVolume": self._modify_volume,
            "DescribeVolumes": self._describe_volumes,
            "DescribeVolumesModifications": self._describe_volumes_modifications,
            "DescribeInstances": self._describe_instances,
            "DescribeInstanceTypes": self._describe_instance_types,
            "CreateTags": self._create_tags,
            "DeleteTags": self._delete_tags,
        }
        vpc = vpc or Vpc()
        self.network = Network(
            vpc,
            self.instances,
            clock=clock,
            time=self._time,
            knobs=lambda: self.knobs,
            volumes_at=lambda instance: sum(instance in volume.attachments for volume in self._volumes.values()),
            new_id=new_id,
        )
        self._actions |= self.network.actions | {
            "DescribeSubnets": vpc.describe_subnets,
            "DescribeSecurityGroups": vpc.describe_security_groups,
        }

    @property
    def actions(self) -> frozenset[str]:
        return frozenset(self._actions)

    @property
    def volumes(self) -> Mapping[str, Volume]:
        return self._volumes

    def perform(self, action: str, request: Request) -> Answer:
        """Carry out one action that has been checked against the service's model. Raises ``CloudError``."""
        if request.get("DryRun"):
            # https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_AttachVolume.html (DryRun): nothing but the
            # permission is checked, and the good answer is an error.
            message = "Request would have succeeded, but DryRun flag is set."
            raise CloudError("DryRunOperation", message, status=DRY_RUN)
        return self._actions[action](request)

    # ------------------------------------------------------------------ time

    def due_s(self) -> float | None:
        """Return when ``settle`` next has something to return, by the clock; None: when somebody has asked for more."""
        volumes = [volume for volume in self._volumes.values() if not volume.is_growing]
        times = [attachment.due_s for volume in volumes for attachment in volume.attachments.values()]
        times += [v.modification.due_s for v in volumes if v.modification and not v.is_changing_hands]
        times += [volume.deleted_s for volume in self._volumes.values() if not volume.is_emptied]
        times.append(self.network.due_s())
        return min((at_s for at_s in times if at_s is not None), default=None)

    def settle(self) -> list[Change]:
        """Return what the data plane is to do now; each change once, until ``failed``."""
        now_s = self.clock()
        changes: list[Change] = []
        for volume in self._volumes.values():
            if volume.deleted_s is not None and volume.deleted_s <= now_s and not volume.is_emptied:
                volume.is_emptied = True
                changes.append(Change(Deed.DELETE, _plane(volume)))
            if grown := self._grow(volume, now_s):
                changes.append(grown)
            for attachment in volume.attachments.values() if not volume.is_growing else ():
                if attachment.due_s is not None and attachment.due_s <= now_s:
                    attachment.due_s = None
                    deed = Deed.CLOSE if attachment.state.is_going else Deed.OPEN
                    changes.append(Change(deed, _plane(volume), attachment.instance, attachment.epoch))
        return changes

    def _grow(self, volume: Volume, now_s: float) -> Change | None:
        """Move a modification on; it waits while an attachment is opened or closed, and they wait for it."""
        last = volume.modification
        if last is None or last.due_s is None or last.due_s > now_s or volume.is_changing_hands:
            return None
        last.due_s = None
        if last.state is not ModificationState.MODIFYING:
            last.state, last.ended = ModificationState.COMPLETED, self._time()
            return None
        exports = []
        for attachment in volume.attachments.values():
            if attachment.state is AttachmentState.ATTACHED:
                volume.epochs += 1
                exports.append((attachment.instance, volume.epochs))
        bigger = dataclasses.replace(_plane(volume), size_bytes=last.target_gib << 30)
        return Change(Deed.GROW, bigger, exports=tuple(exports))

    def done(self, change: Change) -> None:
        """The data plane has done it."""
        volume = self._volumes[change.volume.id]
        match change.deed:
            case Deed.OPEN:
                attachment = volume.attachments[change.instance]
                attachment.state = AttachmentState.ATTACHED
                attachment.shows_s = self.clock() + self.knobs.device_lag_s
            case Deed.CLOSE:
                del volume.attachments[change.instance]
            case Deed.DELETE:
                del self._volumes[volume.id]
            case Deed.GROW:
                self._grown(volume, change)

    def _grown(self, volume: Volume, change: Change) -> None:
        last, now_s = volume.modification, self.clock()
        assert last is not None
        for instance, epoch in change.exports:
            if attachment := volume.attachments.get(instance):
                attachment.before, attachment.grown_s = (attachment.epoch, volume.size_gib), now_s
                attachment.grown_s += self.knobs.device_lag_s
                attachment.epoch = epoch
        volume.size_gib = last.target_gib
        last.state, last.due_s = ModificationState.OPTIMIZING, now_s + self.knobs.latency.optimize_s

    def failed(self, change: Change) -> None:
        """The data plane could not; it is to be asked again."""
        volume, again_s = self._volumes[change.volume.id], self.clock() + RETRY_S
        if change.deed is Deed.DELETE:
            volume.is_emptied, volume.deleted_s = False, again_s
        elif change.deed is Deed.GROW:
            assert volume.modification is not None
            volume.modification.due_s = again_s
        else:
            volume.attachments[change.instance].due_s = again_s

    def turn(self, knobs: Knobs) -> None:
        """Put ``knobs`` in force. What has begun keeps its latency; what is stuck no more goes on."""
        self.knobs = knobs
        for volume in self._volumes.values():
            for attachment in volume.attachments.values():
                if attachment.is_stuck and volume.id not in knobs.stuck | knobs.busy:
                    self._let_go(attachment)

    # ------------------------------------------------------------------ what outlives the process

    def memory(self) -> Memory:
        """Return all that ``recall`` needs. The faults that are left are not part of it."""
        return Memory(
            began=self._began,
            began_s=self._began_s,
            at_s=self.clock(),
            knobs=self.knobs.model_copy(update={"faults": ()}),
            volumes=tuple(self._volumes.values()),
            tokens=self._tokens,
            network=self.network.memory(),
        )

    def recall(self, memory: Memory) -> None:
        """Go on from what an earlier process remembered; what it had asked of the data plane is asked again."""
        back_s = min(0.0, self.clock() - memory.at_s)  # the machine was booted since, and its clock began anew
        self._began, self._began_s, self.knobs = memory.began, memory.began_s + back_s, memory.knobs
        self._tokens = dict(memory.tokens)
        self._volumes = {volume.id: volume for volume in memory.volumes}
        self.network.recall(memory.network, back_s)
        now_s = self.clock()
        for volume in self._volumes.values():
            volume.visible_s += back_s
            volume.available_s += back_s
            volume.is_emptied = False
            if (last := volume.modification) is not None:
                last.began_s += back_s
                if last.due_s is not None:
                    last.due_s += back_s
                elif last.is_growing:
                    last.due_s = now_s
            if volume.deleted_s is not None:
                volume.deleted_s += back_s
            for attachment in volume.attachments.values():
                if attachment.shows_s is not None:
                    attachment.shows_s += back_s
                if attachment.grown_s is not None:
                    attachment.grown_s += back_s
                if attachment.due_s is not None:
                    attachment.due_s += back_s
                elif attachment.state is not AttachmentState.ATTACHED and not attachment.is_stuck:
                    attachment.due_s = now_s

    def shown(self, volume: str) -> PlaneVolume | None:
        """Return a volume as the data plane sees it; None where there is none of that id."""
        return _plane(self._volumes[volume]) if volume in self._volumes else None

    def devices_of(self, instance: str) -> list[Showing]:
        """Return the volumes that show at ``instance``: attached, and not yet gone."""
        now_s, found = self.clock(), []
        for volume in self._volumes.values():
            held = volume.attachments.get(instance)
            if held is None or held.shows_s is None or held.shows_s > now_s:
                continue
            epoch, size_gib = held.epoch, volume.size_gib
            if held.before is not None and held.grown_s is not None and held.grown_s > now_s:
                epoch, size_gib = held.before
            found.append(Showing(volume.id, epoch, size_gib << 30))
        return found

    def _let_go(self, attachment: Attachment) -> None:
        attachment.is_stuck = False
        attachment.state = AttachmentState.DETACHING
        attachment.due_s = self.clock() + self.knobs.latency.detach_s

    # ------------------------------------------------------------------ volumes

    def _create_volume(self, request: Request) -> Answer:
        """The same ClientToken with the same parameters makes one volume; with others it is refused.

        https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-idempotency.html
        """
        token = check_token(request.get("ClientToken"))
        if token is not None and (made := self._made_before(token, request)):
            return describing.created_answer(made, self.clock())
        new = check_new(request, {instance.zone for instance in self.instances.values()})
        now_s = self.clock()
        volume = Volume(
            id=f"vol-0{self._new_id()}",
            type=new.type,
            size_gib=new.size_gib,
            zone=new.zone,
            created=self._time(),
            iops=new.iops,
            throughput=new.throughput,
            multi_attach=new.multi_attach,
            encrypted=new.encrypted,
            tags=new.tags,
            visible_s=now_s + self.knobs.describe_lag_s,
            available_s=now_s + self.knobs.latency.create_s,
        )
        answer = describing.created_answer(volume, now_s) | {"State": "creating"}
        self._volumes[volume.id] = volume
        if token is not None:
            self._tokens[token] = (dict(request), volume.id)
        return answer

    def _made_before(self, token: str, request: Request) -> Volume | None:
        if token not in self._tokens:
            return None
        before, volume = self._tokens[token]
        if before != dict(request):
            message = "The client token was used before, with other parameters"
            raise CloudError("IdempotentParameterMismatch", message)
        if volume not in self._volumes:
            raise CloudError("InvalidVolume.NotFound", f"The volume '{volume}' does not exist.")
        return self._volumes[volume]

    def _delete_volume(self, request: Request) -> Answer:
        """Only an ``available`` one: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DeleteVolume.html"""
        volume, now_s = self._volume(request["VolumeId"]), self.clock()
        if volume.attachments:
            where = ", ".join(volume.attachments)
            raise CloudError("VolumeInUse", f"Volume {volume.id} is currently attached to {where}")
        if (state := volume.state(now_s)) != "available":
            raise CloudError("IncorrectState", f"The volume '{volume.id}' is '{state}'")
        volume.deleted_s = now_s + self.knobs.latency.delete_s
        return None

    def _attach_volume(self, request: Request) -> Answer:
        volume, instance = self._volume(request["VolumeId"]), self._instance(request["InstanceId"])
        device, now_s = request["Device"], self.clock()
        # The limit is shared, and counts one interface already.
        shared = max(0, len(self.network.at(instance.id)) - 1)
        check_attach(volume, instance, device, others=self._volumes.values(), now_s=now_s, taken=shared)
        volume.epochs += 1
        attachment = Attachment(instance.id, device, volume.epochs, self._time())
        attachment.due_s = now_s + self.knobs.latency.attach_s
        volume.attachments[instance.id] = attachment
        return describing.attachment_answer(volume, attachment)

    def _detach_volume(self, request: Request) -> Answer:
        """``busy`` is a device in use: https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DetachVolume.html"""
        volume, force = self._volume(request["VolumeId"]), request.get("Force", False)
        if (instance := request.get("InstanceId")) is not None:
            self._instance(instance)
        found = check_detach(volume, instance, request.get("Device"), force=force, now_s=self.clock())
        if not found.state.is_going or found.is_stuck:
            self._let_go(found)
            if not force and volume.id in self.knobs.stuck | self.knobs.busy:
                found.is_stuck, found.due_s = True, None
                found.state = AttachmentState.BUSY if volume.id in self.knobs.busy else AttachmentState.DETACHING
        return describing.attachment_answer(volume, found)

    def _modify_volume(self, request: Request) -> Answer:
        volume, now_s = self._volume(request["VolumeId"]), self.clock()
        target_gib = check_modify(volume, request, now_s=now_s, pause_s=self.knobs.modify_pause_s)
        volume.modification = Modification(volume.size_gib, target_gib, self._time(), now_s)
        volume.modification.due_s = now_s + self.knobs.latency.modify_s
        return {"VolumeModification": modification_answer(volume, volume.modification)}

    def _describe_volumes_modifications(self, request: Request) -> Answer:
        """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeVolumesModifications.html"""
        named = [self._volume(name) for name in request.get("VolumeIds", ())]
        if missing := [volume.id for volume in named if volume.modification is None]:
            message = f"Modification for volume '{missing[0]}' does not exist."
            raise CloudError("InvalidVolumeModification.NotFound", message)
        among = named if "VolumeIds" in request else list(self._volumes.values())
        answers = [modification_answer(v, v.modification) for v in among if v.modification]
        left = describing.filtered(answers, request.get("Filters", ()), MODIFICATION_FILTERS)
        shown, token = describing.page(left, request, ids="VolumeIds")
        return {"VolumesModifications": shown, "NextToken": token}

    # ------------------------------------------------------------------ tags

    def _create_tags(self, request: Request) -> Answer:
        """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_CreateTags.html"""
        resources = [self._tagged(name) for name in request["Resources"]]
        tags = [check_tags(request["Tags"], resource.tags) for resource in resources]
        for resource, merged in zip(resources, tags, strict=True):
            resource.tags = merged
        return None

    def _delete_tags(self, request: Request) -> Answer:
        """Without a value the key is enough; without tags all go.

        https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DeleteTags.html
        """
        wanted: Sequence[Mapping[str, str]] | None = request.get("Tags")
        for resource in [self._tagged(name) for name in request["Resources"]]:
            tags = resource.tags
            doomed = list(tags) if wanted is None else [tag["Key"] for tag in wanted if _fits(tag, tags)]
            resource.tags = {key: value for key, value in tags.items() if key not in doomed}
        return None

    def _tagged(self, name: str) -> Volume | Interface:
        return self.network.find(name) if name.startswith("eni-") else self._volume(name)

    # ------------------------------------------------------------------ describing

    def _describe_volumes(self, request: Request) -> Answer:
        now_s = self.clock()
        if (ids := request.get("VolumeIds")) is not None:
            volumes = [self._volume(name) for name in ids]
        else:
            volumes = [volume for volume in self._volumes.values() if volume.visible_s <= now_s]
        answers = [describing.volume_answer(volume, now_s) for volume in volumes]
        left = describing.filtered(answers, request.get("Filters", ()), describing.VOLUME_FILTERS)
        shown, token = describing.page(left, request, ids="VolumeIds")
        return {"Volumes": shown, "NextToken": token}

    def _describe_instance_types(self, request: Request) -> Answer:
        """https://docs.aws.amazon.com/AWSEC2/latest/APIReference/API_DescribeInstanceTypes.html"""
        known = {instance.type: instance for instance in self.instances.values()}
        wanted: Sequence[str] = request.get("InstanceTypes") or list(known)
        if strange := [name for name in wanted if name not in known]:
            message = f"The following supplied instance types do not exist: [{', '.join(strange)}]"
            raise CloudError("InvalidInstanceType", message)
        return {"InstanceTypes": [describing.instance_type_answer(known[name]) for name in wanted]}

    def _describe_instances(self, request: Request) -> Answer:
        ids = request.get("InstanceIds")
        instances = [self._instance(name) for name in ids] if ids is not None else list(self.instances.values())
        answers = [self._instance_answer(instance) for instance in instances]
        left = describing.filtered(answers, request.get("Filters", ()), describing.INSTANCE_FILTERS)
        shown, token = describing.page(left, request, ids="InstanceIds")
        reservations = [{"ReservationId": f"r-{answer['InstanceId'][2:]}", "Instances": [answer]} for answer in shown]
        return {"Reservations": reservations, "NextToken": token}

    def _instance_answer(self, instance: Instance) -> dict[str, Any]:
        interfaces = self.network.at(instance.id)
        return describing.instance_answer(instance, self._volumes.values(), interfaces, self._began)

    # ------------------------------------------------------------------ finding

    def _volume(self, name: str) -> Volume:
        found = self._volumes.get(check_id("vol", name))
        if found is None or found.visible_s > self.clock():
            raise CloudError("InvalidVolume.NotFound", f"The volume '{name}' does not exist.")
        return found

    def _instance(self, name: str) -> Instance:
        if (found := self.instances.get(check_id("i", name))) is None:
            raise CloudError("InvalidInstanceID.NotFound", f"The instance ID '{name}' does not exist")
        return found

    def _time(self) -> datetime:
        return self._began + timedelta(seconds=self.clock() - self._began_s)


def _plane(volume: Volume) -> PlaneVolume:
    return PlaneVolume(volume.id, volume.type, volume.size_gib << 30, dict(volume.tags))


def _fits(tag: Mapping[str, str], tags: Mapping[str, str]) -> bool:
    key = tag["Key"]
    return key in tags and tag.get("Value", tags[key]) == tags[key]
