"""What people and their tools say to the controller: the bodies of its REST API that are not nouns of the pool already.

=============================================  ===========================================  ==========================
``GET    /healthz``                            -> ``Health`` (no token)
``GET    /metrics``                            -> Prometheus text
``GET    /v1/nodes``                           -> ``Listing[Node]``
``GET    /v1/nodes/{name}``                    -> ``Node``
``POST   /v1/nodes/{name}/cordon``             -> ``Node``                                  takes nothing new
``POST   /v1/nodes/{name}/uncordon``           -> ``Node``
``POST   /v1/nodes/{name}/fence``              ``FenceRequest`` -> ``Node``                 proven off
``POST   /v1/nodes/{name}/readmit``            ``ReadmitRequest`` -> ``Node``               its journal counts again
``GET    /v1/evms``                            -> ``Listing[Evm]``
``POST   /v1/evms``                            ``EvmCreate`` -> ``Evm`` (201)               once its QEMU runs
``GET    /v1/evms/{name}``                     -> ``Evm``
``POST   /v1/evms/{name}/start``               ``EvmStart`` -> ``Evm``                      cold start
``POST   /v1/evms/{name}/recover``             ``EvmStart`` -> ``Evm``                      behind fences (R8)
``POST   /v1/evms/{name}/stop``                ``EvmStop`` -> ``Evm``
``DELETE /v1/evms/{name}?grace_s=``            -> nothing (204)
``POST   /v1/evms/{name}/volumes``             ``VolumeAttach`` -> ``Evm``                  plugged if it runs
``DELETE /v1/evms/{name}/volumes/{id}?in_use=``  -> ``Evm``                                 unplugged if it runs
``GET    /v1/evms/{name}/console``             -> bytes, for as long as the EVM lives       follows its migrations
``POST   /v1/evms/{name}/console``             bytes -> nothing (204)
``POST   /v1/evms/{name}/migrations``          ``MigrationRequest`` -> ``Migration`` (201)  200 for a dry run
``GET    /v1/migrations?evm=``                 -> ``Listing[Migration]``                    newest first
``GET    /v1/migrations/{id}``                 -> ``Migration``                             with live progress
``GET    /v1/migrations/{id}/events``          -> SSE of ``Migration``                      ends when it is closed
``POST   /v1/migrations/{id}/abort``           ``AbortRequest`` -> ``Migration``            back on the source
``GET    /v1/volumes``                         -> ``Listing[Volume]``
``POST   /v1/volumes``                         ``VolumeCreate`` -> ``Volume`` (201)
``GET    /v1/volumes/{id}``                    -> ``Volume``
``DELETE /v1/volumes/{id}``                    -> nothing (204)
``POST   /v1/volumes/{id}/resize``             ``VolumeResize`` -> ``Volume``               the guest sees it
``GET    /v1/efs``                             -> ``Listing[FileSystem]``                   made by this pool
``POST   /v1/efs``                             -> ``FileSystem`` (201)
``GET    /v1/efs/{id}``                        -> ``FileSystem``
``DELETE /v1/efs/{id}``                        -> nothing (204)
``GET    /v1/watch?prefix=/evms/&from=REV``    -> SSE of ``WatchEvent``                     every change after REV
=============================================  ===========================================  ==========================

Everything but ``/healthz`` needs ``Authorization: Bearer TOKEN``. An error's body is ``EmpError.as_dict()``.
Server-sent events: ``id`` is a revision of the store; after a broken connection send it back as ``Last-Event-ID`` (or
``from=``) and nothing is missed, over a restart of the controller too. Only an event that carries an ``id`` ends its
revision. The stream of one migration has the event names ``migration`` and, at the end, nothing: it closes after the
snapshot whose ``stage`` is ``closed``. What goes wrong in a stream that has begun is one last event named ``error``,
with the error's body as its data.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import Field

from emp.model.base import Model
from emp.model.evm import RestartPolicy
from emp.model.names import Name, SizeBytes
from emp.model.volume import VolumeType

T = TypeVar("T")

CREATE_MEMORY_BYTES = 512 << 20
CREATE_IMAGE = "micro"


class Listing(Model, Generic[T]):
    """A list, and the store's revision at which it stood: ``/v1/watch?from=`` that revision misses no change."""

    items: tuple[T, ...]
    revision: int


