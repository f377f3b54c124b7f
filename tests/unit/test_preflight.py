"""Pre-flight names what does not fit on the two ends, and passes what does."""

from __future__ import annotations

import dataclasses

import pytest

from emp.migration.preflight import CHECKS, Facts, VolumeFacts, failed, preflight
from emp.model.addresses import AddressFacts, InterfaceFacts
from emp.model.evm import EvmState, Ipv6
from emp.model.migration import VolumeOrder
from emp.model.node import EvmReport, NodeReport
from emp.model.volume import Attachment, Volume, VolumeType
from tests.fakes.values import GIB, MIB, a_report, a_spec, versions


def of(
    kind: VolumeType = VolumeType.IO2,
    *nodes: str,
    obstacle: str | None = None,
    move_ms: float | None = None,
    **changes: object,
) -> VolumeFacts:
    made = Volume(
        id="vol-1",
        type=kind,
        size_bytes=GIB,
        serial="vol1",
        evm="web",
        attachments=tuple(Attachment(volume="vol-1", node=node, epoch=1) for node in nodes or ("n1",)),
    )
    return VolumeFacts(made.model_copy(update=changes), obstacle=obstacle, move_ms=move_ms)


def facts(target: NodeReport | None = None, **changes: object) -> Facts:
    base = Facts(
        spec=a_spec(memory_bytes=512 * MIB),
        source=a_report("n1"),
        target=target or a_report("n2"),
        target_free_bytes=GIB,
        volumes=(of(),),
        subnet="10.77.0.0/16",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def failures(given: Facts) -> dict[str, str]:
    return {check.name: check.message for check in failed(preflight(given))}


def test_two_equal_nodes_pass_every_check() -> None:
    checks = preflight(facts())
    assert len(checks) == len(CHECKS) + 1
    assert all(check.ok and check.message for check in checks)


@pytest.mark.parametrize(
    ("target", "check", "message"),
    [
        (a_report("n2", versions=versions(images={})), "image", "n2 does not have the image micro"),
        (
            a_report("n2", versions=versions(images={"micro": "sha256:bbbb"})),
            "image",
            "micro is bbbb on n2, the EVM has aaaa",
        ),
        (a_report("n2", versions=versions(machines=("pc-i440fx-9.2",))), "machine", "n2 does not know pc-i440fx-10.0"),
        (
            a_report("n2", versions=versions(cpu_models=("qemu64-v1",))),
            "cpu",
            "n2 cannot run Westmere-v1 with every feature it names",
        ),
        (a_report("n2", versions=versions(accelerator="kvm")), "accelerator", "tcg on the source, kvm on the target"),
        (a_report("n2", versions=versions(protocol=2)), "protocol", "1 on the source, 2 on the target"),
        (a_report("n2", versions=versions(emp="1.0.0")), "emp", "0.1.0 on the source, 1.0.0 on the target"),
        (a_report("n2", vcpus=0), "vcpus", "n2 has 0 CPUs, 1 needed"),
        (a_report("n2", journal="torn at byte 7"), "journal", "n2: torn at byte 7"),
        (a_report("n2", address="192.0.2.9"), "subnet", "n2 is not in 10.77.0.0/16"),
    ],
)
def test_a_mismatch_fails_its_own_check_alone(target: NodeReport, check: str, message: str) -> None:
    assert failures(facts(target)) == {check: message}


def test_memory_is_what_no_record_claims() -> None:
    assert failures(facts(target_free_bytes=512 * MIB)) == {}
    assert failures(facts(target_free_bytes=511 * MIB)) == {"memory": "511 MiB free on n2, 512 MiB needed"}
    assert "0 B free" in failures(facts(target_free_bytes=-GIB))["memory"]


@pytest.mark.parametrize(
    ("source", "target", "ok"),
    [
        ("10.0.2", "10.0.2", True),
        ("10.0.2", "10.0.5", True),
        ("10.0.5", "10.0.2", True),  # one stable series: either direction
        ("10.0.5", "10.1.0", True),
        ("10.1.0", "10.0.5", False),
        ("10.0.0", "9.2.4", False),
        ("9.2.0", "10.0.0", True),  # numbers, not letters
        ("10.0.2 (Debian 1:10.0.2+ds)", "10.0.2", True),
        ("custom", "custom", True),
        ("custom", "10.0.2", False),
    ],
)
def test_the_target_must_not_run_an_older_qemu(source: str, target: str, ok: bool) -> None:
    given = facts(a_report("n2", versions=versions(qemu=target)), source=a_report("n1", versions=versions(qemu=source)))
    assert ("qemu" not in failures(given)) is ok


def test_minor_versions_of_emp_work_together() -> None:
    assert failures(facts(a_report("n2", versions=versions(emp="0.2.0")))) == {}


@pytest.mark.parametrize(
    ("here", "there", "own", "message"),
    [
        (1500, 9001, 1500, "1500 bytes on the source, 9001 bytes on the target; set bridge and uplink of both nodes"),
        (9001, 1500, 9001, "9001 bytes on the source, 1500 bytes on the target"),
        (1500, 1500, 9001, "web has 9001 bytes at its taps, n2 takes 1500"),
        (1500, 1500, 1500, None),
        (9001, 9001, 1500, None),
        (None, 1500, 1500, None),
    ],
)
def test_frames_fit_on_both_ends(here: int | None, there: int, own: int, message: str | None) -> None:
    running = EvmReport(name="web", state=EvmState.RUNNING, epoch=1, mtu_bytes=own)
    given = facts(a_report("n2", mtu_bytes=there), source=a_report("n1", mtu_bytes=here, evms=(running,)))
    found = failures(given).get("mtu")
    assert (found is None) == (message is None)
    assert (message or "") in (found or "")


def test_an_address_outside_of_the_subnet_is_named() -> None:
    assert failures(facts(subnet="10.78.0.0/16"))["subnet"].startswith("10.77.1.1")


def test_an_ipv6_address_is_of_the_subnets_ipv6_block() -> None:
    spec = a_spec("web")
    six = Ipv6(address="fd77::1:5", prefix_length=128)
    spec = spec.model_copy(update={"nics": (spec.nics[0].model_copy(update={"ipv6": six}),)})
    assert failures(facts(spec=spec))["subnet"] == "fd77::1:5 not in 10.77.0.0/16"
    assert failures(facts(spec=spec, subnet_ipv6="fd78::/64"))["subnet"].startswith("fd77::1:5 not in 10.77")
    assert failures(facts(spec=spec, subnet_ipv6="fd77::/64")) == {}


def test_the_target_takes_ipv6_if_the_evm_has_it() -> None:
    spec, lacks = a_spec("web"), a_report("n2", no_ipv6="eth0 has no IPv6 address")
    six = Ipv6(address="fd77::1:5", prefix_length=128)
    with_six = spec.model_copy(update={"nics": (spec.nics[0].model_copy(update={"ipv6": six}),)})
    assert failures(facts(lacks)) == {}
    assert failures(facts(lacks, spec=with_six, subnet_ipv6="fd77::/64")) == {"ipv6": "n2: eth0 has no IPv6 address"}
    assert failures(facts(spec=with_six, subnet_ipv6="fd77::/64")) == {}, "nor of an agent that does not say"


def test_nodes_whose_own_addresses_are_elsewhere_say_nothing_of_the_segment() -> None:
    apart = facts(a_report("n2", address="192.0.2.2"), source=a_report("n1", address="192.0.2.1"))
    assert failures(apart) == {}


# ------------------------------------------------------------------ volumes, one line each

SIXTEEN = tuple(f"m{number}" for number in range(16))


def lines(*volumes: VolumeFacts, volume_order: VolumeOrder = VolumeOrder.RESUME_FIRST) -> list[tuple[str, bool, str]]:
    checks = preflight(facts(volumes=volumes, volume_order=volume_order))
    return [(c.name, c.ok, c.message) for c in checks if c.name.startswith("volume")]


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (of(VolumeType.IO2), "io2, 1 GiB: attached to n2 before the pause; no I/O stall beyond it"),
        (of(VolumeType.IO1), "io1, 1 GiB: attached to n2 before the pause; no I/O stall beyond it"),
        (of(VolumeType.SHARED), "shared, 1 GiB: nothing to attach; no I/O stall beyond the pause"),
        (
            of(VolumeType.GP3, move_ms=7040.0),
            "gp3, 1 GiB: its I/O stalls for about 7.0 s after the pause, while it is detached and attached; "
            "with io2 it would not",
        ),
        (
            of(VolumeType.GP2),
            "gp2, 1 GiB: its I/O stalls for a time not known yet after the pause, while it is detached and attached; "
            "with io2 it would not",
        ),
        (of(VolumeType.IO2, "n1", "n2", "n3"), "io2, 1 GiB: attached to n2 before the pause; no I/O stall beyond it"),
        (of(VolumeType.IO2, *SIXTEEN[:15]), "io2, 1 GiB: attached to n2 before the pause; no I/O stall beyond it"),
    ],
)
def test_a_volume_that_can_move_says_what_that_costs(volume: VolumeFacts, message: str) -> None:
    assert lines(volume) == [("volume vol-1", True, message)]


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        (of(obstacle="it is in eu-west-1b, n2 in eu-west-1a"), "io2, 1 GiB: it is in eu-west-1b, n2 in eu-west-1a"),
        (of(fault="EC2 says error"), "io2, 1 GiB: EC2 says error"),
        (of(serial=""), "io2, 1 GiB: its serial or size is not known, so nothing on n2 could be told to be it"),
        (of(size_bytes=0), "io2, 0 B: its serial or size is not known, so nothing on n2 could be told to be it"),
        (of(VolumeType.IO2, *SIXTEEN), "io2, 1 GiB: it is attached to 16 nodes, and takes 16 at once"),
        (of(VolumeType.GP3, "n3"), "gp3, 1 GiB: it is attached to n3, not to n1"),
        (of(VolumeType.GP3, attachments=()), "gp3, 1 GiB: it is attached nowhere, not to n1"),
        (of(VolumeType.GP3, "n1", "n3"), "gp3, 1 GiB: it is attached to n3 as well"),
        (of(VolumeType.SHARED, "n1", "n3"), "shared, 1 GiB: it is attached to n3 as well"),
        (
            of(VolumeType.GP3, "n3", fault="EC2 says error", obstacle="no room"),
            "gp3, 1 GiB: EC2 says error; it is attached to n3, not to n1; no room",
        ),
    ],
)
def test_a_volume_that_cannot_move_says_every_reason(volume: VolumeFacts, message: str) -> None:
    assert lines(volume) == [("volume vol-1", False, message)]


