"""Which QEMU: the one named, the one there, or one to install.

A QEMU that is already there is never replaced silently.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Mapping

from emp_setup.console import Refusal

BINARY = "qemu-system-x86_64"
MINIMUM = (10, 0)
MINIMUM_TEXT = ".".join(map(str, MINIMUM))


def version_of(binary: str) -> tuple[int, int]:
    """Return major and minor version that ``binary --version`` reports.

    :raises Refusal: it does not run, or does not say that it is QEMU
    """
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Refusal(f"{binary} cannot be run: {exc}") from exc
    found = re.search(r"QEMU emulator version (\d+)\.(\d+)", done.stdout)
    if not found:
        raise Refusal(f"{binary} does not answer --version as {BINARY} does: is it QEMU?")
    return int(found[1]), int(found[2])


def choose(
    environ: Mapping[str, str],
    *,
    which: Callable[[str], str | None] = shutil.which,
    version: Callable[[str], tuple[int, int]] = version_of,
) -> str | None:
    """Return the path of the QEMU to use, or None where one has to be installed.

    :raises Refusal: the one that is named or there is too old, and replacing it was not asked for
    """
    named = environ.get("EMP_QEMU")
    if named:
        path = which(named)
        if path is None:
            raise Refusal(f"EMP_QEMU={named} is no program: name a {BINARY} of version {MINIMUM_TEXT} or newer")
        if version(path) < MINIMUM:
            raise Refusal(
                f"EMP_QEMU={named} is QEMU {_text(version(path))}, and EMP needs {MINIMUM_TEXT} or newer: "
                "name a newer one"
            )
        return path
    path = which(BINARY)
    if path is None or version(path) >= MINIMUM:
        return path
    if wants_upgrade(environ):
        return None
    raise Refusal(
        f"{path} is QEMU {_text(version(path))}, and EMP needs {MINIMUM_TEXT} or newer. It was left alone. "
        "Either allow its upgrade with EMP_UPGRADE_QEMU=1 (docs/setup.md says how to go back), "
        f"or name another with EMP_QEMU=/path/to/{BINARY}"
    )


def wants_upgrade(environ: Mapping[str, str]) -> bool:
    """Whether the user has allowed that an older QEMU is replaced."""
    return environ.get("EMP_UPGRADE_QEMU", "") not in ("", "0")


def upstream(package_version: str) -> tuple[int, int]:
    """Return (10, 0) for a Debian version such as ``1:10.0.2+ds-2+deb13u1~bpo12+1``; (0, 0) for ``(none)``."""
    found = re.match(r"(?:\d+:)?(\d+)\.(\d+)", package_version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
