"""What goes wrong in a VPC: aborts, daemons that are killed, a cloud that refuses, and what pre-flight keeps out."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from emp import faults
from emp.lab import power
from emp.lab.checkers.frames import FrameWitness
from emp.lab.cloud.knobs import Fault, Harm, RemapDelay
from emp.lab.power import Power
from emp.lab.probing import Probing
from emp.lab.ready import wait_ready
from emp.model.errors import Refused
from emp.model.migration import Migration, Outcome, Stage
from tests.lab.aborts import GRACE_S, STAGES, aborted_in, check_streams, ends
from tests.lab.cloud import call, turn
from tests.lab.conftest import Pool
from tests.lab.pool import Subject, agent_away, mend, subject, until
from tests.lab.vpc import (
    SLOTS,
    addresses_of,
    arrivals,
    eni,
    enis,
    four_of,
    is_only_at,
    private,
    routed,
    vpc_of_two,
)
from tests.leaks import outliving

NAME = "vpc-faults"
POD = "10.77.9.20"
PREFIX = "10.77.9.16/28"


@pytest.fixture(scope="module")
def vpc(lab_home: object) -> Iterator[Pool]:
    with vpc_of_two(NAME) as made:
        yield made


@pytest.fixture(scope="module")
def shared(vpc: Pool) -> Iterator[Subject]:
    with subject(vpc, node="n1", ipv6=["auto"], pods=[f"a={POD}"]) as made:
        yield made


@pytest.fixture
def pool(vpc: Pool, shared: Subject) -> Iterator[Pool]:
    """What a test that failed has left is not the next one's."""
    yield vpc
    turn(vpc)
    for place in vpc.topology.node_places:
        faults.disarm(vpc.files.faults(place.name))
    mend(vpc)
    until(lambda: shared.record.migration is None, "no migration is open")


@pytest.fixture
def evm(pool: Pool, shared: Subject) -> Subject:
    """An EVM with a pod, on either node."""
    return shared


# ------------------------------------------------------------------ an abort

ORDERS = ("AssignPrivateIpAddresses", "UnassignPrivateIpAddresses", "UnassignIpv6Addresses")


def refuses(evm: Subject, node: str) -> list[str | None]:
    """Return what the cloud says to one order of each kind, neither of which would change anything at ``node``."""
    pool = evm.pool
    own = {"NetworkInterfaceId": eni(pool, node)["NetworkInterfaceId"]}
    orders = [
        call(pool, "assign_private_ip_addresses", PrivateIpAddresses=four_of(evm), AllowReassignment=True, **own),
        call(pool, "unassign_private_ip_addresses", PrivateIpAddresses=["10.77.9.99"], **own),
        call(pool, "unassign_ipv6_addresses", Ipv6Addresses=["fd77::9:99"], **own),
    ]
    return [answer.get("Refused") for answer in orders]


@pytest.mark.parametrize("stage", STAGES)
def test_an_abort_asks_nothing_of_the_cloud_and_loses_no_packet(pool: Pool, evm: Subject, stage: str) -> None:
    """The cloud refuses the next order of each kind: it is still ours to meet, so nobody has given one before."""
    source, target = ends(evm)
    addresses, four = addresses_of(evm), four_of(evm)
    targets = dict(zip(("evm", "pod"), four, strict=True))
    before = enis(pool), [routed(pool, address) for address in addresses]
    turn(pool, faults=[Fault(harm=Harm.DENIED, action=order) for order in ORDERS])
    with (
        Probing(pool.files, targets, rate_hz=1000, grace_s=GRACE_S) as probing,
        FrameWitness(pool.topology, [mac for mac, _ in evm.spec.addresses], addresses) as witness,
        arrivals(pool, four) as arrived,
    ):
        ended = aborted_in(stage, pool, evm)
        assert (ended.outcome, ended.committed) == (Outcome.ABORTED, False)
        counts = arrived()
        check_streams(probing)
    assert (enis(pool), [routed(pool, address) for address in addresses]) == before
    assert refuses(evm, source) == ["UnauthorizedOperation"] * len(ORDERS)
    assert (counts[target], ended.report.frames_forwarded or 0) == (0, 0)
    assert counts[source] > 100, "what was sent is counted where it came"
    assert {seen.node for seen in witness.seen} == {source}, "and so the capture has seen something"
    assert witness.dropped == 0
    is_only_at(evm, source)


# ------------------------------------------------------------------ daemons that are killed


