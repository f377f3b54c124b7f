"""Does an EVM's EFS mount reach its mount target from a node?

Nothing is moved: the guest speaks NFS over its own address. So all that a node can spoil is the way there: the file
system, its mount target at the address that the guest has mounted, one network (VPC) with it, and security groups that
let the EVM in. Another zone does no harm but to latency and the bill:
https://docs.aws.amazon.com/efs/latest/ug/how-it-works.html.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from emp.model.efs import EfsFacts, EfsMount, FileSystem, MountTarget, NodePlace

AVAILABLE = "available"


def obstacle(mount: EfsMount, facts: EfsFacts, node: str, evm_address: str) -> str | None:
    """Return why ``mount`` would not work on ``node``, and what to do; None if it does."""
    name = mount.file_system
    found = facts.find(name)
    if found is None:
        return f"{name} does not exist any more: make the EVM anew without it"
    if found.state != AVAILABLE:
        return f"{name} is {found.state}: wait until it is available"
    target = next((target for target in found.targets if target.address == mount.address), None)
    if target is None:
        return f"{name} has no mount target at {mount.address} any more: make it again with that address"
    return why_not(found, target, facts.places.get(node), node, evm_address)


def why_not(
    of: FileSystem, target: MountTarget, place: NodePlace | None, node: str, evm_address: str | None
) -> str | None:
    """Return why a mount target is out of reach from a node; ``evm_address`` None: whatever its rules say."""
    where = f"{of.id}'s mount target {target.id} ({target.address})"
    if target.state != AVAILABLE:
        return f"{where} is {target.state}: wait until it is available, or make another"
    if place is None:
        return f"{node} has no instance in the cloud, so nobody knows whether it reaches {where}: name its instance"
    if place.vpc != target.vpc:
        return f"{where} is in {target.vpc}, {node} in {place.vpc}: choose a node in {target.vpc}"
    if evm_address is not None and not _lets_in(target, place, evm_address):
        groups = ", ".join(target.groups) or "no security group"
        return f"{groups} of {where} does not let TCP 2049 in from {evm_address}: add an inbound rule for it"
    return None


def described(mount: EfsMount, facts: EfsFacts, node: str) -> str:
    """Return in words how a mount reaches its target from a node where nothing is in its way."""
    targets = (target for found in facts.file_systems for target in found.targets)
    target = next(target for target in targets if target.address == mount.address)
    zone = facts.places[node].zone
    far = "" if target.zone == zone else f", from {zone}: slower, and charged by the byte"
    return f"{mount.file_system} over {mount.address} in {target.zone}{far}"


def choose(of: FileSystem, facts: EfsFacts, node: str) -> MountTarget | str:
    """Return the mount target for a new EVM on ``node``: the one in its zone if it has one; or why there is none."""
    place = facts.places.get(node)
    reasons = {target.id: why_not(of, target, place, node, None) for target in of.targets}
    fitting = [target for target in of.targets if reasons[target.id] is None]
    if not fitting:
        return "; ".join(filter(None, reasons.values())) or f"{of.id} has no mount target: make one in the node's zone"
    return min(fitting, key=lambda target: (place is None or target.zone != place.zone, target.id))


def _lets_in(target: MountTarget, place: NodePlace, address: str) -> bool:
    return any(_ways_in(target, place, address))


def _ways_in(target: MountTarget, place: NodePlace, address: str) -> Iterator[bool]:
    for rule in target.rules:
        if rule.group is not None:
            yield rule.group in place.groups
        if rule.cidr is not None:
            yield ipaddress.ip_address(address) in ipaddress.ip_network(rule.cidr, strict=False)
