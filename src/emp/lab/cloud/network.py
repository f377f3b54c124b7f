"""Network interfaces of the simulated cloud: one state machine, without a socket, a task or a clock of its own.

As in ``cloud.Cloud`` an action changes the records and answers at once, and what takes time is due later. A secondary
address that is reassigned stays its old interface's, in every answer, until the data plane has moved it. Pages are
below https://docs.aws.amazon.com/AWSEC2/latest/APIReference/; ``docs/cloud.md`` lists every rule.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import Field

from emp.lab.cloud import addresses, describing, eni_answers
from emp.lab.cloud.assigning import Answer, Assignments, Request, check_slots
from emp.lab.cloud.creating import check_token, tags_of_request
from emp.lab.cloud.eni_records import (
    LIMITS,
    MAX_GROUPS,
    EniAttachment,
    EniState,
    Interface,
    Remap,
)
from emp.lab.cloud.errors import CloudError, check_simulated
from emp.lab.cloud.knobs import Knobs
from emp.lab.cloud.network_plane import PlaneInterface
from emp.lab.cloud.records import Instance, check_id
from emp.lab.cloud.vpc import Subnet, Vpc
from emp.model.base import Model

RETRY_S = 1.0
"""after the data plane has failed"""
_NOT_SIMULATED = {
    "CreateNetworkInterface": (
        "Ipv6Prefixes", "Ipv6PrefixCount", "EnablePrimaryIpv6", "ConnectionTrackingSpecification", "Operator"
    ),
    "AttachNetworkInterface": ("EnaSrdSpecification", "EnaQueueCount"),
    "ModifyNetworkInterfaceAttribute": (
        "EnaSrdSpecification", "EnablePrimaryIpv6", "ConnectionTrackingSpecification", "AssociatePublicIpAddress",
        "AssociatedSubnetIds",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class AddressChange:
    """What the data plane must do: see ``network_plane.NetworkPlane``."""

    address: str
    interface: PlaneInterface | None


class NetworkMemory(Model):
    """All that outlives the process."""

    interfaces: tuple[Interface, ...] = ()
    remaps: tuple[Remap, ...] = ()
    moves: int = 0
    tokens: dict[str, tuple[dict[str, Any], str]] = Field(default_factory=dict)
    """client token -> the request that it was used with first, and the interface that this made"""


class Network:
    """``clock`` as ``Cloud``'s, ``time`` the time of day, ``volumes_at`` how many volumes an instance has."""

    def __init__(
        self,
        vpc: Vpc,
        instances: Mapping[str, Instance],
        *,
        clock: Callable[[], float],
        time: Callable[[], datetime],
        knobs: Callable[[], Knobs],
        volumes_at: Callable[[str], int],
        new_id: Callable[[], str] = lambda: secrets.token_hex(8),
    ) -> None:
        self._vpc = vpc
        self._instances = instances
        self._clock = clock
        self._time = time
        self._knobs = knobs
        self._volumes_at = volumes_at
        self._new_id = new_id
        self._addresses = Assignments(vpc, instances, clock=clock, knobs=knobs)
        self.find = self._addresses.find
        self._interfaces, self._remaps = self._addresses.interfaces, self._addresses.remaps
        self._interfaces |= {eni.id: eni for eni in self._primaries()}
        self._tokens: dict[str, tuple[dict[str, Any], str]] = {}
        # What the data plane has done, is asked for now, and is to be asked for again no sooner than then.
        self._told: dict[str, PlaneInterface] = {}
        self._asked: set[str] = set()
        self._again_s: dict[str, float] = {}
        self.actions: dict[str, Callable[[Request], Answer]] = {
            "CreateNetworkInterface": self._create,
            "DeleteNetworkInterface": self._delete,
            "AttachNetworkInterface": self._attach,
            "DetachNetworkInterface": self._detach,
            "ModifyNetworkInterfaceAttribute": self._modify,
            "AssignPrivateIpAddresses": self._addresses.assign_ipv4,
            "UnassignPrivateIpAddresses": self._addresses.unassign_ipv4,
            "AssignIpv6Addresses": self._addresses.assign_ipv6,
            "UnassignIpv6Addresses": self._addresses.unassign_ipv6,
            "DescribeNetworkInterfaces": self._describe,
        }

    def at(self, instance: str) -> list[Interface]:
        """Return the interfaces of ``instance``, by their device's index."""
        found = [(e.attachment.index, e) for e in self._interfaces.values() if _is_at(e, instance) and e.attachment]
        return [eni for _, eni in sorted(found, key=lambda each: each[0])]

    # ------------------------------------------------------------------ time

    def due_s(self) -> float | None:
        """As ``Cloud.due_s``."""
        now_s = self._clock()
        times = [e.attachment.due_s for e in self._interfaces.values() if e.attachment]
        times += [remap.due_s for remap in self._remaps.values() if remap.due_s > now_s]
        times += [self._again_s.get(address, now_s) for address in self._pending()]
        return min((at_s for at_s in times if at_s is not None), default=None)

    def settle(self) -> list[AddressChange]:
        """Return what the data plane is to do now; each change once, until ``failed``."""
        now_s = self._clock()
        for eni in self._interfaces.values():
            held = eni.attachment
            if held is not None and held.due_s is not None and held.due_s <= now_s:
                held.due_s = None
                if held.state is EniState.DETACHING:
                    eni.attachment = None
                else:
                    held.state = EniState.ATTACHED
        wanted = self._wanted()
        changes = [AddressChange(a, wanted.get(a)) for a in self._pending() if self._again_s.get(a, now_s) <= now_s]
        self._asked.update(change.address for change in changes)
        return changes

    def done(self, change: AddressChange) -> None:
        """The data plane has done it: an address that was moving is its new interface's from now on."""
        self._asked.discard(change.address)
        self._again_s.pop(change.address, None)
        if change.interface is None:
            self._told.pop(change.address, None)
        else:
            self._told[change.address] = change.interface
        remap = self._remaps.get(change.address)
        if remap is None or remap.due_s > self._clock():
            return
        target = self._interfaces[remap.target]
        if change.interface == _plane(target):
            del self._remaps[change.address]
            for eni in self._interfaces.values():
                if change.address in eni.addresses:
                    eni.addresses.remove(change.address)
            (target.ipv6 if ":" in change.address else target.addresses).append(change.address)

    def failed(self, change: AddressChange) -> None:
        """The data plane could not; it is to be asked again."""
        self._asked.discard(change.address)
        self._again_s[change.address] = self._clock() + RETRY_S

    def _pending(self) -> list[str]:
        """Return the addresses of which the data plane has done something else than it should, and is not asked."""
        wanted = self._wanted()
        different = (a for a in wanted.keys() | self._told.keys() if wanted.get(a) != self._told.get(a))
        # One that comes to an interface at no instance: there is nothing to tell, and it has arrived.
        arrived = {a for a, r in self._remaps.items() if r.due_s <= self._clock()}
        return sorted({*different, *arrived} - self._asked)

    def _wanted(self) -> dict[str, PlaneInterface]:
        now_s = self._clock()
        there = {address: _plane(eni) for eni in self._interfaces.values() for address in eni.everything()}
        for remap in self._remaps.values():
            if remap.due_s <= now_s:
                there[remap.address] = _plane(self._interfaces[remap.target])
        return {address: plane for address, plane in there.items() if plane is not None}

    # ------------------------------------------------------------------ what outlives the process

    def memory(self) -> NetworkMemory:
        return NetworkMemory(
            interfaces=tuple(self._interfaces.values()),
            remaps=tuple(self._remaps.values()),
            moves=self._addresses.moves,
            tokens=self._tokens,
        )

    def recall(self, memory: NetworkMemory, back_s: float) -> None:
        """Go on from ``memory``, by a clock that is ``back_s`` ahead of its times; the data plane is told all again."""
        self._interfaces |= {eni.id: eni for eni in memory.interfaces}
        self._remaps |= {remap.address: remap for remap in memory.remaps}
        self._addresses.moves, self._tokens = memory.moves, dict(memory.tokens)
        for eni in self._interfaces.values():
            eni.visible_s += back_s
            if eni.attachment is not None and eni.attachment.due_s is not None:
                eni.attachment.due_s += back_s
        for remap in self._remaps.values():
            remap.due_s += back_s

    # ------------------------------------------------------------------ making and attaching

    def _create(self, request: Request) -> Answer:
        """``API_CreateNetworkInterface.html``"""
        check_simulated(request, _NOT_SIMULATED["CreateNetworkInterface"])
        if (token := check_token(request.get("ClientToken"))) is not None and token in self._tokens:
            return self._made_before(token, request)
        if request.get("InterfaceType", "interface") != "interface":
            raise CloudError("UnsupportedOperation", "The simulated cloud has interfaces of the type interface alone")
        subnet = self._vpc.subnets.get(request["SubnetId"])
        if subnet is None:
            raise CloudError("InvalidSubnetID.NotFound", f"The subnet ID '{request['SubnetId']}' does not exist")
        eni = self._new(f"eni-0{self._new_id()}", subnet, self._primary(request, subnet))
        eni.visible_s = self._clock() + self._knobs().describe_lag_s
        eni.groups = self._groups(request, subnet)
        eni.description = request.get("Description", "")
        eni.tags = tags_of_request(request, "network-interface")
        named = [each["PrivateIpAddress"] for each in request.get("PrivateIpAddresses", ())]
        more = {"PrivateIpAddresses": [each for each in named if each != eni.addresses[0]]}
        rest = {key: value for key, value in (dict(request) | more).items() if value != []}
        ways = ("PrivateIpAddresses", "SecondaryPrivateIpAddressCount", "Ipv4Prefixes", "Ipv4PrefixCount")
        if addresses.one_way(rest, *ways, must=False):
            fresh, prefixes = self._addresses.chosen(eni, rest, with_prefixes_of_structures=True)
            if held := [address for address in fresh if self._addresses.holder(subnet.vpc, address)]:
                raise CloudError("InvalidIPAddress.InUse", f"Address {held[0]} is in use")
            self._addresses.check_room(eni, len(fresh) + len(prefixes))
            eni.addresses += fresh
            eni.prefixes += prefixes
        eni.ipv6 += self._addresses.chosen_ipv6(
            eni, request, [each["Ipv6Address"] for each in request.get("Ipv6Addresses", ())]
        )
        self._interfaces[eni.id] = eni
        if token is not None:
            self._tokens[token] = (dict(request), eni.id)
        return {"NetworkInterface": eni_answers.interface_answer(eni) | {"Status": "pending"}, "ClientToken": token}

    def _made_before(self, token: str, request: Request) -> Answer:
        before, made = self._tokens[token]
        if before != dict(request):
            raise CloudError("IdempotentParameterMismatch", "The client token was used before, with other parameters")
        return {"NetworkInterface": eni_answers.interface_answer(self.find(made)), "ClientToken": token}

    def _primary(self, request: Request, subnet: Subnet) -> str:
        """Return the primary address that is asked for, or a free one."""
        listed = request.get("PrivateIpAddresses", ())
        named: list[str] = [each["PrivateIpAddress"] for each in listed if each.get("Primary")]
        named += [request["PrivateIpAddress"]] if "PrivateIpAddress" in request else []
        if len(named) > 1:
            raise CloudError("InvalidParameterCombination", "Only one primary private IP address can be specified")
        if not named:
            wanted = [each["PrivateIpAddress"] for each in listed]
            return self._addresses.free(subnet, wanted)
        if self._addresses.holder(subnet.vpc, addresses.check_ipv4(named[0], subnet)):
            raise CloudError("InvalidIPAddress.InUse", f"Address {named[0]} is in use")
        return named[0]

    def _delete(self, request: Request) -> Answer:
        """``API_DeleteNetworkInterface.html``: only one that is attached to nothing."""
        eni = self.find(request["NetworkInterfaceId"])
        if eni.attachment is not None:
            raise CloudError("InvalidNetworkInterface.InUse", f"Network interface '{eni.id}' is currently in use.")
        del self._interfaces[eni.id]
        for address in [address for address, remap in self._remaps.items() if remap.target == eni.id]:
            del self._remaps[address]
        return None

    def _attach(self, request: Request) -> Answer:
        """``API_AttachNetworkInterface.html``"""
        check_simulated(request, _NOT_SIMULATED["AttachNetworkInterface"])
        eni, instance = (
            self.find(request["NetworkInterfaceId"]),
            self._instances.get(check_id("i", request["InstanceId"])),
        )
        if instance is None:
            raise CloudError("InvalidInstanceID.NotFound", f"The instance ID '{request['InstanceId']}' does not exist")
        if eni.attachment is not None:
            raise CloudError("InvalidNetworkInterface.InUse", f"Interface: [{eni.id}] in use.")
        if eni.zone != instance.zone:
            message = (
                "You may not attach a network interface to an instance if they are not in the same availability zone"
            )
            raise CloudError("InvalidParameterCombination", message)
        index, there, limits = request["DeviceIndex"], self.at(instance.id), LIMITS[instance.type]
        if index < 0 or request.get("NetworkCardIndex", 0) != 0:
            raise CloudError("InvalidParameterValue", "There is one network card, and device indexes begin at 0")
        if any(each.attachment and each.attachment.index == index for each in there):
            message = f"Instance '{instance.id}' already has an interface attached at device index '{index}'."
            raise CloudError("InvalidParameterValue", message)
        # Volumes and interfaces share one limit; ``max_volumes`` counts the first interface already.
        if len(there) >= limits.interfaces or len(there) + self._volumes_at(instance.id) > instance.max_volumes:
            message = f"Interface count {len(there) + 1} exceeds the limit for {instance.type}"
            raise CloudError("AttachmentLimitExceeded", message)
        check_slots(eni, limits, len(eni.addresses) + len(eni.prefixes), len(eni.ipv6))
        held = EniAttachment(f"eni-attach-0{self._new_id()}", instance.id, index, self._time())
        held.due_s = self._clock() + self._knobs().latency.attach_s
        eni.attachment = held
        return {"AttachmentId": held.id, "NetworkCardIndex": 0}

    def _detach(self, request: Request) -> Answer:
        """``API_DetachNetworkInterface.html``: never the primary one."""
        found = [e.attachment for e in self._interfaces.values() if e.attachment]
        held = next((each for each in found if each.id == request["AttachmentId"]), None)
        if held is None:
            message = f"The attachment '{request['AttachmentId']}' does not exist"
            raise CloudError("InvalidAttachmentID.NotFound", message)
        if held.index == 0:
            message = "The network interface at device index 0 cannot be detached."
            raise CloudError("OperationNotPermitted", message)
        if held.state is EniState.ATTACHING or (held.state is EniState.DETACHING and not request.get("Force")):
            raise CloudError("IncorrectState", f"The attachment '{held.id}' is in the '{held.state}' state.")
        if held.state is EniState.ATTACHED:
            held.state, held.due_s = EniState.DETACHING, self._clock() + self._knobs().latency.detach_s
        return None

    def _modify(self, request: Request) -> Answer:
        """``API_ModifyNetworkInterfaceAttribute.html``: one attribute at a time."""
        check_simulated(request, _NOT_SIMULATED["ModifyNetworkInterfaceAttribute"])
        eni = self.find(request["NetworkInterfaceId"])
        match addresses.one_way(request, "SourceDestCheck", "Groups", "Description", "Attachment"):
            case "SourceDestCheck":
                eni.source_dest_check = request["SourceDestCheck"]["Value"]
            case "Groups":
                eni.groups = self._groups(request, self._vpc.subnets[eni.subnet])
            case "Description":
                eni.description = request["Description"]["Value"]
            case _:
                wanted = request["Attachment"]
                if wanted.keys() - {"AttachmentId", "DeleteOnTermination"}:
                    raise CloudError("UnsupportedOperation", "The simulated cloud does not know ENA queues")
                if eni.attachment is None or eni.attachment.id != wanted.get("AttachmentId"):
                    raise CloudError("InvalidAttachmentID.NotFound", f"{eni.id} is not attached by that id")
                eni.attachment.delete_on_termination = wanted.get("DeleteOnTermination", False)
        return None

    def _groups(self, request: Request, subnet: Subnet) -> tuple[str, ...]:
        """Return the security groups, of the subnet's VPC; without any it is the default one."""
        wanted: Sequence[str] = request.get("Groups") or (self._vpc.default_group(subnet.vpc).id,)
        if len(wanted) > MAX_GROUPS:
            message = "You have exceeded the maximum number of security groups allowed per network interface."
            raise CloudError("SecurityGroupsPerInterfaceLimitExceeded", message)
        for name in wanted:
            if (group := self._vpc.groups.get(name)) is None or group.vpc != subnet.vpc:
                raise CloudError("InvalidGroup.NotFound", f"The security group '{name}' does not exist")
        return tuple(wanted)

    # ------------------------------------------------------------------ addresses

    # ------------------------------------------------------------------ describing, and what there is from the start

    def _describe(self, request: Request) -> Answer:
        ids, now_s = request.get("NetworkInterfaceIds"), self._clock()
        everything = (eni for eni in self._interfaces.values() if eni.visible_s <= now_s)
        found = [self.find(name) for name in ids] if ids is not None else everything
        answers = [eni_answers.interface_answer(eni) for eni in found]
        left = describing.filtered(answers, request.get("Filters", ()), eni_answers.FILTERS)
        shown, token = describing.page(left, request, ids="NetworkInterfaceIds")
        return {"NetworkInterfaces": shown, "NextToken": token}

    def _primaries(self) -> Iterator[Interface]:
        """Yield the interfaces of each instance that has an address, under ids that stay the same."""
        for instance in self._instances.values():
            if instance.address is None or instance.subnet is None:
                continue
            for index, address in enumerate((instance.address, *instance.more_addresses)):
                digits = hashlib.sha256(f"{instance.id} {index}".removesuffix(" 0").encode()).hexdigest()
                eni = self._new(f"eni-0{digits[:16]}", self._vpc.subnets[instance.subnet], address)
                eni.groups, eni.source_dest_check = instance.groups, instance.source_dest_check
                eni.ipv6 += [instance.ipv6] if instance.ipv6 and index == 0 else []
                name = f"eni-attach-0{digits[16:32]}"
                held = EniAttachment(name, instance.id, index, self._time(), EniState.ATTACHED, None, index == 0)
                eni.attachment = held
                yield eni

    def _new(self, name: str, subnet: Subnet, address: str) -> Interface:
        digits = hashlib.sha256(name.encode()).hexdigest()
        mac = ":".join(["02", *(digits[at : at + 2] for at in range(0, 10, 2))])
        return Interface(name, subnet.id, subnet.vpc, subnet.zone, mac, [address], self._clock())


def _plane(eni: Interface) -> PlaneInterface | None:
    return PlaneInterface(eni.id, eni.instance, eni.mac, eni.source_dest_check) if eni.instance else None


def _is_at(eni: Interface, instance: str) -> bool:
    return eni.attachment is not None and eni.attachment.instance == instance
