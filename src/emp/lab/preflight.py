"""What must be right before a lab is begun: privilege, tools, QEMU. Nothing is made here."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence

from emp.host.run import run_sync
from emp.model.errors import CommandFailed, MissingDependency

WHY = "it makes network namespaces, taps and mounts"
PROGRAMS = {"ip": "iproute2", "nsenter": "util-linux", "setsid": "util-linux", "sleep": "coreutils", "nft": "nftables"}
QEMU = "qemu-system-x86_64"
QEMU_MINIMUM = (10, 0)
KEPT_VARIABLES = ("EMP_LAB_DIR", "EMP_QEMU", "EMP_CONTEXT", "EMP_CONTEXT_DIR", "EMP_CACHE", "NO_COLOR")


def become_root(command: Sequence[str] | None = None) -> None:
    """Return if we are root; else run the same command again through sudo, saying why.

    Raises ``MissingDependency`` where there is no sudo.
    """
    if os.geteuid() == 0:
        return
    sudo = shutil.which("sudo")
    if sudo is None:
        raise MissingDependency(
            f"emp lab needs root ({WHY}), and there is no sudo here", hint="run it as root, or install sudo"
        )
    print(f"emp lab needs root ({WHY}): running it again through sudo", file=sys.stderr, flush=True)
    kept = [f"{name}={os.environ[name]}" for name in KEPT_VARIABLES if name in os.environ]
    again = list(command or [sys.executable, *sys.orig_argv[1:]])
    os.execv(sudo, [sudo, "--", "env", *kept, *again])


def check_programs() -> None:
    """Raise ``MissingDependency`` naming the package of the first program that is not there."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise MissingDependency(f"{program} is not installed", hint=f"install the package {package}")


def check_qemu() -> tuple[str | None, str]:
    """Return the QEMU named by ``EMP_QEMU`` (None = the one on PATH) and its version.

    Raises ``MissingDependency`` when it is not there, does not answer, or is older than 10.0.
    """
    named = os.environ.get("EMP_QEMU")
    path = shutil.which(named or QEMU)
    minimum = ".".join(map(str, QEMU_MINIMUM))
    if path is None:
        missing = f"EMP_QEMU={named} is no program" if named else f"{QEMU} is not installed"
        raise MissingDependency(missing, field="qemu", hint=f"`make setup` installs QEMU {minimum} or newer")
    try:
        said = run_sync(path, "--version")
    except CommandFailed as error:
        raise MissingDependency(f"{path} does not run: {error.details['stderr']}", field="qemu") from None
    found = re.search(r"QEMU emulator version ((\d+)\.(\d+)[.\d]*)", said)
    if not found:
        raise MissingDependency(f"{path} does not say which QEMU it is", field="qemu", hint=f"name a {QEMU}")
    if (int(found[2]), int(found[3])) < QEMU_MINIMUM:
        raise MissingDependency(
            f"{path} is QEMU {found[1]}, and {minimum} is needed",
            field="qemu",
            hint="`make setup` installs one, or EMP_QEMU=PATH names another",
        )
    return (os.path.abspath(path) if named else None), found[1]  # noqa: PTH100 - links are followed by nobody else
