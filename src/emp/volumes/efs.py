"""Amazon EFS by its API: the same code against AWS and the lab's simulated cloud. The controller alone calls it.

Nothing is ever attached: a guest mounts a file system by itself. So there is only to make file systems with a mount
target in each zone of the pool's nodes, to remove them again, and to say what a pre-flight looks at. EFS tells of
states, EC2 of where the nodes stand and of what the security groups let in.

Permissions: ``elasticfilesystem:CreateFileSystem``, ``DeleteFileSystem``, ``DescribeFileSystems``, ``TagResource``,
``CreateMountTarget``, ``DeleteMountTarget``, ``DescribeMountTargets``, ``DescribeMountTargetSecurityGroups``;
``ec2:DescribeInstances``, ``DescribeSubnets``, ``DescribeSecurityGroups``, ``CreateNetworkInterface``,
``DeleteNetworkInterface``, ``DescribeNetworkInterfaces`` (https://docs.aws.amazon.com/efs/latest/ug/efs-api-permissions-ref.html).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from emp.aws.api import READ_S, Ec2Api, Refusals, code_of, make_client
from emp.aws.patience import Pace, Patience, Time
from emp.model.efs import EfsFacts, FileSystem, MountTarget, NodePlace, Rule
from emp.model.errors import (
    BadInput,
    Conflict,
    EmpError,
    Forbidden,
    NotFound,
    OutcomeUnknown,
    Refused,
    Unauthenticated,
)
from emp.volumes.ebs_view import POOL

NFS_PORT = 2049
WAIT_S = 180.0
"""A mount target takes up to 90 s on AWS (https://docs.aws.amazon.com/efs/latest/ug/accessing-fs.html)."""
_LOOKS = Pace(first_s=0.1, share=0.1)

_REFUSALS: Refusals = {
    "FileSystemNotFound": (NotFound, "efs", "see: emp volume list --efs"),
    "MountTargetNotFound": (NotFound, "efs", "it has been deleted"),
    "FileSystemAlreadyExists": (Conflict, "efs", "the same order was given before"),
    "FileSystemInUse": (Conflict, "efs", "it still has mount targets; try again"),
    "FileSystemLimitExceeded": (Refused, "efs", "delete file systems, or have the account's quota raised"),
    "IncorrectFileSystemLifeCycleState": (Conflict, "efs", "wait until it is available, then ask again"),
    "IncorrectMountTargetState": (Conflict, "efs", "wait until it is available, then ask again"),
    "MountTargetConflict": (Conflict, "efs", "it has a mount target in that zone"),
    "NoFreeAddressesInSubnet": (Refused, "efs", "free an address in the node's subnet"),
    "AccessDeniedException": (Forbidden, "credentials", "give the controller's role this permission"),
    "UnauthorizedOperation": (Forbidden, "credentials", "give the controller's role this permission"),
    "UnrecognizedClientException": (Unauthenticated, "credentials", "check the controller's AWS credentials"),
    "AuthFailure": (Unauthenticated, "credentials", "check the controller's AWS credentials and its clock"),
}
"""https://docs.aws.amazon.com/efs/latest/ug/API_CreateMountTarget.html and its neighbours"""


class EfsCloud:
    """See ``emp.volumes.base.EfsDriver``. ``instances``: node -> instance id."""

    def __init__(
        self,
        instances: Mapping[str, str],
        *,
        pool: str,
        region: str,
        endpoint_url: str | None = None,
        ca_file: Path | None = None,
        credentials_file: Path | None = None,
        client: Callable[[str], Any] | None = None,
        times: Time | None = None,
        read_s: float = READ_S,
    ) -> None:
        self._instances = dict(instances)
        self._pool = pool
        self._times = times or Time()
        if client is None:
            settings: dict[str, Any] = {
                "endpoint_url": endpoint_url,
                "ca_file": ca_file,
                "credentials_file": credentials_file,
                "read_s": read_s,
            }
            client = lambda service: make_client(region, service=service, **settings)  # noqa: E731 - of two arguments
        self._efs = Ec2Api(partial(client, "efs"), self._times, service="EFS", refusals=_REFUSALS)
        self._ec2 = Ec2Api(partial(client, "ec2"), self._times)

    async def aclose(self) -> None:
        await self._efs.aclose()
        await self._ec2.aclose()

    async def create(self) -> FileSystem:
        """Make a file system with a mount target in every zone of the pool's nodes; return when it can be mounted."""
        token = uuid.uuid4().hex  # makes the order the same one, however often it is sent
        tags = [{"Key": POOL, "Value": self._pool}, {"Key": "Name", "Value": f"emp-{self._pool}"}]
        made = await self._made(token, tags)
        places = await self._places()
        wanted = {place.zone: place.subnet for place in places.values()}
        await self._until(made, lambda found: found.state == "available")
        for zone, subnet in sorted(wanted.items()):
            await self._make_target(made, zone, subnet)
        return await self._until(
            made,
            lambda found: len(found.targets) >= len(wanted) and all(t.state == "available" for t in found.targets),
        )

    async def list(self) -> tuple[FileSystem, ...]:
        """Return the file systems that this pool has made."""
        described = await self._pages("describe_file_systems", "FileSystems")
        ours = [each for each in described if _ours(each, self._pool)]
        return tuple(await asyncio.gather(*(self._full(each) for each in ours)))

    async def describe(self, file_system: str) -> FileSystem:
        """Raises ``NotFound``."""
        (found,) = await self._pages("describe_file_systems", "FileSystems", FileSystemId=file_system)
        return await self._full(found)

    async def delete(self, file_system: str) -> None:
        """Remove it, its mount targets first. Raises ``Refused`` for one that the pool has not made. Idempotent."""
        try:
            found = await self.describe(file_system)
            if not found.ours:
                hint = "delete it where it was made"
                raise Refused(f"{file_system} was not made by the pool {self._pool}", field="efs", hint=hint)
            for target in found.targets:
                await self._gone("delete_mount_target", MountTargetId=target.id)
            await self._until(file_system, lambda left: not left.targets)
            await self._gone("delete_file_system", FileSystemId=file_system)
            await self._until(file_system, lambda left: False)
        except NotFound:
            return

    async def facts(self, file_systems: Iterable[str]) -> EfsFacts:
        """Return what a pre-flight looks at; a file system that is not there is left out."""
        try:
            places = await self._places()
            found = await asyncio.gather(*(self._found(each) for each in file_systems))
        except EmpError as error:
            return EfsFacts(problem=str(error))
        return EfsFacts(places=places, file_systems=tuple(each for each in found if each is not None))

    # ------------------------------------------------------------------ steps

    async def _made(self, token: str, tags: Sequence[Mapping[str, str]]) -> str:
        patience = self._times.patience(WAIT_S, _LOOKS)
        while True:
            try:
                made = await self._efs.ask("create_file_system", CreationToken=token, Encrypted=True, Tags=tags)
                return str(made["FileSystemId"])
            except OutcomeUnknown as error:
                await patience.pause(error)
            except Conflict as error:
                if code_of(error) != "FileSystemAlreadyExists":
                    raise
                (found,) = await self._pages("describe_file_systems", "FileSystems", CreationToken=token)
                return str(found["FileSystemId"])

    async def _make_target(self, file_system: str, zone: str, subnet: str) -> None:
        patience = self._times.patience(WAIT_S, _LOOKS)
        while True:
            try:
                await self._efs.ask("create_mount_target", FileSystemId=file_system, SubnetId=subnet)
            except OutcomeUnknown as error:
                await patience.pause(error)  # if it was carried out, the next one is a conflict
            except Conflict as error:
                if code_of(error) == "MountTargetConflict":
                    return
                await patience.pause(error)
            else:
                return

    async def _gone(self, call: str, **which: str) -> None:
        patience = self._times.patience(WAIT_S, _LOOKS)
        while True:
            try:
                await self._efs.ask(call, **which)
            except NotFound:
                return
            except OutcomeUnknown as error:
                await patience.pause(error)
            else:
                return

    async def _until(self, file_system: str, is_so: Callable[[FileSystem], bool]) -> FileSystem:
        patience: Patience = self._times.patience(WAIT_S, _LOOKS)
        while not is_so(found := await self.describe(file_system)):
            states = ", ".join(f"{target.id} {target.state}" for target in found.targets)
            message = f"{file_system} is {found.state} ({states or 'no mount target'}) after {WAIT_S:.0f} s"
            await patience.pause(OutcomeUnknown(message, field="efs", hint="look again, or give the same order again"))
        return found

    # ------------------------------------------------------------------ looking

    async def _found(self, file_system: str) -> FileSystem | None:
        try:
            return await self.describe(file_system)
        except NotFound:
            return None

    async def _full(self, described: Mapping[str, Any]) -> FileSystem:
        name = str(described["FileSystemId"])
        targets = await self._pages("describe_mount_targets", "MountTargets", FileSystemId=name)
        return FileSystem(
            id=name,
            state=described["LifeCycleState"],
            ours=_ours(described, self._pool),
            targets=tuple([found for each in targets if (found := await self._target(each)) is not None]),
        )

    async def _target(self, described: Mapping[str, Any]) -> MountTarget | None:
        name, state = described["MountTargetId"], described["LifeCycleState"]
        groups: list[str] = []
        try:
            if state == "available":
                answer = await self._efs.ask("describe_mount_target_security_groups", MountTargetId=name)
                groups = answer["SecurityGroups"]
        except NotFound:
            return None
        except Conflict:
            state = "creating"  # it was, a moment ago, or is again
        return MountTarget(
            id=name,
            address=described["IpAddress"],
            zone=described["AvailabilityZoneName"],
            subnet=described["SubnetId"],
            vpc=described["VpcId"],
            state=state,
            groups=tuple(groups),
            rules=tuple(await self._rules(groups)) if groups else (),
        )

    async def _rules(self, groups: Sequence[str]) -> Sequence[Rule]:
        answer = await self._ec2.ask("describe_security_groups", GroupIds=list(groups))
        permissions = [each for group in answer["SecurityGroups"] for each in group.get("IpPermissions", ())]
        rules: list[Rule] = []
        for each in filter(_is_nfs, permissions):
            rules += [Rule(cidr=block["CidrIp"]) for block in each.get("IpRanges", ())]
            rules += [Rule(cidr=block["CidrIpv6"]) for block in each.get("Ipv6Ranges", ())]
            rules += [Rule(group=pair["GroupId"]) for pair in each.get("UserIdGroupPairs", ())]
        return rules

    async def _places(self) -> dict[str, NodePlace]:
        """Return where the nodes stand. One whose instance has no network of its own is left out."""
        if not self._instances:
            raise BadInput("no node has an instance in the cloud", field="efs", hint="name them in the configuration")
        nodes = {instance: node for node, instance in self._instances.items()}
        answer = await self._ec2.ask("describe_instances", InstanceIds=sorted(nodes))
        found = [instance for reservation in answer["Reservations"] for instance in reservation["Instances"]]
        return {
            nodes[each["InstanceId"]]: NodePlace(
                zone=each["Placement"]["AvailabilityZone"],
                subnet=each["SubnetId"],
                vpc=each["VpcId"],
                groups=tuple(group["GroupId"] for group in each.get("SecurityGroups", ())),
            )
            for each in found
            if each.get("VpcId") and each.get("SubnetId")
        }

    async def _pages(self, call: str, key: str, **parameters: Any) -> Sequence[dict[str, Any]]:
        answer = await self._efs.ask(call, **parameters)
        items: list[dict[str, Any]] = list(answer[key])
        while marker := answer.get("NextMarker"):
            answer = await self._efs.ask(call, **(parameters | {"Marker": marker}))
            items += answer[key]
        return items


def _ours(described: Mapping[str, Any], pool: str) -> bool:
    return {"Key": POOL, "Value": pool} in described.get("Tags", ())


def _is_nfs(permission: Mapping[str, Any]) -> bool:
    """Whether a rule is about TCP port 2049; protocol -1 is every one, and has no ports."""
    match permission:
        case {"IpProtocol": "-1"}:
            return True
        case {"IpProtocol": "tcp" | "6", "FromPort": int(first), "ToPort": int(last)}:
            return first <= NFS_PORT <= last
    return False
