"""The file that a volume's data is in: made sparse, or from an image, and grown. What returns is on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from emp.host.run import run_sync
from emp.model.errors import BadInput, CommandFailed, Refused
from emp.model.names import format_size

COPY_S = 300.0


def copy_image(source: Path, path: Path, size_bytes: int) -> None:
    """Make it from an image, its rest zeros; whatever a copy that was cut short has left is overwritten.

    Raise ``BadInput`` for less than the image needs, ``Refused`` where there is no room.
    """
    if size_bytes < (needed := source.stat().st_size):
        raise BadInput(
            f"{format_size(size_bytes)} are less than the image {source.stem} needs",
            field="size_bytes",
            hint=f"at least {format_size(needed)}",
        )
    path.unlink(missing_ok=True)
    make_sparse(path, 0)
    try:
        # shares the blocks where the file system can
        run_sync("cp", "--reflink=auto", "--sparse=always", "--", str(source), str(path), timeout_s=COPY_S)
    except CommandFailed as error:
        path.unlink(missing_ok=True)
        raise Refused(f"cannot copy the image {source.stem}: {error.message}", field="image") from error
    grow(path, size_bytes)


def make_sparse(path: Path, size_bytes: int) -> None:
    """Raise ``BadInput`` for more than a file can hold, ``Refused`` where there is no room."""
    try:
        with path.open("xb") as image:
            os.fchmod(image.fileno(), 0o600)
            os.truncate(image.fileno(), size_bytes)
            os.fsync(image.fileno())
    except FileExistsError:  # left by a daemon that was killed before it had recorded the volume: nobody wrote to it
        os.truncate(path, size_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno == errno.EFBIG:
            raise BadInput(f"{size_bytes} bytes are more than a file here can hold", field="size_bytes") from error
        raise Refused(f"cannot make a volume of {size_bytes} bytes: {error.strerror}", field="size_bytes") from error


def grow(path: Path, size_bytes: int) -> None:
    """Raise ``Refused`` where there is no room."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size < size_bytes:  # else: by a daemon that was killed before its record
                os.ftruncate(descriptor, size_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Refused(f"cannot grow it to {size_bytes} bytes: {error.strerror}", field="size_bytes") from error
