"""Private files (keys, tokens): written atomically, 0600 in a directory 0700, and refused when others can read them."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from emp.model.errors import AlreadyExists, BadInput, NotFound

CA_CERT = "ca-cert.pem"
IDENTITY = "identity.pem"
"""certificate and key of one daemon in one file, so that a renewal replaces the pair in one rename"""

Owner = tuple[int, int]
"""uid, gid"""


def make_private_dir(path: Path, *, owner: Owner | None = None) -> None:
    """Make ``path`` (and its parents) a directory of mode 0700, also when it already exists."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    if owner is not None:
        os.chown(path, *owner, follow_symlinks=False)


def write_private(path: Path, data: bytes, *, owner: Owner | None = None, mode: int = 0o600, new: bool = False) -> None:
    """Put ``data`` at ``path`` durably: a reader sees the whole old or the whole new file, never another mode or owner.

    ``new=True`` refuses to replace: ``AlreadyExists``.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            if owner is not None:
                os.fchown(descriptor, *owner)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        if new:
            os.link(scratch, path)  # unlike rename, fails when the name is taken
        else:
            scratch.replace(path)
    except FileExistsError:
        raise AlreadyExists(f"{path} exists", hint="remove it first if it is really no longer needed") from None
    finally:
        scratch.unlink(missing_ok=True)
    _sync_directory(path.parent)


def read_private(path: Path) -> bytes:
    """Return the bytes of a private file; ``NotFound`` without it, ``BadInput`` when group or others can read it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadInput(f"{path} is not a plain file")
        if status.st_mode & 0o077:
            raise BadInput(
                f"{path} can be read by others (mode {status.st_mode & 0o777:04o})", hint=f"chmod 600 {path}"
            )
        return file.read()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