def test_in_the_classic_order_the_guest_pays_instead() -> None:
    kinds = (VolumeType.GP3, VolumeType.IO2, VolumeType.SHARED)
    single, *others = lines(*(of(kind, move_ms=7000.0) for kind in kinds), volume_order=VolumeOrder.CLASSIC)
    assert single[2] == (
        "gp3, 1 GiB: the pause lasts about 7.0 s longer, while it is detached and attached; "
        "resume-first or io2 would not need it"
    )
    assert others == lines(*(of(kind) for kind in kinds[1:]))


def test_each_volume_has_its_line() -> None:
    other = of(VolumeType.SHARED, id="shared-1")
    assert [name for name, _, _ in lines(of(), other)] == ["volume vol-1", "volume shared-1"]
    assert lines() == [("volumes", True, "none")]


# ------------------------------------------------------------------ addresses that a cloud routes


def eni(name: str, node: str, **changes: object) -> InterfaceFacts:
    made = InterfaceFacts(id=name, node=node, slots=50, free=49)
    return made.model_copy(update=changes)


def routed(*there: InterfaceFacts, **changes: object) -> Facts:
    cloud = AddressFacts(interfaces=(eni("eni-1", "n1"), *there), **changes)  # type: ignore[arg-type]
    return facts(addresses=cloud)


