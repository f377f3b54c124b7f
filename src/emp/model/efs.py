"""Mounts of EFS file systems: NFS that the guest mounts itself, over its own address. Nothing is attached to a node."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from emp.model.base import Model
from emp.model.errors import BadInput
from emp.model.names import Ip

MOUNT_OPTIONS = "vers=4.1,rsize=1048576,wsize=1048576,hard,timeo=600,retrans=2,noresvport"
"""What AWS recommends: https://docs.aws.amazon.com/efs/latest/ug/mounting-fs-nfs-mount-settings.html

``hard``: a server that is away makes I/O wait and never fail; ``noresvport``: a connection that is made anew may come
from another port.
"""
MOUNT_ROOT = "/efs"
ID_RULE = "an id is fs- and 8 to 40 hexadecimal digits"
_ID = re.compile(r"fs-[0-9a-f]{8,40}")
_PATH = re.compile(r"(/[A-Za-z0-9._+-]{1,255})+|/")
LONGEST_PATH = 200


class EfsMount(Model):
    """One file system in one EVM, as its record has it from its first boot on: both ends of a migration read it."""

    file_system: str = Field(pattern=_ID.pattern)
    path: str = "/"
    """directory of the file system that is mounted"""
    address: Ip
    """of the mount target that the guest speaks to, wherever the EVM goes"""

    @field_validator("path")
    @classmethod
    def _clean(cls, value: str) -> str:
        return check_path(value)

    @property
    def mount_point(self) -> str:
        """Where the guest has it."""
        return f"{MOUNT_ROOT}/{self.file_system}"


def parse_mount(text: str, *, field: str) -> tuple[str, str]:
    """Read ``fs-ID[:/PATH]``; return id and path. Raises ``BadInput``."""
    file_system, colon, path = text.partition(":")
    if not _ID.fullmatch(file_system):
        raise BadInput(f"{file_system[:60]!r} is not the id of a file system", field=field, hint=ID_RULE)
    if colon and not path.startswith("/"):
        raise BadInput(f"{path[:60]!r} is not a path", field=field, hint="it begins with /, like fs-0123abcd:/data")
    try:
        return file_system, check_path(path or "/")
    except ValueError as error:
        raise BadInput(f"{path[:60]!r}: {error}", field=field, hint="like fs-0123abcd:/data") from None


def check_path(path: str) -> str:
    """Return a path that a guest can mount: it reaches a line of its configuration. Raises ``ValueError``."""
    if len(path) > LONGEST_PATH or not _PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise ValueError(f"a path of an EFS mount has letters, digits and ._+- alone, no .., {LONGEST_PATH} at most")
    return path


class Rule(Model):
    """What a security group lets in, of what matters to NFS."""

    cidr: str | None = None
    group: str | None = None
    """from interfaces that have this group"""


class MountTarget(Model):
    """Where a file system answers NFS in one zone."""

    id: str
    address: Ip
    zone: str
    subnet: str
    vpc: str
    state: str
    groups: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    """of its security groups: those that let TCP port 2049 in"""


class FileSystem(Model):
    """An EFS file system as the cloud has it."""

    id: str
    state: str
    ours: bool = False
    """this pool has made it, and may delete it"""
    targets: tuple[MountTarget, ...] = ()


class NodePlace(Model):
    """Where a node stands in the cloud's network."""

    zone: str
    subnet: str
    vpc: str
    groups: tuple[str, ...] = ()


class EfsFacts(Model):
    """What the cloud says of an EVM's mounts and of the nodes that it may go to."""

    file_systems: tuple[FileSystem, ...] = ()
    """those that are there"""
    places: dict[str, NodePlace] = Field(default_factory=dict)
    """by node"""
    problem: str | None = None
    """why the cloud could not be asked"""

    def find(self, file_system: str) -> FileSystem | None:
        return next((found for found in self.file_systems if found.id == file_system), None)


NO_EFS = EfsFacts()
"""of an EVM without a mount"""
