"""What a relay is told at its start, and where it stands: one private JSON file, so that a restart goes on from there.

The manager writes it once; from then on the relay alone does, before it acts on an order. Nothing of it has to outlive
the node.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emp.model.errors import BadInput
from emp.wire.files import read_private, write_private


@dataclass(frozen=True)
class UnixListen:
    """For QEMU: plain NBD, the default export. Who may reach the socket is decided by its directory."""

    unix: str


@dataclass(frozen=True)
class TlsListen:
    """For another node's relay and agent: NBD under TLS."""

    host: str
    port: int
    """0: any, and the relay writes down which"""
    peer: str
    """the common name that a client's certificate must have"""
    export: str


@dataclass(frozen=True)
class Endpoint:
    """``emp.model.volume.NbdEndpoint``, without what makes that slow to import."""

    host: str
    port: int
    export: str
    tls_hostname: str


@dataclass(frozen=True)
class Device:
    """A block device of this node."""

    device: str


Upstream = Endpoint | Device


@dataclass(frozen=True)
class RelayConfig:
    listen: UnixListen | TlsListen
    size_bytes: int
    upstream: Upstream | None
    """None: there is none yet, and clients wait"""
    tls_dir: str
    """credentials for both ends"""
    control: str
    """unix socket of the orders"""
    pid_file: str
    """holds the pid, and is locked, while the relay runs"""
    writes_open: bool
    """False: writes wait until ``open``"""
    held_since_s: float | None = None
    """wall clock; None: not held"""
    is_flushed: bool = False
    """held, with nothing outstanding and nothing unflushed"""
    flags: int | None = None
    """what was announced to clients, so that no later upstream can do less; None: nothing yet"""

    def save(self, path: Path) -> None:
        write_private(path, json.dumps(asdict(self), indent=1).encode())


def load(path: Path) -> RelayConfig:
    """Read the file; ``NotFound`` without it, ``BadInput`` if it is not one of ours."""
    try:
        said: dict[str, Any] = json.loads(read_private(path))
        return RelayConfig(**said | {"listen": _listen(said["listen"]), "upstream": parse_upstream(said["upstream"])})
    except (ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path} is no configuration of a relay: {error}", field="--config") from error


def _listen(said: dict[str, Any]) -> UnixListen | TlsListen:
    return UnixListen(**said) if "unix" in said else TlsListen(**said)


def parse_upstream(said: dict[str, Any] | None) -> Upstream | None:
    """Raise ``TypeError`` if it is none."""
    if said is None:
        return None
    return Device(**said) if "device" in said else Endpoint(**said)
