"""Which QEMU is taken, and what is concluded from its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emp.hypervisor.qemu.binary import accelerator, facts_from_probe, find_binary
from emp.model.errors import HypervisorError, MissingDependency

QEMU = Path("/usr/bin/qemu-system-x86_64")


def messages(*, major: int = 10, minor: int = 0, machines: Any = None, cpus: Any = None) -> list[dict[str, Any]]:
    return [
        {"QMP": {"version": {"qemu": {"major": major, "minor": minor, "micro": 2}}, "capabilities": ["oob"]}},
        {"return": {}, "id": "qmp_capabilities"},
        {
            "id": "query-machines",
            "return": machines
            or [
                {"name": "pc-i440fx-9.2"},
                {"name": "pc-i440fx-10.0"},
                {"name": "pc-i440fx-2.6", "deprecated": True},
                {"name": "pc-q35-10.0"},
                {"name": "pc"},
            ],
        },
        {
            "id": "query-cpu-definitions",
            "return": cpus
            or [
                {"name": "Westmere-v1", "migration-safe": True, "static": False, "unavailable-features": []},
                {"name": "EPYC-v1", "migration-safe": True, "static": False, "unavailable-features": ["svm"]},
                {"name": "max", "migration-safe": False, "static": False},
                {"name": "base", "migration-safe": True, "static": True, "unavailable-features": []},
            ],
        },
        {"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": False}},
    ]


def test_newest_machine_by_number_and_only_models_that_run_whole() -> None:
    facts = facts_from_probe(messages(), "tcg", QEMU)
    assert facts.version == "10.0.2"
    assert facts.accelerator == "tcg"
    assert facts.machines == ("pc-i440fx-9.2", "pc-i440fx-10.0")
    assert facts.default_machine == "pc-i440fx-10.0"
    assert facts.cpu_models == ("Westmere-v1",)
    assert facts.default_cpu_model == "Westmere-v1"


@pytest.mark.parametrize(("major", "minor"), [(7, 2), (9, 2)])
def test_an_older_qemu_is_refused_with_a_way_out(major: int, minor: int) -> None:
    with pytest.raises(MissingDependency) as error:
        facts_from_probe(messages(major=major, minor=minor), "tcg", QEMU)
    assert f"{major}.{minor}" in error.value.message
    assert error.value.hint


def test_a_newer_qemu_is_taken() -> None:
    assert facts_from_probe(messages(major=11, minor=1), "kvm", QEMU).version == "11.1.2"


@pytest.mark.parametrize("broken", [{"machines": [{"name": "virt-10.0"}]}, {"cpus": [{"name": "486-v1"}]}])
def test_a_qemu_of_no_use_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(HypervisorError):
        facts_from_probe(messages(**broken), "tcg", QEMU)
    with pytest.raises(HypervisorError):
        facts_from_probe([], "tcg", QEMU)


def test_path_argument_then_environment_then_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("argument", "environment", "qemu-system-x86_64"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("EMP_QEMU", raising=False)
    assert find_binary().name == "qemu-system-x86_64"
    monkeypatch.setenv("EMP_QEMU", str(tmp_path / "environment"))
    assert find_binary().name == "environment"
    assert find_binary(tmp_path / "argument").name == "argument"
    monkeypatch.setenv("EMP_QEMU", str(tmp_path / "nowhere"))
    with pytest.raises(MissingDependency) as error:
        find_binary()
    assert "nowhere" in error.value.message


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ("fpu vmx sse", "/dev/null", "kvm"),
        ("fpu svm sse", "/dev/null", "kvm"),
        ("fpu sse", "/dev/null", "tcg"),
        ("fpu vmx", "/dev/there-is-no-kvm", "tcg"),
        ("fpu vmxnet", "/dev/null", "tcg"),
    ],
)
def test_kvm_needs_the_cpu_and_the_device(tmp_path: Path, flags: str, device: str, expected: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: {flags}\nbugs : none\n")
    assert accelerator(cpuinfo, Path(device)) == expected
