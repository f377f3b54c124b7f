"""Compiles the daemons' Python before they start: in a place nothing could keep what each of them would compile."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import cache_from_source, find_spec
from pathlib import Path

LIBRARIES = ("fastapi", "starlette", "pydantic", "uvicorn", "anyio", "httpx2", "cryptography", "pyroute2", "qemu.qmp")


def ensure() -> None:
    """Compile what is not compiled, as the user whose files they are. A failure only costs time, and is let pass."""
    for directory in (Path(__file__).parents[1], *_library_directories()):
        if any(map(_stale, directory.rglob("*.py"))):
            owner = directory.stat()
            root = os.geteuid() == 0
            subprocess.run(
                [sys.executable, "-m", "compileall", "-q", str(directory)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
                user=owner.st_uid if root else None,
                group=owner.st_gid if root else None,
            )


def _library_directories() -> list[Path]:
    found = []
    for name in LIBRARIES:
        spec = find_spec(name)
        if spec is not None and spec.origin and _stale(Path(spec.origin)):  # one file stands for the package
            found.append(Path(spec.origin).parent)
    return found


def _stale(source: Path) -> bool:
    try:
        return Path(cache_from_source(str(source))).stat().st_mtime < source.stat().st_mtime
    except OSError:
        return True
