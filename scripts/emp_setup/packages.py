"""The Debian packages that EMP needs, QEMU among them: which are missing, and from where they come."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from emp_setup import apt, qemu, sources
from emp_setup.console import Refusal, quietly, say


@dataclass(frozen=True)
class Need:
    """Packages that belong together, and what they are for."""

    packages: tuple[str, ...]
    why: str


NEEDS = (
    Need(("iproute2", "nftables", "util-linux", "mount"), "network and mount namespaces, bridges, taps, blocked ports"),
    Need(("gcc", "libc6-dev"), "compile the guest service"),
    Need(("ca-certificates",), "trust package sources that are served over HTTPS"),
)
DEVELOPMENT = Need(("git", "python3"), "tell the tests which files are the project's; stand in for QEMU, as its user")
PODS = Need(("mmdebstrap", "e2fsprogs"), "build the guest image debian, whose pods the tests migrate")
QEMU = Need(("qemu-system-x86", "qemu-utils"), "run the EVMs and serve their volumes")
QEMU_TOOL = "qemu-img"
QEMU_PIECES = (*QEMU.packages, "qemu-system-common", "qemu-system-data", "qemu-block-extra")
"""Packages of one QEMU: apt moves them together, so an old one among them counts as a QEMU that is already there."""


def ensure(extra: Iterable[Need], environ: Mapping[str, str] = os.environ) -> None:
    """Install what is missing of ``NEEDS``, ``extra`` and QEMU, saying what and why.

    Every reason to refuse that can be known beforehand is looked at before anything is changed.

    :raises Refusal: no Debian, no root, a QEMU that is too old or not to be had, or apt failed
    """
    own_qemu = qemu.choose(environ)
    needs = [*NEEDS, *extra]
    if own_qemu and shutil.which(QEMU_TOOL) is None:
        needs.append(Need(QEMU.packages[1:], "serve the EVMs' volumes"))
    installed = apt.versions([package for need in needs for package in need.packages])
    missing = [Need(absent, need.why) for need in needs if (absent := _absent(need, installed))]
    if own_qemu and not missing:
        return

    machine = platform.machine()
    if machine != "x86_64":
        raise Refusal(
            f"EMP's guests are x86-64 and their image is made of this machine's packages, which are {machine}"
        )
    if not own_qemu:
        _refuse_to_replace_pieces(environ)
    apt.require_root()
    release = apt.os_release()
    with apt.only_release_sources(release) as options:
        for need in missing:
            say(f"installing {' '.join(need.packages)}: {need.why}")
        apt.refresh(options)
        if missing:
            apt.install(options, [package for need in missing for package in need.packages])
    if not own_qemu:
        _install_qemu(release, environ)


def _absent(need: Need, installed: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(package for package in need.packages if package not in installed)


def _refuse_to_replace_pieces(environ: Mapping[str, str]) -> None:
    older = [name for name, version in apt.versions(QEMU_PIECES).items() if qemu.upstream(version) < qemu.MINIMUM]
    if older and not qemu.wants_upgrade(environ):
        raise Refusal(
            f"a QEMU older than {qemu.MINIMUM_TEXT} is installed in part ({', '.join(older)}), and was left alone. "
            "Either allow its upgrade with EMP_UPGRADE_QEMU=1 (docs/setup.md says how to go back), "
            f"or name another with EMP_QEMU=/path/to/{qemu.BINARY}"
        )


def _install_qemu(release: Mapping[str, str], environ: Mapping[str, str]) -> None:
    suite = _suite_of_qemu(release)
    if there := shutil.which(qemu.BINARY):
        say(f"this replaces {there}, as EMP_UPGRADE_QEMU allows")
    with apt.only_release_sources(release) as options:
        apt.install([*options, *(["-t", suite] if suite else [])], QEMU.packages)
    if qemu.choose({**environ, "EMP_UPGRADE_QEMU": ""}) is None:
        raise Refusal(f"QEMU was installed, yet {qemu.BINARY} is not on PATH: is /usr/bin in it?")


def _suite_of_qemu(release: Mapping[str, str]) -> str | None:
    """Return the suite that QEMU has to be asked of by name, None where the release's own candidate is new enough.

    Adds the backports suite to the machine's sources if it is needed and not there.
    """
    name = QEMU.packages[0]
    with apt.only_release_sources(release) as options:
        own = apt.candidate(options, name)
    if qemu.upstream(own) >= qemu.MINIMUM:
        say(f"installing {' '.join(QEMU.packages)} {own}: {QEMU.why}")
        return None
    codename = release.get("VERSION_CODENAME", "")
    if release.get("ID") != "debian" or not codename:
        raise Refusal(
            f"{release.get('PRETTY_NAME', 'this system')} offers QEMU {own}, and EMP needs {qemu.MINIMUM_TEXT} "
            f"or newer: use Debian 12 or newer, or name one with EMP_QEMU=/path/to/{qemu.BINARY}"
        )
    suite = f"{codename}-backports"
    if sources.backports(sources.read_sources(), codename) is None:
        _add_backports(codename)
    with apt.only_release_sources(release) as options:
        apt.refresh(options)
        theirs = apt.candidate(options, name, suite)
    if qemu.upstream(theirs) < qemu.MINIMUM:
        raise Refusal(
            f"EMP needs QEMU {qemu.MINIMUM_TEXT} or newer, but {codename} has {own} and {suite} has {theirs}: "
            f"see that {suite} can be reached, or name one with EMP_QEMU=/path/to/{qemu.BINARY}"
        )
    say(f"installing {' '.join(QEMU.packages)} {theirs} from {suite} ({codename} itself has {own}): {QEMU.why}")
    return suite


def _add_backports(codename: str) -> None:
    """Write the one file that this set-up leaves in the machine's configuration."""
    text = sources.derive_backports(sources.read_sources(), codename)
    target = sources.ETC_APT / "sources.list.d" / sources.OURS
    say(f"adding the suite {codename}-backports in {target}: the release's own QEMU is too old")
    with tempfile.NamedTemporaryFile("w", prefix="emp-setup-", suffix=".sources") as draft:
        draft.write(text)
        draft.flush()
        quietly(apt.rootly(["install", "-m", "644", draft.name, str(target)]), doing=f"writing {target}")