class Health(Model):
    """``status`` is ``ok``; a controller that cannot reach its store answers 503 instead."""

    status: Literal["ok"] = "ok"
    pool: str
    version: str
    revision: int
    """of the store"""
    nodes: int
    nodes_ready: int


class EvmCreate(Model):
    """Body of ``POST /v1/evms``. What is not said is chosen: node, addresses, MACs, machine type, CPU model."""

    name: Name
    memory_bytes: SizeBytes = CREATE_MEMORY_BYTES
    """bytes, or a text such as ``512MiB``"""
    vcpus: int = Field(default=1, ge=1, le=255)
    image: Name = CREATE_IMAGE
    node: Name | None = None
    """None: placement picks"""
    nics: int = Field(default=1, ge=1, le=8)
    """network cards, each with an address of its own; pods sit behind the first"""
    ipv6: tuple[str, ...] = Field(default=(), max_length=8)
    """IPv6 addresses of the first cards: each an address or ``auto``, beside the card's IPv4 address"""
    pods: tuple[str, ...] = Field(default=(), max_length=128)
    """each ``NAME[=ADDRESS[,ADDRESS]]``: one of IPv4 (left out, the pool chooses one), one of IPv6 or ``auto``, for
    which the pool chooses one (left out, it has none)"""
    root: str | None = None
    """the disk that it boots from, for an image with one: ``TYPE:SIZE`` (made from the image, deleted with the EVM) or
    an id; it is the first of the EVM's volumes"""
    volumes: tuple[str, ...] = Field(default=(), max_length=16)
    """each ``TYPE:SIZE`` (made now, deleted with the EVM) or the id of a volume that exists"""
    efs: tuple[str, ...] = Field(default=(), max_length=8)
    """each ``fs-ID`` or ``fs-ID:/PATH``: an EFS file system that the guest mounts at ``/efs/fs-ID``"""
    cpu_model: str | None = Field(default=None, max_length=64)
    """a named model; None: the pool's default, which runs on every ready node"""
    restart: RestartPolicy = RestartPolicy.ON_FAILURE


class EvmStart(Model):
    """Body of ``POST /v1/evms/{name}/start``."""

    node: Name | None = None
    """None: where it was, or, if that node does not fit any more, where placement says"""


class EvmStop(Model):
    """Body of ``POST /v1/evms/{name}/stop``."""

    grace_s: float = Field(default=20.0, ge=0, le=600)
    """time that the guest gets after the power button; 0 = power off at once"""


class FenceRequest(Model):
    """Body of ``POST /v1/nodes/{name}/fence``."""

    confirm: bool = False
    """False: 422, and its message says what would be done"""
    reason: str = Field(default="asked by a person", min_length=1, max_length=200)


class ReadmitRequest(Model):
    """Body of ``POST /v1/nodes/{name}/readmit``."""

    confirm: bool = False
    """False: 422, and its message says what it would mean"""


class AbortRequest(Model):
    """Body of ``POST /v1/migrations/{id}/abort``."""

    reason: str = Field(default="asked by a person", min_length=1, max_length=200)


class VolumeCreate(Model):
    """Body of ``POST /v1/volumes``: one to make (``size_bytes``), or ``shared`` storage that is there (``url``)."""

    type: VolumeType = VolumeType.IO2
    size_bytes: SizeBytes | None = None
    """with ``url``: None where it can be read"""
    url: str | None = Field(default=None, max_length=512)
    image: Name | None = None
    """what it is made from; None: zeros"""


class VolumeAttach(Model):
    """Body of ``POST /v1/evms/{name}/volumes``."""

    volume: str = Field(max_length=200)
    """id of a volume that no EVM has"""


class VolumeResize(Model):
    """Body of ``POST /v1/volumes/{id}/resize``."""

    size_bytes: SizeBytes
    """volumes only grow"""


class WatchEvent(Model):
    """One change of one record, as ``/v1/watch`` tells it; ``value`` is the noun as JSON, None after a deletion."""

    kind: Literal["put", "delete"]
    key: str
    """such as ``/evms/web``"""
    revision: int
    last: bool
    """the last change of its revision; resume only from the revision of such an event"""
    value: dict[str, Any] | None = None
