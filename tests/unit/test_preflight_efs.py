"""Pre-flight names an EFS mount that would not reach its mount target from the node, why, and what to do."""

from __future__ import annotations

from typing import Any

import pytest

from emp.migration.efs import choose
from emp.model.efs import EfsFacts, EfsMount, FileSystem, MountTarget, NodePlace, Rule, parse_mount
from emp.model.errors import BadInput
from tests.fakes.values import a_spec
from tests.unit.test_preflight import facts, failures

FS, TARGET = "fs-0123456789abcdef0", "fsmt-0123456789abcdef0"
ADDRESS, ZONE, FAR_ZONE, VPC = "10.77.251.4", "z1", "z2", "vpc-1"
EVERYBODY = Rule(cidr="10.77.0.0/16")


def a_target(**changes: Any) -> MountTarget:
    base = {"id": TARGET, "address": ADDRESS, "zone": ZONE, "subnet": "s", "vpc": VPC, "state": "available"}
    return MountTarget(**(base | {"groups": ("sg-1",), "rules": (EVERYBODY,)} | changes))


def said(*targets: MountTarget, state: str = "available", **places: NodePlace) -> EfsFacts:
    here = {"n1": NodePlace(zone=ZONE, subnet="s", vpc=VPC), "n2": NodePlace(zone=ZONE, subnet="s", vpc=VPC)}
    return EfsFacts(file_systems=(FileSystem(id=FS, state=state, targets=targets),), places=here | places)


def judged(efs: EfsFacts) -> dict[str, str]:
    spec = a_spec().model_copy(update={"efs": (EfsMount(file_system=FS, address=ADDRESS),)})
    return failures(facts(spec=spec, efs=efs))


def test_a_mount_whose_target_is_reached_passes() -> None:
    assert judged(said(a_target())) == {}


def test_another_zone_is_no_obstacle() -> None:
    assert judged(said(a_target(), n2=NodePlace(zone=FAR_ZONE, subnet="t", vpc=VPC))) == {}


def test_a_rule_for_a_group_of_the_node_lets_it_in() -> None:
    there = NodePlace(zone=ZONE, subnet="s", vpc=VPC, groups=("sg-nodes",))
    assert judged(said(a_target(rules=(Rule(group="sg-nodes"),)), n2=there)) == {}


@pytest.mark.parametrize(
    ("efs", "words"),
    [
        (EfsFacts(), f"{FS} does not exist any more"),
        (EfsFacts(problem="throttled"), "EFS could not be asked: throttled"),
        (said(a_target(), state="deleting"), f"{FS} is deleting"),
        (said(), f"{FS} has no mount target at {ADDRESS} any more: make it again with that address"),
        (said(a_target(address="10.77.251.9")), f"{FS} has no mount target at {ADDRESS} any more"),
        (said(a_target(state="deleting")), f"{TARGET} ({ADDRESS}) is deleting"),
        (said(a_target(), n2=NodePlace(zone=ZONE, subnet="s", vpc="vpc-2")), "is in vpc-1, n2 in vpc-2: choose a node"),
        (said(a_target(rules=())), "sg-1 of fs-0123456789abcdef0's mount target"),
        (said(a_target(rules=(Rule(cidr="10.78.0.0/16"),))), "does not let TCP 2049 in from 10.77"),
        (said(a_target(rules=(Rule(group="sg-other"),))), "does not let TCP 2049 in from 10.77"),
    ],
)
def test_what_is_in_the_way_is_named(efs: EfsFacts, words: str) -> None:
    found = judged(efs)
    assert list(found) == ["efs"]
    assert words in found["efs"]


def test_a_node_that_the_cloud_does_not_know_is_refused() -> None:
    known = said(a_target())
    unknown = known.model_copy(update={"places": {"n1": known.places["n1"]}})
    assert "n2 has no instance in the cloud" in judged(unknown)["efs"]


def test_a_new_evm_speaks_to_the_mount_target_of_its_own_zone() -> None:
    near, far = a_target(), a_target(id="fsmt-0123456789abcdef1", address="10.77.252.4", zone=FAR_ZONE)
    efs = said(
        far, near, n3=NodePlace(zone=FAR_ZONE, subnet="t", vpc=VPC), n4=NodePlace(zone="z3", subnet="u", vpc=VPC)
    )
    (found,) = efs.file_systems
    assert choose(found, efs, "n1") == near
    assert choose(found, efs, "n3") == far
    assert choose(found, efs, "n4") == near, "any, where its own zone has none"
    assert "n9 has no instance" in str(choose(found, efs, "n9"))
    (empty,) = said().file_systems
    assert "has no mount target" in str(choose(empty, efs, "n1"))


@pytest.mark.parametrize(
    ("text", "found"), [(FS, (FS, "/")), (f"{FS}:/a/b-c_d.e", (FS, "/a/b-c_d.e")), (f"{FS}:", (FS, "/"))]
)
def test_a_mount_is_read(text: str, found: tuple[str, str]) -> None:
    if text.endswith(":"):
        with pytest.raises(BadInput, match="not a path"):
            parse_mount(text, field="efs[0]")
    else:
        assert parse_mount(text, field="efs[0]") == found


@pytest.mark.parametrize(
    "text",
    ["", "vol-0123", "fs-xyz", f"{FS}:data", f"{FS}:/a/../b", f"{FS}:/a b", f"{FS}:/a\nefs x", f"{FS}:/" + "a" * 300],
)
def test_a_mount_that_is_none_is_refused_naming_the_field(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_mount(text, field="efs[0]")
    assert caught.value.field == "efs[0]"
    assert caught.value.hint
