"""The EFS driver against the simulated cloud, through the same boto3 that speaks to AWS."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from emp.aws.patience import Time
from emp.lab.cloud.knobs import AWS, Fault, Harm
from emp.lab.cloud.vpc import Rule, SecurityGroup
from emp.model.efs import FileSystem
from emp.model.efs import Rule as Lets
from emp.model.errors import Forbidden, NotFound, Refused
from emp.volumes.efs import EfsCloud
from tests.cloud.simulator import (
    FAR,
    NODES,
    OF_NODES,
    OTHER_ZONE,
    POOL,
    REGION,
    SUBNETS,
    VPC,
    ZONE,
    HandClock,
    Simulator,
)
from tests.cloud.test_efs_strictness import make, target
from tests.cloud.test_strictness import refused

T = TypeVar("T")
POOL_NODES = {"n1": NODES["n1"], "n2": NODES["n2"], "far": FAR["far"]}
Run = Callable[[Callable[[EfsCloud], Awaitable[T]]], T]


@pytest.fixture
def run(simulator: Simulator, clock: HandClock) -> Run[Any]:
    """Carry out something with a driver whose pauses let the cloud's time pass."""

    def run(what: Callable[[EfsCloud], Awaitable[T]]) -> T:
        async def inside() -> T:
            driver = EfsCloud(
                POOL_NODES, pool=POOL, region=REGION, endpoint_url=simulator.url, ca_file=simulator.ca_file,
                times=Time(clock=clock, sleep=clock.sleep), read_s=3.0,
            )  # fmt: skip
            try:
                return await what(driver)
            finally:
                await driver.aclose()

        return asyncio.run(inside())

    return run


@pytest.mark.parametrize("knobs", [{}, {"latency": AWS}])
def test_a_file_system_gets_a_mount_target_in_every_zone_of_the_nodes(
    run: Run[Any], simulator: Simulator, knobs: dict[str, Any]
) -> None:
    simulator.turn(**knobs)
    made: FileSystem = run(lambda driver: driver.create())
    assert (made.state, made.ours) == ("available", True)
    assert {t.zone: (t.subnet, t.vpc, t.state) for t in made.targets} == {
        zone: (SUBNETS[zone], VPC, "available") for zone in (ZONE, OTHER_ZONE)
    }
    assert made.targets[0].rules == (Lets(cidr="10.77.0.0/16"),)
    assert run(lambda driver: driver.list()) == (made,)
    run(lambda driver: driver.delete(made.id))
    run(lambda driver: driver.delete(made.id))
    with pytest.raises(NotFound):
        run(lambda driver: driver.describe(made.id))


@pytest.mark.parametrize("action", ["CreateFileSystem", "CreateMountTarget"])
@pytest.mark.parametrize("harm", [Harm.LOST_REPLY, Harm.LOST_ORDER, Harm.BROKEN, Harm.THROTTLED])
def test_a_lost_reply_makes_nothing_twice(
    run: Run[Any], simulator: Simulator, efs: Any, action: str, harm: Harm
) -> None:
    simulator.turn(faults=(Fault(harm=harm, action=action),))
    made: FileSystem = run(lambda driver: driver.create())
    assert len(made.targets) == 2
    assert len(efs.describe_file_systems()["FileSystems"]) == 1


@pytest.mark.parametrize("action", ["DeleteFileSystem", "DeleteMountTarget"])
@pytest.mark.parametrize("harm", [Harm.LOST_REPLY, Harm.LOST_ORDER])
def test_a_lost_reply_leaves_nothing_undeleted(
    run: Run[Any], simulator: Simulator, efs: Any, action: str, harm: Harm
) -> None:
    made: FileSystem = run(lambda driver: driver.create())
    simulator.turn(latency=AWS, faults=(Fault(harm=harm, action=action),))
    run(lambda driver: driver.delete(made.id))
    assert refused(lambda: efs.describe_file_systems(FileSystemId=made.id)) == "FileSystemNotFound"


def test_a_file_system_of_somebody_else_is_not_deleted(run: Run[Any], efs: Any) -> None:
    theirs = make(efs)
    with pytest.raises(Refused, match="was not made by the pool"):
        run(lambda driver: driver.delete(theirs))
    assert run(lambda driver: driver.list()) == ()
    assert not run(lambda driver: driver.describe(theirs)).ours


def test_a_permission_that_is_missing_is_named(run: Run[Any], simulator: Simulator) -> None:
    simulator.turn(faults=(Fault(harm=Harm.DENIED, action="CreateFileSystem"),))
    with pytest.raises(Forbidden, match="CreateFileSystem"):
        run(lambda driver: driver.create())


def test_facts_tell_of_what_is_there_and_of_the_nodes(run: Run[Any], efs: Any) -> None:
    file_system = make(efs)
    address = target(efs, file_system, OTHER_ZONE)["IpAddress"]
    facts = run(lambda driver: driver.facts([file_system, "fs-0123456789abcdef0"]))
    assert facts.problem is None
    assert [(f.id, [t.address for t in f.targets]) for f in facts.file_systems] == [(file_system, [address])]
    assert {node: (p.zone, p.subnet, p.vpc, p.groups) for node, p in facts.places.items()} == {
        "n1": (ZONE, SUBNETS[ZONE], VPC, (OF_NODES,)),
        "n2": (ZONE, SUBNETS[ZONE], VPC, (OF_NODES,)),
        "far": (OTHER_ZONE, SUBNETS[OTHER_ZONE], VPC, (OF_NODES,)),
    }


def test_facts_say_why_the_cloud_does_not_answer(run: Run[Any], simulator: Simulator, efs: Any) -> None:
    file_system = make(efs)
    simulator.turn(faults=(Fault(harm=Harm.DENIED, action="DescribeMountTargets"),))
    facts = run(lambda driver: driver.facts([file_system]))
    assert facts.problem is not None
    assert "AccessDenied" in facts.problem


@pytest.mark.parametrize(
    ("rules", "seen"),
    [
        ((Rule(first_port=22, last_port=22, cidr="10.77.0.0/16"),), ()),
        ((Rule(first_port=2000, last_port=3000, cidr="10.77.0.0/16"),), (Lets(cidr="10.77.0.0/16"),)),
        ((Rule(protocol="-1", group=OF_NODES),), (Lets(group=OF_NODES),)),
        ((Rule(protocol="udp", cidr="10.77.0.0/16"),), ()),
    ],
)
def test_rules_of_security_groups_are_those_that_are_about_nfs(
    run: Run[Any], simulator: Simulator, efs: Any, rules: tuple[Rule, ...], seen: tuple[Lets, ...]
) -> None:
    special = SecurityGroup("sg-000000000000005ec", "special", VPC, rules)
    simulator.do(lambda: simulator.vpc.groups.update({special.id: special}))
    file_system = make(efs)
    target(efs, file_system, SecurityGroups=[special.id])
    (found,) = run(lambda driver: driver.describe(file_system)).targets
    assert (found.groups, found.rules) == ((special.id,), seen)
