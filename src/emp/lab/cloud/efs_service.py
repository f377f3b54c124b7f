"""EFS as a part of the simulated cloud's daemon: its network, its records on disk, its NFS servers."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from emp.lab.cloud.config import CloudConfig
from emp.lab.cloud.efs import Efs
from emp.lab.cloud.efs_face import EfsFace
from emp.lab.cloud.efs_records import EfsState
from emp.lab.cloud.ganesha import GaneshaPlane
from emp.lab.cloud.knobs import Knobs
from emp.lab.cloud.records import Instance
from emp.lab.cloud.vpc import Rule, SecurityGroup, Subnet, Vpc
from emp.lab.nfs_program import NfsProgram
from emp.model.errors import HostError, NotFound
from emp.wire.files import read_private, write_private

MEMORY = "efs.json"


class EfsService:
    """``face`` is served by the cloud's app. ``close`` ends the NFS servers; what they served is served again."""

    def __init__(self, config: CloudConfig, vpc: Vpc, *, knobs: Callable[[], Knobs]) -> None:
        assert config.efs is not None
        file = config.state_dir / MEMORY
        state = _read(file)
        began = datetime.now(UTC)
        efs = Efs(vpc, clock=time.monotonic, began=began, knobs=knobs(), state=state)
        self._plane = GaneshaPlane(NfsProgram(config.efs.program), config.state_dir, interface=config.efs.interface)

        def changed() -> None:
            write_private(file, efs.state.to_json(efs.clock()))

        self.face = EfsFace(efs, self._plane, access_keys={config.access_key}, changed=changed)

    async def close(self) -> None:
        await self._plane.close()


def _read(file: Path) -> EfsState:
    try:
        return EfsState.from_json(read_private(file), time.monotonic())
    except NotFound:
        return EfsState()
    except ValueError as error:
        hint = "make the lab anew: without it nobody knows what is mounted"
        raise HostError(f"{file} is damaged: {error}", hint=hint) from None


def network(config: CloudConfig) -> Vpc:
    """Return the cloud's network: one VPC, a subnet in each zone, and a default group that lets NFS in from inside."""
    if config.network is None:
        return Vpc()
    vpc, segment = _id("vpc", config.pool), config.network
    subnets = [
        Subnet(_subnet(config, zone), zone, segment.cidr, vpc, ipv6=segment.ipv6, picks=block)
        for zone, block in sorted(segment.picks.items())
    ]
    groups = [
        SecurityGroup(_id("sg", config.pool), "default", vpc, (Rule(cidr=segment.cidr),)),
        SecurityGroup(_id("sg", f"{config.pool} closed"), "closed", vpc),
    ]
    return Vpc.of(subnets, groups)


def instances(config: CloudConfig) -> Iterator[Instance]:
    """Yield the nodes' instances, each in the subnet of its zone where there are subnets."""
    group = (_id("sg", config.pool),)
    for node in config.nodes.values():
        if config.network is None:
            yield Instance(node.instance, node.zone, max_volumes=node.max_volumes)
        else:
            yield Instance(
                node.instance,
                node.zone,
                max_volumes=node.max_volumes,
                subnet=_subnet(config, node.zone),
                vpc=_id("vpc", config.pool),
                groups=group,
                address=node.address,
                more_addresses=node.more_addresses,
                ipv6=node.ipv6,
                source_dest_check=node.source_dest_check,
            )


def _subnet(config: CloudConfig, zone: str) -> str:
    return _id("subnet", f"{config.pool} {zone}")


def _id(kind: str, of: str) -> str:
    """Return an id that stays the same for the life of a lab."""
    return f"{kind}-0{hashlib.sha256(f'{kind} {of}'.encode()).hexdigest()[:16]}"
