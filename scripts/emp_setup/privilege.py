"""Becoming root for the two things that need it: installing packages, and running the lab."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from emp_setup.console import Refusal

KEPT = ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "CI")
"""Variables that cross sudo beside all of ``EMP_*``: they say how to print."""


def as_root(
    command: Sequence[str],
    why: str,
    *,
    euid: Callable[[], int] = os.geteuid,
    which: Callable[[str], str | None] = shutil.which,
    environ: Mapping[str, str] = os.environ,
) -> list[str]:
    """Return ``command`` as it has to be run to run as root: as it is for root, else through sudo.

    :param why: completes "root is needed: ..."
    :raises Refusal: neither root nor sudo
    """
    if euid() == 0:
        return list(command)
    if which("sudo") is None:
        raise Refusal(
            f"root is needed: {why}. You are not root and there is no sudo here: "
            "run the same command as root, or have sudo installed"
        )
    # The guest image was built by the user: root is to find it, not to build its own.
    environ = {"EMP_CACHE": str(Path.home() / ".cache" / "emp"), **environ}
    # `env` and not --preserve-env: the latter needs a permission of its own (SETENV) in sudoers.
    kept = [f"{name}={environ[name]}" for name in sorted(environ) if name.startswith("EMP_") or name in KEPT]
    return ["sudo", "--", "env", *kept, *command]
