"""Pre-flight names what does not fit on the two ends, and passes what does."""

from __future__ import annotations

import dataclasses

import pytest

from emp.migration.preflight import CHECKS, Facts, failed, preflight
from emp.model.node import NodeReport
from emp.model.volume import Volume, VolumeType
from tests.fakes.values import GIB, MIB, a_report, a_spec, versions


def facts(target: NodeReport | None = None, **changes: object) -> Facts:
    base = Facts(
        spec=a_spec(memory_bytes=512 * MIB),
        source=a_report("n1"),
        target=target or a_report("n2"),
        target_free_bytes=GIB,
        volumes=(Volume(id="vol-1", type=VolumeType.IO2, size_bytes=MIB, serial="vol1"),),
        subnet="10.77.0.0/16",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def failures(given: Facts) -> dict[str, str]:
    return {check.name: check.message for check in failed(preflight(given))}


def test_two_equal_nodes_pass_every_check() -> None:
    checks = preflight(facts())
    assert len(checks) == len(CHECKS)
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


def test_an_address_outside_of_the_subnet_is_named() -> None:
    assert failures(facts(subnet="10.78.0.0/16"))["subnet"].startswith("10.77.1.1")


def test_nodes_whose_own_addresses_are_elsewhere_say_nothing_of_the_segment() -> None:
    apart = facts(a_report("n2", address="192.0.2.2"), source=a_report("n1", address="192.0.2.1"))
    assert failures(apart) == {}


def test_an_evm_without_volumes_passes() -> None:
    assert failures(facts(volumes=())) == {}
