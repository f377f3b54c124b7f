"""May this migration begin? What must fit together on both ends, one small function per check.

A check that fails here costs nothing; the same mismatch found by QEMU in the blackout costs the guest a pause, and one
found by nobody costs the guest.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

from emp.migration import efs as efs_mounts
from emp.model.addresses import AddressFacts, InterfaceFacts
from emp.model.efs import NO_EFS, EfsFacts
from emp.model.evm import EvmSpec
from emp.model.migration import Check, VolumeOrder
from emp.model.names import format_size
from emp.model.node import NodeReport
from emp.model.volume import Volume

MAX_NODES = 16
"""that a multi-attach volume may be attached to at once
(https://docs.aws.amazon.com/ebs/latest/userguide/ebs-volumes-multi.html); the pool's own service has the same limit"""


@dataclass(frozen=True)
class VolumeFacts:
    volume: Volume
    obstacle: str | None = None
    """why the target could not have it, by its service"""
    move_ms: float | None = None
    """what detaching it and attaching it elsewhere is expected to take; None: not known"""


@dataclass(frozen=True)
class Facts:
    """All that pre-flight looks at."""

    spec: EvmSpec
    source: NodeReport
    target: NodeReport
    target_free_bytes: int
    """of what the target offers to EVMs and no record claims"""
    volumes: tuple[VolumeFacts, ...]
    subnet: str
    """that the EVMs' IPv4 addresses belong to"""
    subnet_ipv6: str | None = None
    """as ``subnet``; None: there is none"""
    volume_order: VolumeOrder = VolumeOrder.RESUME_FIRST
    efs: EfsFacts = NO_EFS
    """of the EVM's EFS mounts; empty for an EVM that has none"""
    addresses: AddressFacts | None = None
    """what the cloud says that routes them; None: the nodes share a segment"""


def preflight(facts: Facts) -> tuple[Check, ...]:
    """Return every check, passed or not, in an order worth reading."""
    return (*(check(facts) for check in CHECKS), *volumes(facts))


def failed(checks: Sequence[Check]) -> tuple[Check, ...]:
    return tuple(check for check in checks if not check.ok)


def memory(facts: Facts) -> Check:
    needed, free = facts.spec.memory_bytes, facts.target_free_bytes
    text = f"{format_size(max(0, free))} free on {facts.target.name}, {format_size(needed)} needed"
    return Check(name="memory", ok=free >= needed, message=text)


def vcpus(facts: Facts) -> Check:
    text = f"{facts.target.name} has {facts.target.vcpus} CPUs, {facts.spec.vcpus} needed"
    return Check(name="vcpus", ok=facts.target.vcpus >= facts.spec.vcpus, message=text)


def image(facts: Facts) -> Check:
    """The target boots nothing now, but a later cold start there must find the same image."""
    name, digest, target = facts.spec.image, facts.spec.image_digest, facts.target.name
    there = facts.target.versions.images.get(name)
    if there is None:
        text = f"{target} does not have the image {name}"
    elif there != digest:
        text = f"{name} is {_short(there)} on {target}, the EVM has {_short(digest)}"
    else:
        text = f"{name} {_short(there)} on both ends"
    return Check(name="image", ok=there == digest, message=text)


def machine_type(facts: Facts) -> Check:
    """The versioned machine type fixes every device's registers and state; the target must know that very one."""
    ok = facts.spec.machine in facts.target.versions.machines
    text = f"{facts.target.name} {'knows' if ok else 'does not know'} {facts.spec.machine}"
    return Check(name="machine", ok=ok, message=text)


def cpu_model(facts: Facts) -> Check:
    """The guest has seen these CPU features at boot and uses them; each must be there on the target."""
    ok = facts.spec.cpu_model in facts.target.versions.cpu_models
    text = f"{facts.target.name} {'runs' if ok else 'cannot run'} {facts.spec.cpu_model} with every feature it names"
    return Check(name="cpu", ok=ok, message=text)


def accelerator(facts: Facts) -> Check:
    """KVM and TCG keep other CPU state (MSRs, clock): QEMU does not promise that one loads the other's."""
    here, there = facts.source.versions.accelerator, facts.target.versions.accelerator
    return Check(name="accelerator", ok=here == there, message=_both(here, there))


def qemu(facts: Facts) -> Check:
    """The target's QEMU must not be older than the source's, unless they are of one stable series.

    QEMU promises that a newer version loads what an older one sent under the same versioned machine type, not the
    reverse (docs/devel/migration/compatibility.rst). Releases that differ only in the last number (10.0.2, 10.0.5)
    carry fixes and no new migration state, so between those either direction does.
    """
    here, there = facts.source.versions.qemu, facts.target.versions.qemu
    source, target = _numbers(here), _numbers(there)
    if not source or not target:
        return Check(name="qemu", ok=here == there, message=f"{_both(here, there)}; only equal versions are comparable")
    ok = source[:2] == target[:2] or target >= source
    text = _both(here, there) if ok else f"{there} on {facts.target.name} is older than {here} on {facts.source.name}"
    return Check(name="qemu", ok=ok, message=text)


def protocol(facts: Facts) -> Check:
    """Both agents must speak the same switchover."""
    here, there = facts.source.versions.protocol, facts.target.versions.protocol
    return Check(name="protocol", ok=here == there, message=_both(str(here), str(there)))


def emp_version(facts: Facts) -> Check:
    """Agents of one major version work together, so that a pool can be upgraded node by node."""
    here, there = facts.source.versions.emp, facts.target.versions.emp
    return Check(name="emp", ok=_numbers(here)[:1] == _numbers(there)[:1], message=_both(here, there))


def journals(facts: Facts) -> Check:
    """A node that does not know what it has promised can neither give nor take authority."""
    bad = [f"{report.name}: {report.journal}" for report in (facts.source, facts.target) if report.journal]
    return Check(name="journal", ok=not bad, message="; ".join(bad) or "trusted on both ends")


def volumes(facts: Facts) -> tuple[Check, ...]:
    """One line for each volume: why it could not move, or what its move will cost."""
    if not facts.volumes:
        return (Check(name="volumes", ok=True, message="none"),)
    return tuple(_volume(facts, of) for of in facts.volumes)


def _volume(facts: Facts, of: VolumeFacts) -> Check:
    volume = of.volume
    stuck = _stuck(facts, of)
    text = "; ".join(stuck) if stuck else _cost(of, facts)
    return Check(
        name=f"volume {volume.id}", ok=not stuck, message=f"{volume.type}, {format_size(volume.size_bytes)}: {text}"
    )


def _stuck(facts: Facts, of: VolumeFacts) -> list[str]:
    """Return every reason why it could not move."""
    volume, source, target = of.volume, facts.source.name, facts.target.name
    nodes = {attachment.node for attachment in volume.attachments}
    others = ", ".join(sorted(nodes - {source, target}))
    reasons: list[str] = []
    if volume.fault is not None:
        reasons.append(volume.fault)
    if not volume.serial or volume.size_bytes <= 0:
        reasons.append(f"its serial or size is not known, so nothing on {target} could be told to be it")
    alone = not volume.type.multi_attach
    if alone and source not in nodes:
        reasons.append(f"it is {f'attached to {others}' if others else 'attached nowhere'}, not to {source}")
    elif others and (alone or not volume.type.fenceable):
        reasons.append(f"it is attached to {others} as well")
    elif volume.type.fenceable and not alone and len(nodes | {target}) > MAX_NODES:
        reasons.append(f"it is attached to {len(nodes)} nodes, and takes {MAX_NODES} at once")
    if of.obstacle is not None:
        reasons.append(of.obstacle)
    return reasons


def _cost(of: VolumeFacts, facts: Facts) -> str:
    """What its type costs in a move, and what would cost less."""
    if not of.volume.type.fenceable:
        return "nothing to attach; no I/O stall beyond the pause"
    if of.volume.type.multi_attach:
        return f"attached to {facts.target.name} before the pause; no I/O stall beyond it"
    took = "a time not known yet" if of.move_ms is None else f"about {of.move_ms / 1000:.1f} s"
    if facts.volume_order is VolumeOrder.CLASSIC:
        return (
            f"the pause lasts {took} longer, while it is detached and attached; resume-first or io2 would not need it"
        )
    return f"its I/O stalls for {took} after the pause, while it is detached and attached; with io2 it would not"


def efs(facts: Facts) -> Check:
    """An EFS mount goes on by itself if its mount target stays reachable from the target; nothing of it is moved."""
    mounts, node, address = facts.spec.efs, facts.target.name, facts.spec.nics[0].address
    if not mounts:
        return Check(name="efs", ok=True, message="none")
    if facts.efs.problem is not None:
        return Check(name="efs", ok=False, message=f"EFS could not be asked: {facts.efs.problem}")
    bad = [why for mount in mounts if (why := efs_mounts.obstacle(mount, facts.efs, node, address))]
    good = [efs_mounts.described(mount, facts.efs, node) for mount in mounts] if not bad else []
    return Check(name="efs", ok=not bad, message="; ".join(bad or good))


def subnet(facts: Facts) -> Check:
    """Every address stays as it is, so both nodes must stand on the segment that the addresses belong to.

    Seen from the nodes' own addresses: where exactly one of them is of the subnet, they do not share it.
    """
    block = ipaddress.ip_network(facts.subnet)
    blocks = [block, *([ipaddress.ip_network(facts.subnet_ipv6)] if facts.subnet_ipv6 else [])]
    shown = " or ".join(map(str, blocks))
    foreign = [address for _, address in facts.spec.addresses if not any(_is_in(address, each) for each in blocks)]
    if foreign:
        return Check(name="subnet", ok=False, message=f"{', '.join(foreign)} not in {shown}")
    apart = [r.name for r in (facts.source, facts.target) if not _is_in(r.address, block)]
    if len(apart) == 1:
        return Check(name="subnet", ok=False, message=f"{apart[0]} is not in {block}")
    return Check(name="subnet", ok=True, message=f"{len(facts.spec.addresses)} addresses in {shown}")


def mtu(facts: Facts) -> Check:
    """Every frame that the EVM sends or gets on the source must fit the target's bridge and uplink, and none may be
    promised to its peers that does not fit: path MTU discovery (RFC 1191) does not work within a segment."""
    source, target = facts.source, facts.target
    here, there = source.mtu_bytes, target.mtu_bytes
    own = next((report.mtu_bytes for report in source.evms if report.name == facts.spec.name), None)
    if here is None or there is None:
        return Check(name="mtu", ok=True, message="not told by both ends")
    if here != there:
        hint = "set bridge and uplink of both nodes to one MTU"
        return Check(name="mtu", ok=False, message=f"{_both(f'{here} bytes', f'{there} bytes')}; {hint}")
    if own is not None and own > there:
        text = f"{facts.spec.name} has {own} bytes at its taps, {target.name} takes {there}"
        return Check(name="mtu", ok=False, message=text)
    return Check(name="mtu", ok=True, message=f"{here} bytes on both ends")


def ipv6(facts: Facts) -> Check:
    """The target's agent refuses an EVM with IPv6 addresses where it cannot bring them to it."""
    if not facts.spec.has_ipv6:
        return Check(name="ipv6", ok=True, message="none")
    target, why = facts.target.name, facts.target.no_ipv6
    return Check(name="ipv6", ok=why is None, message=f"{target} takes it" if why is None else f"{target}: {why}")


def addresses(facts: Facts) -> Check:
    """Where a cloud routes addresses, it must be able to route them to the target."""
    cloud = facts.addresses
    if cloud is None:
        return Check(name="addresses", ok=True, message="announced by the target: the nodes share a segment")
    if cloud.problem is not None:
        return Check(name="addresses", ok=False, message=f"the cloud could not be asked: {cloud.problem}")
    wanted = {address for _, address in facts.spec.addresses}
    there = [eni for eni in cloud.interfaces if eni.node == facts.target.name]
    here = [eni for eni in cloud.interfaces if eni.node == facts.source.name]
    bad = [*_delegated(cloud), *_checked([*here, *there]), *_short_of_slots(wanted, there, facts.target.name)]
    six = sum(":" in address for address in wanted)
    shown = ", ".join(
        f"{eni.id} with {eni.free} of {eni.slots} IPv4 and {eni.ipv6_free} of {eni.ipv6_slots} IPv6 slots free"
        for eni in there
    )
    told = f"{len(wanted) - six} of IPv4 and {six} of IPv6 to {shown}"
    return Check(name="addresses", ok=not bad, message="; ".join(bad) or told)


def _delegated(cloud: AddressFacts) -> list[str]:
    return [
        f"{address} is of the delegated prefix {prefix}, which moves as a whole or not at all; give the EVM an address "
        "outside of it"
        for address, prefix in sorted(cloud.delegated.items())
    ]


def _checked(interfaces: Sequence[InterfaceFacts]) -> list[str]:
    """Until an address is reassigned the target sends under it from an interface that does not have it yet."""
    on = [eni for eni in interfaces if eni.source_dest_check]
    command = "aws ec2 modify-network-interface-attribute --no-source-dest-check --network-interface-id"
    return [f"the source/destination check of {eni.id} on {eni.node} is on: {command} {eni.id}" for eni in on]


def _short_of_slots(wanted: Set[str], there: Sequence[InterfaceFacts], target: str) -> list[str]:
    held = {address for eni in there for address in eni.addresses}
    if not there:
        return [f"{target} has no network interface for addresses of EVMs"]
    six = len([address for address in wanted - held if ":" in address])
    four = len(wanted - held) - six
    found = []
    if sum(eni.free for eni in there) < four:
        shown = ", ".join(f"{eni.id} has {eni.free} of {eni.slots} free" for eni in there)
        found.append(f"{four} slots of IPv4 are needed on {target}: {shown}; attach another network interface to it")
    if sum(eni.ipv6_free for eni in there) < six:
        shown = ", ".join(f"{eni.id} has {eni.ipv6_free} of {eni.ipv6_slots} free" for eni in there)
        found.append(f"{six} slots of IPv6 are needed on {target}: {shown}; attach another network interface to it")
    return found


CHECKS = (
    memory, vcpus, image, machine_type, cpu_model, accelerator, qemu, protocol, emp_version, journals, efs, subnet, mtu,
    ipv6, addresses,
)  # fmt: skip


def _both(source: str, target: str) -> str:
    return f"{source} on both ends" if source == target else f"{source} on the source, {target} on the target"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _is_in(address: str, block: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        return ipaddress.ip_address(address) in block
    except ValueError:
        return False
