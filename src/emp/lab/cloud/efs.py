"""The simulated EFS as one state machine: no socket, no task, and its clock is handed in. Like ``cloud.Cloud``.

An action changes the records and answers at once; what takes time is due later. ``settle`` moves on what is due and
returns what the data plane must now do; ``done`` says that it has. Pages named *UG* are below
https://docs.aws.amazon.com/efs/latest/ug/; ``docs/cloud.md`` lists every rule.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from emp.lab.cloud import efs_answers as answers
from emp.lab.cloud.efs_plane import PlanePoint, PlaneTarget
from emp.lab.cloud.efs_records import AccessPoint, EfsState, FileSystem, Life, MountTarget
from emp.lab.cloud.errors import CloudError
from emp.lab.cloud.knobs import Knobs
from emp.lab.cloud.vpc import Subnet, Vpc

RETRY_S = 1.0
"""after the data plane has failed"""
MAX_FILE_SYSTEMS = 1000
MAX_GROUPS = 5
MAX_ACCESS_POINTS = 10_000
"""https://docs.aws.amazon.com/efs/latest/ug/limits.html"""
MAX_DEPTH = 4
"""of an access point's root directory, UG API_RootDirectory.html"""

Request = Mapping[str, Any]
Answer = dict[str, Any] | None


class Deed(StrEnum):
    OPEN = "open"
    CLOSE = "close"
    MAKE = "make"
    REMOVE = "remove"


@dataclass(frozen=True)
class Change:
    """What the data plane must do for the record ``id`` to move on."""

    deed: Deed
    id: str
    what: PlaneTarget | PlanePoint | None = None


