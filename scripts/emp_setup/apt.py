"""Calling apt: what is installed, what could be, and installing it, without touching anything else of the machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from emp_setup import sources
from emp_setup.console import Refusal, quietly, say
from emp_setup.privilege import as_root

OS_RELEASE = Path("/etc/os-release")
_WHY_ROOT = "Debian packages have to be installed"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return package -> version for those of ``packages`` that are fully installed, in one call of dpkg-query."""
    if shutil.which("dpkg-query") is None or shutil.which("apt-get") is None:
        raise Refusal(
            "this set-up installs Debian packages, and there is no apt here: "
            "use Debian 12 or newer (a virtual machine or a privileged container will do)"
        )
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\n", *packages],
        capture_output=True,
        text=True,
        check=False,  # it fails as soon as one is unknown, and lists the others all the same
    )
    rows = (line.split() for line in done.stdout.splitlines())
    return {row[0]: row[1] for row in rows if row[-1] == "installed"}


def os_release() -> dict[str, str]:
    """Return the fields of os-release(5), unquoted."""
    lines = OS_RELEASE.read_text().splitlines() if OS_RELEASE.exists() else []
    return {name: value.strip("\"'") for name, _, value in (line.partition("=") for line in lines if "=" in line)}


@contextlib.contextmanager
def only_release_sources(release: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield apt options that leave only the files with the release's own suites in sight.

    Lists that were fetched from other sources before are kept. Where no file names the release (a machine that
    follows ``stable`` or ``sid``), apt reads all that it is configured with.
    """
    files = sources.files_of_release(sources.read_sources(), release.get("VERSION_CODENAME", ""))
    if not files:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="emp-setup-") as directory:
        for number, file in enumerate(files):
            (Path(directory) / f"{number}-{file.name}").symlink_to(file)
        yield [
            "-o", "Dir::Etc::sourcelist=/dev/null",
            "-o", f"Dir::Etc::sourceparts={directory}",
            "-o", "APT::Get::List-Cleanup=false",
        ]  # fmt: skip


def refresh(apt: Sequence[str]) -> None:
    """Fetch the package lists. A list that cannot be had is not fatal: what comes of it is, if it was needed."""
    try:
        quietly(rootly(["apt-get", *apt, "-q", "update"]), doing="refreshing the package lists")
    except Refusal as refusal:
        say(f"going on in spite of this: {refusal}")


def install(apt: Sequence[str], packages: Sequence[str]) -> None:
    """Install ``packages`` and what they strictly need."""
    options = ["-q", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"]
    command = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *apt, *options, "install", *packages]
    quietly(rootly(command), doing=f"installing {' '.join(packages)}")


def candidate(apt: Sequence[str], package: str, suite: str | None = None) -> str:
    """Return the version of ``package`` that apt would install, ``(none)`` if there is none."""
    target = ["-o", f"APT::Default-Release={suite}"] if suite else []
    done = subprocess.run(
        ["apt-cache", *apt, *target, "policy", package],
        capture_output=True,
        text=True,
        check=False,  # a suite that could not be fetched is an error to apt, and no candidate to us
        env={**os.environ, "LC_ALL": "C"},
    )
    found = [line.split(":", 1)[1].strip() for line in done.stdout.splitlines() if "Candidate:" in line]
    return found[0] if found else "(none)"


def require_root() -> None:
    """Say that sudo will be used, if it will.

    :raises Refusal: neither root nor sudo
    """
    if rootly(["true"]) != ["true"]:
        say(f"using sudo: {_WHY_ROOT}")


def rootly(command: Sequence[str]) -> list[str]:
    """Return ``command`` as root runs it."""
    return as_root(command, _WHY_ROOT)
