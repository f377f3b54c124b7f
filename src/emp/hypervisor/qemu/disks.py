"""A volume in QEMU's words, pure: the node that speaks to the storage, the raw node over it, the disk of the guest.

All disks are LUNs of one virtio-scsi controller, present also where there is no volume (design note 0010). The name
of each part follows from the volume's slot and, for the node that speaks to the storage, from what it is opened from.
So an agent that has lost its memory finds out from QEMU alone how far it had come.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emp.hypervisor.base import BlockDevice, RelaySocket
from emp.hypervisor.qemu.rbd import rbd_options
from emp.model.errors import BadInput
from emp.model.evm import MAX_VOLUMES
from emp.model.volume import HostDevice, NbdEndpoint, RbdImage

CONTROLLER = "scsi0"
CREDENTIALS = "volumes"
"""the tls-creds-x509 object"""
NBD_RECONNECT_DELAY_S = 8
"""How long I/O waits for a volume server that went away before it fails and, by ``werror=stop``, pauses the guest.

QEMU tries again 1, 3, 7, 15 and 31 s after the break. It also bounds how long QEMU may be deaf: when the guest is
stopped for the switchover with I/O on its way, QEMU first waits for that I/O, and no monitor answers until then."""
RELAY_RECONNECT_DELAY_S = 600
"""The same for the node's own relay: it may be started anew, and holds I/O for as long as a volume moves."""
_SERIAL = re.compile(r"[A-Za-z0-9_-]{1,20}")
_DIRECT = {"direct": True, "no-flush": False}


@dataclass(frozen=True)
class Handles:
    """By what QEMU reaches the sources that it cannot name by a path, each 0 where it is not needed."""

    fdset: int = 0
    """of a host device"""
    directory: int = 0
    """QEMU's number of the open directory of a relay's socket"""


def check_device(device: BlockDevice) -> None:
    """Raise ``BadInput`` for a volume that cannot be a disk of a machine."""
    if not _SERIAL.fullmatch(device.serial):
        raise BadInput(
            f"{device.serial!r} cannot be a disk's serial", field="serial", hint="1 to 20 letters, digits, - or _"
        )


def check_slot(slot: int) -> None:
    """Raise ``BadInput`` for a place that no machine has."""
    if not 0 <= slot < MAX_VOLUMES:
        raise BadInput(f"{slot} is no place for a volume", field="slot", hint=f"0 to {MAX_VOLUMES - 1}")


def disk_name(slot: int) -> str:
    return f"disk{slot}"


def raw_name(slot: int) -> str:
    return f"volume{slot}"


def source_prefix(slot: int) -> str:
    """Return how the name of every node begins that speaks to the storage of that slot's volume."""
    return f"source{slot}-"


def source_name(slot: int, device: BlockDevice) -> str:
    """Return the node's name; another source, or another size, has another one.

    The size is in it because an NBD client learns it when it connects, and never again.
    """
    source = device.source
    fields = {"path": str(source.path)} if isinstance(source, RelaySocket) else source.model_dump(mode="json")
    told = json.dumps([type(source).__name__, fields, device.size_bytes], sort_keys=True)
    return source_prefix(slot) + hashlib.sha256(told.encode()).hexdigest()[:12]


def controller(queues: int) -> dict[str, Any]:
    """Return the device that all disks hang on, without its place on the bus."""
    return {"driver": "virtio-scsi-pci", "id": CONTROLLER, "num_queues": queues}


def disk(slot: int, device: BlockDevice) -> dict[str, Any]:
    """Return the disk. What the guest sees of it is said here, so that nothing follows from the storage behind it.

    The geometry, which nobody uses, is said because QEMU would read the volume's first sector for it.
    """
    return {
        "driver": "scsi-hd",
        "id": disk_name(slot),
        "bus": f"{CONTROLLER}.0",
        "channel": 0,
        "scsi-id": 0,
        "lun": slot,
        "drive": raw_name(slot),
        "serial": device.serial,
        "device_id": device.serial,
        "logical_block_size": 512,
        "physical_block_size": 512,
        "cyls": 16383,
        "heads": 255,
        "secs": 63,
        "write-cache": "on",
        "werror": "stop",
        "rerror": "stop",
    }


def raw_node(slot: int, device: BlockDevice) -> dict[str, Any]:
    """Return the node that the disk is plugged into, as big as the volume's record says."""
    return {
        "driver": "raw",
        "node-name": raw_name(slot),
        "size": device.size_bytes,
        "file": source_name(slot, device),
        "cache": _DIRECT,
    }


def source_node(slot: int, device: BlockDevice, handles: Handles) -> dict[str, Any]:
    """Return the node that speaks to the storage.

    None of them has image locks: that only the owner writes is for the volume service to enforce.
    """
    node: dict[str, Any] = {"node-name": source_name(slot, device), "cache": _DIRECT}
    match device.source:
        case NbdEndpoint() as endpoint:
            return node | {
                "driver": "nbd",
                "server": {"type": "inet", "host": endpoint.host, "port": str(endpoint.port)},
                "export": endpoint.export,
                "tls-creds": CREDENTIALS,
                "tls-hostname": endpoint.tls_hostname,
                "reconnect-delay": NBD_RECONNECT_DELAY_S,
            }
        case RbdImage() as image:
            return node | rbd_options(image)
        case RelaySocket(path=path):
            return node | {
                "driver": "nbd",
                "server": {"type": "unix", "path": f"/proc/self/fd/{handles.directory}/{path.name}"},
                "export": "",
                "reconnect-delay": RELAY_RECONNECT_DELAY_S,
            }
        case HostDevice():
            return node | {
                "driver": "host_device",
                "filename": f"/dev/fdset/{handles.fdset}",
                "aio": "native",
                "locking": "off",
            }


def file_of(stats: Mapping[str, Any]) -> str | None:
    """Return the name of the node below a raw node, from its ``query-blockstats``."""
    below = stats.get("parent", {}).get("node-name")
    return str(below) if below else None
