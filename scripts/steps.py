"""The steps of the set-up, in order. Called by ``scripts/setup``; ``--dev`` adds what the tests need."""

from __future__ import annotations

import argparse
import fcntl
import subprocess
import sys
from pathlib import Path

from emp_setup import apt, environment, packages
from emp_setup.console import Refusal, refuse, say

MISSING_DEPENDENCY = 10
"""Exit status of ``emp`` where the machine lacks something: here, a package that could not be fetched."""


def main() -> int:
    """Do what is not done yet; return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/setup", description=__doc__)
    parser.add_argument("--dev", action="store_true", help="also install the tools of `make test` and `make lint`")
    arguments = parser.parse_args()
    with Path(__file__).open() as lock:
        _alone(lock.fileno())
        try:
            extra = [packages.DEVELOPMENT, packages.PODS] if arguments.dev else []
            packages.ensure(extra=[*extra, *environment.needs()])
            environment.ensure(development=arguments.dev)
            return _made("emp.lab.images") or _made("emp.lab.nfs_program")
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


def _made(module: str) -> int:
    """Have a module of the lab fetch and build what it needs, unless that is there; it says for itself what it does."""
    make = [str(environment.PYTHON), "-m", module]
    status = subprocess.run(make, stdout=subprocess.DEVNULL, check=False).returncode
    if status == MISSING_DEPENDENCY:
        say("refreshing the package lists, which may be absent or outdated, to try once more")
        with apt.only_release_sources(apt.os_release()) as options:
            apt.refresh(options)
        status = subprocess.run(make, stdout=subprocess.DEVNULL, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
