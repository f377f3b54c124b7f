"""Which QEMU this node has, whether KVM is usable, and what that QEMU can do (asked of itself: about 70 ms, once)."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emp.hypervisor.base import HypervisorFacts
from emp.model.errors import HypervisorError, MissingDependency

MINIMUM_VERSION = (10, 0)
BINARY_NAME = "qemu-system-x86_64"
PREFERRED_CPU_MODELS = ("Westmere-v1", "Nehalem-v1", "qemu64-v1")
"""Westmere is the newest model that QEMU 10.0's TCG supports without a missing feature; Intel's and AMD's CPUs have all
that it names, so that one default fits a whole pool."""
_MACHINE = re.compile(r"pc-i440fx-(\d+)\.(\d+)")
_PROBE_COMMANDS = ("qmp_capabilities", "query-machines", "query-cpu-definitions", "quit")
_PROBE_TIMEOUT_S = 30.0
_INSTALL_HINT = "Debian 12: apt install -t bookworm-backports qemu-system-x86; Debian 13: apt install qemu-system-x86"


def find_binary(binary: Path | None = None) -> Path:
    """Return QEMU's path: ``binary``, else the environment's EMP_QEMU, else from PATH. Raises ``MissingDependency``."""
    wanted = str(binary) if binary else os.environ.get("EMP_QEMU") or BINARY_NAME
    found = shutil.which(wanted)
    if found is None:
        raise MissingDependency(f"{wanted} is not here or cannot be executed", hint=_INSTALL_HINT)
    return Path(found).resolve()


def accelerator(cpuinfo: Path = Path("/proc/cpuinfo"), device: Path = Path("/dev/kvm")) -> str:
    """Return ``kvm`` where it is usable, else ``tcg``.

    Usable means: the CPU has VMX or SVM, and /dev/kvm opens. The device alone is not enough: under a paravirtual KVM
    on a CPU without either, an ordinary guest kernel hangs at boot.
    """
    flags: set[str] = set()
    for line in cpuinfo.read_text().splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    if not flags & {"vmx", "svm"}:
        return "tcg"
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return "tcg"
    return "kvm"


@dataclass(frozen=True)
class _BinaryId:
    """A binary that is not taken for a later one at the same path."""

    path: Path
    mtime_ns: int
    size_bytes: int
    accelerator: str

    @classmethod
    def of(cls, path: Path, accel: str) -> _BinaryId:
        status = path.stat()
        return cls(path, status.st_mtime_ns, status.st_size, accel)


_facts: dict[_BinaryId, HypervisorFacts] = {}


async def probe(binary: Path, accel: str) -> HypervisorFacts:
    """Return what ``binary`` can do under ``accel``; remembered until the file changes.

    Raises ``MissingDependency`` for a QEMU older than 10.0, ``HypervisorError`` for one that does not answer.
    """
    key = _BinaryId.of(binary, accel)
    if key not in _facts:
        _facts[key] = facts_from_probe(await asyncio.to_thread(_run_probe, binary, accel), accel, binary)
    return _facts[key]


def _run_probe(binary: Path, accel: str) -> list[dict[str, Any]]:
    argv = [str(binary), "-machine", "none", "-accel", accel, "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-S", "-qmp", "stdio"]
    commands = "".join(json.dumps({"execute": command, "id": command}) + "\n" for command in _PROBE_COMMANDS)
    try:
        ran = subprocess.run(
            argv, input=commands, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HypervisorError(f"{binary} could not be asked for its abilities: {error}") from error
    try:
        return [json.loads(line) for line in ran.stdout.splitlines()]
    except ValueError:
        raise HypervisorError(
            f"{binary} does not speak QMP", stdout=ran.stdout[-500:], stderr=ran.stderr[-500:]
        ) from None


def facts_from_probe(messages: list[dict[str, Any]], accel: str, binary: Path) -> HypervisorFacts:
    """Return the facts in a probe's QMP messages: the greeting, then the replies to ``_PROBE_COMMANDS`` by their id."""
    replies = {message["id"]: message.get("return") for message in messages if "id" in message}
    greeting = next((message["QMP"] for message in messages if "QMP" in message), None)
    if greeting is None:
        raise HypervisorError(f"{binary} sent no QMP greeting")
    version = greeting["version"]["qemu"]
    if (version["major"], version["minor"]) < MINIMUM_VERSION:
        raise MissingDependency(
            f"{binary} is QEMU {version['major']}.{version['minor']}, but 10.0 or newer is needed", hint=_INSTALL_HINT
        )
    machines = {m["name"]: m for m in replies.get("query-machines") or () if not m.get("deprecated")}
    versioned = sorted((name for name in machines if _MACHINE.fullmatch(name)), key=_machine_version)
    # unavailable-features is relative to the accelerator of this very probe
    models = tuple(
        sorted(
            cpu["name"]
            for cpu in replies.get("query-cpu-definitions") or ()
            if cpu.get("migration-safe") and not cpu.get("static") and not cpu.get("unavailable-features")
        )
    )
    default_model = next((model for model in PREFERRED_CPU_MODELS if model in models), None)
    if not versioned or default_model is None:
        raise HypervisorError(
            f"{binary} has no pc-i440fx machine, or under {accel} none of {', '.join(PREFERRED_CPU_MODELS)}",
            hint="use QEMU's x86-64 system emulator as packaged; on odd hosts without VMX or SVM it must run under tcg",
        )
    return HypervisorFacts(
        version=f"{version['major']}.{version['minor']}.{version['micro']}",
        accelerator=accel,
        machines=tuple(versioned),
        default_machine=versioned[-1],
        cpu_models=models,
        default_cpu_model=default_model,
    )


def _machine_version(name: str) -> tuple[int, ...]:
    match = _MACHINE.fullmatch(name)
    return tuple(int(part) for part in match.groups()) if match else ()