def test_interfaces_with_room_pass() -> None:
    six = Ipv6(address="fd77::1:0:0:4", prefix_length=128)
    nics = (facts().spec.nics[0].model_copy(update={"ipv6": six}),)
    given = routed(eni("eni-2", "n2", ipv6_slots=30, ipv6_free=28))
    given = dataclasses.replace(given, spec=given.spec.model_copy(update={"nics": nics}))
    (check,) = (check for check in preflight(given) if check.name == "addresses")
    assert check.ok
    assert check.message == "1 of IPv4 and 1 of IPv6 to eni-2 with 49 of 50 IPv4 and 28 of 30 IPv6 slots free"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (routed(), "n2 has no network interface for addresses of EVMs"),
        (routed(eni("eni-2", "n2", free=0)), "1 slots of IPv4 are needed on n2: eni-2 has 0 of 50 free"),
        (
            routed(eni("eni-2", "n2", source_dest_check=True)),
            "the source/destination check of eni-2 on n2 is on: aws ec2 modify-network-interface-attribute "
            "--no-source-dest-check --network-interface-id eni-2",
        ),
        (
            routed(eni("eni-2", "n2"), delegated={"10.77.3.18": "10.77.3.16/28"}),
            "10.77.3.18 is of the delegated prefix 10.77.3.16/28, which moves as a whole or not at all",
        ),
        (routed(problem="no credentials"), "the cloud could not be asked: no credentials"),
    ],
)
def test_what_keeps_addresses_from_the_target_is_said(given: Facts, message: str) -> None:
    assert failures(given).keys() == {"addresses"}
    assert message in failures(given)["addresses"]


def test_ipv6_has_slots_of_its_own() -> None:
    spec = a_spec("web")
    six = Ipv6(address="fd77::1:5", prefix_length=128)
    spec = spec.model_copy(update={"nics": (spec.nics[0].model_copy(update={"ipv6": six}),)})
    for free, said in ((0, {"addresses": "1 slots of IPv6 are needed on n2: eni-2 has 0 of 50 free"}), (1, {})):
        there = routed(eni("eni-2", "n2", ipv6_slots=50, ipv6_free=free))
        found = failures(dataclasses.replace(there, spec=spec, subnet_ipv6="fd77::/64"))
        assert {name: text.partition(";")[0] for name, text in found.items()} == said


def test_slots_of_two_interfaces_count_together_and_what_is_there_already_needs_none() -> None:
    spec = facts().spec
    one, other = eni("eni-2", "n2", free=0), eni("eni-3", "n2", free=1)
    assert not failures(routed(one, other))
    held = eni("eni-2", "n2", free=0, addresses=tuple(address for _, address in spec.addresses))
    assert not failures(routed(held)), "as after a reassignment that a killed controller had begun"