class Efs:
    """``clock`` gives seconds that only rise, ``began`` is the time of day at its present reading."""

    def __init__(
        self,
        vpc: Vpc,
        *,
        clock: Callable[[], float],
        began: datetime,
        knobs: Knobs | None = None,
        state: EfsState | None = None,
        new_id: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        self.vpc = vpc
        self.knobs = knobs or Knobs()
        self.clock = clock
        self.state = state or EfsState()
        self._began = began
        self._began_s = clock()
        self._new_id = new_id
        # What was served before a restart is served again, and nobody need know.
        self._reopen = [t for t in self.state.mount_targets.values() if t.life is Life.AVAILABLE]
        vpc.holders.append(self._given)
        self._actions: dict[str, Callable[[Request], Answer]] = {
            "CreateFileSystem": self._create_file_system,
            "DescribeFileSystems": self._describe_file_systems,
            "DeleteFileSystem": self._delete_file_system,
            "CreateMountTarget": self._create_mount_target,
            "DescribeMountTargets": self._describe_mount_targets,
            "DescribeMountTargetSecurityGroups": self._describe_mount_target_security_groups,
            "DeleteMountTarget": self._delete_mount_target,
            "CreateAccessPoint": self._create_access_point,
            "DescribeAccessPoints": self._describe_access_points,
            "DeleteAccessPoint": self._delete_access_point,
        }

    @property
    def actions(self) -> tuple[str, ...]:
        return tuple(self._actions)

    def perform(self, action: str, request: Request) -> Answer:
        """Carry out one action that has been checked against the service's model. Raises ``CloudError``."""
        return self._actions[action](request)

    def turn(self, knobs: Knobs) -> None:
        """Put ``knobs`` in force. What has begun keeps its latency."""
        self.knobs = knobs

    def _given(self) -> Iterator[tuple[str, str]]:
        return ((target.subnet, target.address) for target in self.state.mount_targets.values())

    # ------------------------------------------------------------------ time

    def due_s(self) -> float | None:
        """Return when ``settle`` next has something to do; None: when somebody has asked for more."""
        if self._reopen:
            return self.clock()
        return min((record.due_s for record in self.state.records if record.due_s is not None), default=None)

    def settle(self) -> list[Change]:
        """Return what the data plane is to do now; each change once, until ``failed``."""
        now_s = self.clock()
        changes = [Change(Deed.OPEN, target.id, _plane(target)) for target in self._reopen]
        self._reopen = []
        due = [record for record in self.state.records if record.due_s is not None and record.due_s <= now_s]
        for record in due:
            record.due_s = None
            match record:
                case MountTarget():
                    deed = Deed.CLOSE if record.life is Life.DELETING else Deed.OPEN
                    changes.append(Change(deed, record.id, _plane(record)))
                case AccessPoint(life=Life.CREATING):
                    point = PlanePoint(record.id, record.file_system, record.path, record.creation)
                    changes.append(Change(Deed.MAKE, record.id, point))
                case AccessPoint():
                    del self.state.access_points[record.id]
                case FileSystem(life=Life.DELETING):
                    changes.append(Change(Deed.REMOVE, record.id))
                case FileSystem():
                    record.life = Life.AVAILABLE
        return changes

    def done(self, change: Change) -> None:
        """The data plane has done it."""
        match change.deed:
            case Deed.OPEN if (target := self.state.mount_targets.get(change.id)) and target.life is Life.CREATING:
                target.life = Life.AVAILABLE
            case Deed.MAKE if (point := self.state.access_points.get(change.id)) and point.life is Life.CREATING:
                point.life = Life.AVAILABLE
            case Deed.CLOSE:
                del self.state.mount_targets[change.id]
            case Deed.REMOVE:
                del self.state.file_systems[change.id]

    def failed(self, change: Change) -> None:
        """The data plane could not; it is to be asked again."""
        for record in self.state.records:
            if record.id == change.id:
                record.due_s = self.clock() + RETRY_S

    # ------------------------------------------------------------------ file systems

    def _create_file_system(self, request: Request) -> Answer:
        """One per creation token: UG API_CreateFileSystem.html"""
        token, mode = request["CreationToken"], request.get("ThroughputMode", "bursting")
        for known in self.state.file_systems.values():
            if known.token == token:
                message = f"File system '{known.id}' already exists with creation token '{token}'"
                raise CloudError("FileSystemAlreadyExists", message, FileSystemId=known.id)
        if (mode == "provisioned") != ("ProvisionedThroughputInMibps" in request):
            raise CloudError("BadRequest", "ProvisionedThroughputInMibps goes with ThroughputMode provisioned alone")
        zone = request.get("AvailabilityZoneName")
        if zone is not None and zone not in self.vpc.zones:
            raise CloudError("UnsupportedAvailabilityZone", f"Availability Zone {zone} is not supported")
        if zone is not None and request.get("PerformanceMode") == "maxIO":
            raise CloudError("BadRequest", "One Zone file systems have the performance mode generalPurpose alone")
        if "KmsKeyId" in request and not request.get("Encrypted"):
            raise CloudError("BadRequest", "KmsKeyId needs Encrypted")
        if len(self.state.file_systems) >= MAX_FILE_SYSTEMS:
            raise CloudError("FileSystemLimitExceeded", "The account has as many file systems as it may have")
        made = FileSystem(
            id=f"fs-0{self._new_id()}",
            token=token,
            created=self._time(),
            performance=request.get("PerformanceMode", "generalPurpose"),
            throughput=mode,
            provisioned_mibps=request.get("ProvisionedThroughputInMibps"),
            encrypted=request.get("Encrypted", False),
            zone=zone,
            tags=_tags(request),
            due_s=self.clock() + self.knobs.latency.create_s,
        )
        self.state.file_systems[made.id] = made
        return answers.file_system(made, self.state)

    def _describe_file_systems(self, request: Request) -> Answer:
        """By id or by token, not by both: UG API_DescribeFileSystems.html"""
        self._settle_quietly()
        token = request.get("CreationToken")
        if token is not None and "FileSystemId" in request:
            raise CloudError("BadRequest", "Specify either CreationToken or FileSystemId")
        if "FileSystemId" in request:
            found = [self._file_system(request["FileSystemId"])]
        else:
            found = [each for each in self.state.file_systems.values() if token in (None, each.token)]
        described = [answers.file_system(each, self.state) for each in found]
        return answers.page("FileSystems", described, request)

    def _delete_file_system(self, request: Request) -> Answer:
        """Not while it has mount targets: UG API_DeleteFileSystem.html. Access points go with it (assumed)."""
        doomed = self._file_system(request["FileSystemId"])
        if targets := [target.id for target in self._targets(doomed.id)]:
            message = f"File system '{doomed.id}' has mount targets: {', '.join(targets)}"
            raise CloudError("FileSystemInUse", message)
        if doomed.life is not Life.DELETING:
            for point in [each for each in self.state.access_points.values() if each.file_system == doomed.id]:
                del self.state.access_points[point.id]
            doomed.life, doomed.due_s = Life.DELETING, self.clock() + self.knobs.latency.delete_s
        return None

    # ------------------------------------------------------------------ mount targets

    def _create_mount_target(self, request: Request) -> Answer:
        """One in each zone, all in one VPC: UG API_CreateMountTarget.html"""
        of = self._usable(request["FileSystemId"])
        subnet = self.vpc.subnets.get(request["SubnetId"])
        if subnet is None:
            raise CloudError("SubnetNotFound", f"The subnet ID '{request['SubnetId']}' does not exist")
        if of.zone not in (None, subnet.zone):
            message = f"File system '{of.id}' is in {of.zone} alone, and {subnet.id} is in {subnet.zone}"
            raise CloudError("AvailabilityZonesMismatch", message)
        for other in self._targets(of.id):
            if other.zone == subnet.zone:
                raise CloudError("MountTargetConflict", f"mount target '{other.id}' is in {other.zone} already")
            if other.vpc != subnet.vpc:
                raise CloudError("MountTargetConflict", f"mount target '{other.id}' is in the VPC {other.vpc}")
        made = MountTarget(
            id=f"fsmt-0{self._new_id()}",
            file_system=of.id,
            subnet=subnet.id,
            zone=subnet.zone,
            vpc=subnet.vpc,
            address=self._address(subnet, request.get("IpAddress")),
            interface=f"eni-0{self._new_id()}",
            groups=self._groups(subnet, request.get("SecurityGroups")),
            due_s=self.clock() + self.knobs.latency.attach_s,
        )
        self.state.mount_targets[made.id] = made
        return answers.mount_target(made)

    def _address(self, subnet: Subnet, wanted: str | None) -> str:
        taken = self.vpc.taken(subnet.vpc)
        if wanted is None:
            free = self.vpc.free_address(subnet, taken)
            if free is None:
                raise CloudError("NoFreeAddressesInSubnet", f"The subnet {subnet.id} has no free address")
            return free
        first, last = subnet.usable
        try:
            inside = first <= ipaddress.IPv4Address(wanted) <= last
        except ValueError:
            inside = False
        if not inside:
            raise CloudError("BadRequest", f"Address {wanted} does not fall within the subnet's address range")
        if any(ipaddress.IPv4Address(wanted) in ipaddress.IPv4Network(each) for each in taken):
            raise CloudError("IpAddressInUse", f"Address {wanted} is in use")
        return wanted

    def _groups(self, subnet: Subnet, wanted: list[str] | None) -> list[str]:
        """The VPC's default one, unless others are named: UG API_CreateMountTarget.html"""
        if not wanted:
            return [self.vpc.default_group(subnet.vpc).id]
        if len(wanted) > MAX_GROUPS:
            raise CloudError("SecurityGroupLimitExceeded", f"A mount target has {MAX_GROUPS} security groups at most")
        for name in wanted:
            group = self.vpc.groups.get(name)
            if group is None or group.vpc != subnet.vpc:
                raise CloudError("SecurityGroupNotFound", f"The security group '{name}' does not exist in the VPC")
        return list(wanted)

    def _describe_mount_targets(self, request: Request) -> Answer:
        """By file system, mount target or access point, exactly one: UG API_DescribeMountTargets.html"""
        self._settle_quietly()
        match [name for name in ("FileSystemId", "MountTargetId", "AccessPointId") if name in request]:
            case ["FileSystemId"]:
                found = self._targets(self._file_system(request["FileSystemId"]).id)
            case ["MountTargetId"]:
                found = [self._mount_target(request["MountTargetId"])]
            case ["AccessPointId"]:
                found = self._targets(self._access_point(request["AccessPointId"]).file_system)
            case _:
                raise CloudError("BadRequest", "Specify one of FileSystemId, MountTargetId and AccessPointId")
        return answers.page("MountTargets", [answers.mount_target(each) for each in found], request)

    def _describe_mount_target_security_groups(self, request: Request) -> Answer:
        """Not before its interface is there: UG API_DescribeMountTargetSecurityGroups.html"""
        self._settle_quietly()
        target = self._mount_target(request["MountTargetId"])
        if target.life is Life.CREATING:
            raise CloudError("IncorrectMountTargetState", f"mount target '{target.id}' is {target.life}")
        return {"SecurityGroups": list(target.groups)}

    def _delete_mount_target(self, request: Request) -> Answer:
        """Breaks every mount over it by force: UG API_DeleteMountTarget.html"""
        target = self._mount_target(request["MountTargetId"])
        if target.life is not Life.DELETING:
            target.life, target.due_s = Life.DELETING, self.clock() + self.knobs.latency.detach_s
        return None

    # ------------------------------------------------------------------ access points

    def _create_access_point(self, request: Request) -> Answer:
        """One per client token: UG API_CreateAccessPoint.html"""
        token = request["ClientToken"]
        for known in self.state.access_points.values():
            if known.token == token:
                message = f"Access point '{known.id}' already exists with client token '{token}'"
                raise CloudError("AccessPointAlreadyExists", message, AccessPointId=known.id)
        of, root = self._usable(request["FileSystemId"]), request.get("RootDirectory", {})
        path = root.get("Path", "/")
        steps = path.strip("/").split("/") if path != "/" else []
        if len(steps) > MAX_DEPTH or any(step in ("", ".", "..") for step in steps):
            raise CloudError("BadRequest", f"The root directory's path has {MAX_DEPTH} subdirectories at most")
        if sum(each.file_system == of.id for each in self.state.access_points.values()) >= MAX_ACCESS_POINTS:
            raise CloudError("AccessPointLimitExceeded", f"File system '{of.id}' has as many as it may have")
        made = AccessPoint(
            id=f"fsap-0{self._new_id()}",
            token=token,
            file_system=of.id,
            path="/" + "/".join(steps),
            user=request.get("PosixUser"),
            creation=root.get("CreationInfo"),
            tags=_tags(request),
            due_s=self.clock() + self.knobs.latency.create_s,
        )
        self.state.access_points[made.id] = made
        return answers.access_point(made)

    def _describe_access_points(self, request: Request) -> Answer:
        """UG API_DescribeAccessPoints.html"""
        self._settle_quietly()
        if "AccessPointId" in request and "FileSystemId" in request:
            raise CloudError("BadRequest", "Specify either AccessPointId or FileSystemId")
        if "AccessPointId" in request:
            found = [self._access_point(request["AccessPointId"])]
        else:
            of = self._file_system(request["FileSystemId"]).id if "FileSystemId" in request else None
            found = [each for each in self.state.access_points.values() if of in (None, each.file_system)]
        described = [answers.access_point(each) for each in found]
        return answers.page(
            "AccessPoints", described, request, size="MaxResults", token="NextToken", following="NextToken"
        )

    def _delete_access_point(self, request: Request) -> Answer:
        """UG API_DeleteAccessPoint.html"""
        point = self._access_point(request["AccessPointId"])
        point.life, point.due_s = Life.DELETING, self.clock() + self.knobs.latency.delete_s
        return None

    # ------------------------------------------------------------------ finding

    def _file_system(self, name: str) -> FileSystem:
        found = self.state.file_systems.get(name.rpartition("/")[2])
        if found is None:
            raise CloudError("FileSystemNotFound", f"File system '{name}' does not exist.")
        return found

    def _usable(self, name: str) -> FileSystem:
        self._settle_quietly()
        found = self._file_system(name)
        if found.life is not Life.AVAILABLE:
            raise CloudError("IncorrectFileSystemLifeCycleState", f"File system '{name}' is {found.life}")
        return found

    def _mount_target(self, name: str) -> MountTarget:
        if (found := self.state.mount_targets.get(name)) is None:
            raise CloudError("MountTargetNotFound", f"Mount target '{name}' does not exist.")
        return found

    def _access_point(self, name: str) -> AccessPoint:
        if (found := self.state.access_points.get(name.rpartition("/")[2])) is None:
            raise CloudError("AccessPointNotFound", f"Access point '{name}' does not exist.")
        return found

    def _targets(self, file_system: str) -> list[MountTarget]:
        return [each for each in self.state.mount_targets.values() if each.file_system == file_system]

    def _settle_quietly(self) -> None:
        """Let a file system leave ``creating`` by the clock alone: nothing of the data plane waits for it."""
        for each in self.state.file_systems.values():
            if each.life is Life.CREATING and each.due_s is not None and each.due_s <= self.clock():
                each.life, each.due_s = Life.AVAILABLE, None

    def _time(self) -> datetime:
        return self._began + timedelta(seconds=self.clock() - self._began_s)


def _plane(target: MountTarget) -> PlaneTarget:
    return PlaneTarget(target.id, target.file_system, target.address)


def _tags(request: Request) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in request.get("Tags", ())}