@pytest.mark.parametrize(("when", "remap_s"), [("before the commit", 0.5), ("while the cloud moves them", 4.0)])
def test_a_controller_that_is_killed_goes_on_where_it_was(pool: Pool, evm: Subject, when: str, remap_s: float) -> None:
    _, target = ends(evm)
    turn(pool, remap=RemapDelay(least_s=remap_s))
    began_s = time.monotonic()
    with nothing_lost(evm):
        if when == "before the commit":
            moving = evm.begin_slow(target, bytes_per_s=20_000_000)
        else:
            moving = evm.begin(target)
            until(lambda: evm.client.migrations.get(moving.id).committed, "it is committed")
        pool.kill("ctl", "controller")
        until(lambda: _has_taken_over(pool, target, began_s), "it is the target's")
        pool.start("ctl", "controller")
        ended = evm.end_of(moving)
    assert ended.outcome is Outcome.COMPLETED
    assert ended.report.addresses is not None
    is_only_at(evm, target)


@contextmanager
def nothing_lost(evm: Subject, *, rate_hz: int = 200) -> Iterator[None]:
    """Have the client send to every address; fail the test if a request of the block has no answer, or two."""
    targets = {f"address {number}": address for number, address in enumerate(four_of(evm))}
    with Probing(evm.pool.files, targets, rate_hz=rate_hz, grace_s=GRACE_S) as probing:
        yield
        report = probing.stop()
    for target in targets:
        totals = [report["targets"][target][kind]["total"] for kind in ("udp", "tcp")]
        assert [(total["lost"], total["duplicated"]) for total in totals] == [(0, 0), (0, 0)], (target, totals)


def _has_taken_over(pool: Pool, node: str, since_s: float) -> bool:
    """By its journal: without its controller nobody else says so, and the source forwards until that is back."""
    reached = faults.hits(pool.files.faults(node))
    return any(hit.point == "journal.activated.after_fsync" and hit.at_s >= since_s for hit in reached)


def test_an_agent_that_is_killed_while_it_forwards_ends_it_by_the_controllers_word(pool: Pool, evm: Subject) -> None:
    source, target = ends(evm)
    turn(pool, remap=RemapDelay(least_s=4.0))
    moving = evm.begin(target)
    until(lambda: evm.client.migrations.get(moving.id).stage is Stage.TARGET_BROWNOUT, "it runs at the target")
    with agent_away(pool, evm.client, source):
        pass  # what comes meanwhile waits in the tap
    ended = evm.end_of(moving)
    assert ended.outcome is Outcome.COMPLETED
    is_only_at(evm, target)


def test_a_node_that_was_off_is_routed_to_again(pool: Pool, evm: Subject) -> None:
    _, target = ends(evm)
    before = evm.client.nodes.get(target).report.boot_id
    power.switch(pool.files, target, Power.OFF)
    with outliving(f"the lab {NAME}"):
        power.switch(pool.files, target, Power.ON)
    until(lambda: evm.client.nodes.get(target).report.boot_id != before, f"the agent of {target} is back")
    wait_ready(pool.files, pool.state, pool.context)
    evm.migrate(target)
    is_only_at(evm, target)


# ------------------------------------------------------------------ what the cloud refuses


@pytest.mark.parametrize("harm", [Harm.LOST_REPLY, Harm.THROTTLED])
def test_a_reassignment_whose_answer_is_lost_or_late_is_made_once(pool: Pool, evm: Subject, harm: Harm) -> None:
    _, target = ends(evm)
    fault = Fault(harm=harm, action="AssignPrivateIpAddresses")
    turn(pool, remap=RemapDelay(least_s=0.5), faults=(fault,))
    evm.migrate(target)
    is_only_at(evm, target)


def test_a_reassignment_that_is_refused_is_told_and_tried_again(pool: Pool, evm: Subject) -> None:
    source, target = ends(evm)
    turn(pool, faults=(Fault(harm=Harm.DENIED, action="AssignPrivateIpAddresses", times=None),))

    def told() -> Migration | None:
        now = evm.client.migrations.get(moving.id)
        return now if now.hint and "UnauthorizedOperation" in now.hint else None

    with nothing_lost(evm):
        moving = evm.begin(target)
        shown = until(told, "people are told")
        assert f"still come to {source}, which forwards them" in str(shown.hint)
        assert shown.stage is Stage.TARGET_BROWNOUT
        turn(pool)
        ended = evm.end_of(moving)
    assert (ended.outcome, ended.hint) == (Outcome.COMPLETED, None)
    assert ended.report.addresses is not None
    assert ended.report.addresses.tries > 1
    is_only_at(evm, target)


