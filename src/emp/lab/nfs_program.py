"""Fetches nfs-ganesha, the NFS server of a lab's EFS, and keeps it in the cache; the machine is left as it is.

Its Debian package would start an NFS server and a port mapper on every address of the machine that it is installed on,
so it is unpacked aside like the guest's kernel, with the libraries that the machine lacks.

``python -m emp.lab.nfs_program`` fetches it by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emp.lab.images import Notice, default_cache, publish, run_tool, unpack_package
from emp.model.errors import MissingDependency

PACKAGES = ("nfs-ganesha", "nfs-ganesha-vfs")
FORMAT = 1
"""Counts changes of how the packages are unpacked."""
_NEED = "the packages nfs-ganesha and nfs-ganesha-vfs are needed: check the apt sources, run apt-get update, try again"
_NOT_RUN = frozenset({"rpcbind", "nfs-common", "keyutils", "dbus"})
"""what the package wants beside it; with NFS 4 alone none of it is used"""


@dataclass(frozen=True)
class NfsProgram:
    """An unpacked nfs-ganesha: the root of its files."""

    home: Path

    @property
    def binary(self) -> Path:
        return self.home / "usr/bin/ganesha.nfsd"

    @property
    def plugins(self) -> Path:
        return next(self.home.glob("usr/lib/*/ganesha"))

    @property
    def library_path(self) -> str:
        """What ``LD_LIBRARY_PATH`` has to be."""
        return ":".join(str(path) for path in (self.home / "usr/lib/ganesha", self.plugins.parent))


def ensure_nfs_program(cache: Path | None = None, *, notice: Notice = lambda line: None) -> NfsProgram:
    """Return the program, from the cache if it is there. Raises MissingDependency when it cannot be had."""
    home = (cache or default_cache()) / f"nfs-ganesha-{FORMAT}"
    if not home.is_dir():
        notice("downloading nfs-ganesha (about 1 MB): it serves the lab's EFS file systems")
        publish(home, _unpack)
    return NfsProgram(home)


def _unpack(target: Path) -> None:
    versions = {package: unpack_package(package, target) for package in _wanted()}
    if not (target / "usr/bin/ganesha.nfsd").exists():
        raise MissingDependency(f"{PACKAGES[0]} has no ganesha.nfsd", hint=_NEED)
    (target / "versions.json").write_text(json.dumps(versions, indent=1))


def _wanted() -> list[str]:
    """Return the packages that an installation would bring here, without those that are not run."""
    plan = run_tool(["apt-get", "install", "-s", "--no-install-recommends", *PACKAGES], need=_NEED)
    brought = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    return [*PACKAGES, *(name for name in brought if name not in {*PACKAGES, *_NOT_RUN})]


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch it; prints where it is."""
    try:
        program = ensure_nfs_program(notice=lambda line: print(line, file=sys.stderr, flush=True))
    except MissingDependency as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(program.home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
