"""The steps of the set-up, in order. Called by ``scripts/setup``; ``--dev`` and ``--test`` add what the tests need."""

from __future__ import annotations

import argparse
import fcntl
import subprocess
import sys
from pathlib import Path

from emp_setup import apt, environment, packages, privilege
from emp_setup.console import Refusal, refuse, say

MISSING_DEPENDENCY = 10
"""Exit status of ``emp`` where the machine lacks something: here, a package that could not be fetched."""


def main() -> int:
    """Do what is not done yet; return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/setup", description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also install the tools of `make test` and `make lint`")
    parser.add_argument("--test", action="store_true", help="with --dev: also the guest image `debian`, made as root")
    arguments = parser.parse_args()
    with Path(__file__).open() as lock:
        _alone(lock.fileno())
        try:
            extra = [packages.DEVELOPMENT, packages.PODS] if arguments.dev else []
            packages.ensure(extra=[*extra, *environment.needs()])
            environment.ensure(development=arguments.dev)
            status = _made("emp.lab.images") or _made("emp.lab.nfs_program")
            if arguments.test and not status:
                # Not by the test that boots it: tests have no network beyond their own.
                status = _made("emp.lab.debian", as_root="an image is built of Debian packages")
            return status
        except Refusal as refusal:
            return refuse(refusal)
        except KeyboardInterrupt:
            return refuse(Refusal("interrupted; the next run goes on from here"))


def _alone(descriptor: int) -> None:
    """Wait for another set-up of this checkout to end."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another set-up of this checkout")
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _made(module: str, *, as_root: str | None = None) -> int:
    """Have a module of the lab fetch and build what it needs, unless that is there; it says for itself what it does.

    ``as_root``: why it needs root.
    """
    make = [str(environment.PYTHON), "-m", module]
    if as_root:
        make = privilege.as_root(make, as_root)
    status = subprocess.run(make, stdout=subprocess.DEVNULL, check=False).returncode
    if status == MISSING_DEPENDENCY:
        say("refreshing the package lists, which may be absent or outdated, to try once more")
        with apt.only_release_sources(apt.os_release()) as options:
            apt.refresh(options)
        status = subprocess.run(make, stdout=subprocess.DEVNULL, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