# ------------------------------------------------------------------ pre-flight


def refusal(evm: Subject, target: str) -> str:
    """Return what pre-flight says of the addresses; the EVM is refused for nothing else."""
    with pytest.raises(Refused) as caught:
        evm.begin(target)
    bad = [check for check in caught.value.details["checks"] if not check["ok"]]
    assert [check["name"] for check in bad] == ["addresses"]
    return str(bad[0]["message"])


def test_interfaces_without_a_free_slot_are_named_and_another_one_is_used(pool: Pool, evm: Subject) -> None:
    source, target = ends(evm)
    filled = {}
    for number, one in enumerate(enis(pool)[target]):
        free = SLOTS - len(one["PrivateIpAddresses"])
        filled[one["NetworkInterfaceId"]] = [f"10.77.{240 + number}.{last}" for last in range(1, free + 1)]
    another = None
    try:
        for name, addresses in filled.items():
            call(pool, "assign_private_ip_addresses", NetworkInterfaceId=name, PrivateIpAddresses=addresses)
        said = refusal(evm, target)
        assert all(f"{name} has 0 of {SLOTS} free" in said for name in filled)
        assert "attach another network interface" in said
        another = _another_interface(pool, target)
        evm.migrate(target)
        (found,) = call(pool, "describe_network_interfaces", NetworkInterfaceIds=[another[0]])["NetworkInterfaces"]
        assert set(four_of(evm)) < private(found)
        evm.guest().wait_first_packet()
        evm.migrate(source)
        is_only_at(evm, source)
    finally:
        for name, addresses in filled.items():
            call(pool, "unassign_private_ip_addresses", NetworkInterfaceId=name, PrivateIpAddresses=addresses)
        if another is not None:
            call(pool, "detach_network_interface", AttachmentId=another[1])
            call(pool, "delete_network_interface", NetworkInterfaceId=another[0])


def _another_interface(pool: Pool, node: str) -> tuple[str, str]:
    """Return the ids of a new interface of a node, and of its attachment."""
    first = eni(pool, node)
    made = call(pool, "create_network_interface", SubnetId=first["SubnetId"])["NetworkInterface"]["NetworkInterfaceId"]
    call(pool, "modify_network_interface_attribute", NetworkInterfaceId=made, SourceDestCheck={"Value": False})
    held = call(
        pool,
        "attach_network_interface",
        NetworkInterfaceId=made,
        InstanceId=first["Attachment"]["InstanceId"],
        DeviceIndex=3,
    )
    return made, held["AttachmentId"]


def test_an_address_of_a_delegated_prefix_is_refused_by_name(pool: Pool, evm: Subject) -> None:
    assert ipaddress.IPv4Address(POD) in ipaddress.IPv4Network(PREFIX)
    source, target = ends(evm)
    name = eni(pool, source)["NetworkInterfaceId"]
    call(pool, "unassign_private_ip_addresses", NetworkInterfaceId=name, PrivateIpAddresses=[POD])
    call(pool, "assign_private_ip_addresses", NetworkInterfaceId=name, Ipv4Prefixes=[PREFIX])
    try:
        evm.pod().wait_first_packet()
        said = refusal(evm, target)
        assert f"{POD} is of the delegated prefix {PREFIX}" in said
    finally:
        call(pool, "unassign_private_ip_addresses", NetworkInterfaceId=name, Ipv4Prefixes=[PREFIX])
        call(pool, "assign_private_ip_addresses", NetworkInterfaceId=name, PrivateIpAddresses=[POD])
    evm.migrate(target)


def test_a_source_destination_check_that_is_on_is_refused_with_the_command(pool: Pool, evm: Subject) -> None:
    _, target = ends(evm)
    name = eni(pool, target)["NetworkInterfaceId"]
    call(pool, "modify_network_interface_attribute", NetworkInterfaceId=name, SourceDestCheck={"Value": True})
    try:
        said = refusal(evm, target)
        assert f"the source/destination check of {name} on {target} is on" in said
        assert f"--no-source-dest-check --network-interface-id {name}" in said
    finally:
        call(pool, "modify_network_interface_attribute", NetworkInterfaceId=name, SourceDestCheck={"Value": False})
