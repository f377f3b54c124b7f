"""LaunchPlan -> QEMU's argv: pure, no shell, JSON wherever QEMU takes it.

Everything that the guest can see follows from ``EvmSpec`` (and the order of its volumes) alone, never from the node, so
that source and target of a migration offer the same machine. QEMU is given descriptors instead of paths: its files are
``/proc/self/fd/N`` and its sockets are inherited.

``pc-i440fx`` rather than q35: on it a device can be plugged later into any free slot of ``pci.0``, while on q35 each
needs a root port of its own in advance, one more device to load in the blackout (8 volumes: 38 ms instead of 57 ms of
QEMU downtime, medians of 6 under TCG). It also boots faster (firmware to kernel 0.08 s).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emp.hypervisor.base import BlockDevice, LaunchPlan
from emp.hypervisor.qemu.guest_config import FW_CFG_NAME
from emp.model.errors import BadInput
from emp.model.names import check_name
from emp.model.volume import NbdEndpoint

FIRST_NIC_SLOT, MAX_NICS = 4, 4
FIRST_VOLUME_SLOT, MAX_VOLUMES = 8, 24
MAX_QUEUES = 4
MEBIBYTE = 1 << 20
MINIMUM_MEMORY_BYTES = 64 * MEBIBYTE
NBD_RECONNECT_DELAY_S = 8
"""How long I/O waits for a volume server that went away before it fails and, by ``werror=stop``, pauses the guest.

QEMU tries again 1, 3, 7, 15 and 31 s after the break. It also bounds how long QEMU may be deaf: when the guest is
stopped for the switchover with I/O on its way, QEMU first waits for that I/O, and no monitor answers until then."""
_MACHINE = re.compile(r"pc-i440fx-\d+\.\d+")
_CPU_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SERIAL = re.compile(r"[A-Za-z0-9_-]{1,20}")
_TAP_FEATURES_OF_THE_HOST = ("guest_ufo", "host_ufo", "guest_uso4", "guest_uso6", "host_uso")
"""virtio-net features that QEMU offers only where the host's kernel has them: off, or nodes would differ."""


@dataclass(frozen=True)
class Descriptors:
    """Numbers of the descriptors that the process inherits."""

    directory: int
    """of the machine's run directory, with ``config`` and ``tls``"""
    kernel: int
    initrd: int
    sockets: Mapping[str, int]
    """listening: control, cancel, guard, console"""
    taps: tuple[int, ...] = field(default=())

    def all(self) -> tuple[int, ...]:
        return (self.directory, self.kernel, self.initrd, *self.sockets.values(), *self.taps)


def tls_directory(directory_fd: int) -> str:
    """Return the path by which the machine itself finds its certificate."""
    return f"/proc/self/fd/{directory_fd}/tls"


def check_plan(plan: LaunchPlan) -> None:
    """Raise ``BadInput``, naming the field, for a plan that no QEMU command line can be made of."""
    spec = plan.spec
    check_name(spec.name)
    if not _MACHINE.fullmatch(spec.machine):
        raise BadInput(f"{spec.machine!r} is not a machine type of this driver", field="machine", hint="pc-i440fx-X.Y")
    if not _CPU_MODEL.fullmatch(spec.cpu_model) or spec.cpu_model in ("host", "max"):
        raise BadInput(
            f"{spec.cpu_model!r} is not a named CPU model", field="cpu_model", hint="one that all nodes have"
        )
    if spec.memory_bytes % MEBIBYTE or spec.memory_bytes < MINIMUM_MEMORY_BYTES:
        raise BadInput(f"{spec.memory_bytes} bytes", field="memory_bytes", hint="whole MiB, and at least 64 MiB")
    if "\0" in plan.kernel_command_line:
        raise BadInput("has a NUL", field="kernel_command_line", hint="leave it out")
    if len(plan.tap_fds) != len(spec.nics):
        raise BadInput(f"{len(plan.tap_fds)} taps for {len(spec.nics)} NICs", field="tap_fds", hint="one per NIC")
    if len(spec.nics) > MAX_NICS:
        raise BadInput(f"{len(spec.nics)} NICs", field="nics", hint=f"at most {MAX_NICS}")
    if tuple(device.volume for device in plan.volumes) != spec.volumes:
        raise BadInput("the opened volumes are not the EVM's", field="volumes", hint="all of them, in the EVM's order")
    if len(plan.volumes) > MAX_VOLUMES:
        raise BadInput(f"{len(plan.volumes)} volumes", field="volumes", hint=f"at most {MAX_VOLUMES}")
    for device in plan.volumes:
        if not _SERIAL.fullmatch(device.serial):
            raise BadInput(
                f"{device.serial!r} cannot be a disk's serial", field="serial", hint="1 to 20 letters, digits, - or _"
            )


def command_line(plan: LaunchPlan, *, binary: Path, accelerator: str, fds: Descriptors) -> list[str]:
    """Return the argv of the machine's QEMU. Raises ``BadInput`` for an impossible plan (``check_plan``)."""
    check_plan(plan)
    spec = plan.spec
    argv = [str(binary)]
    argv += ["-name", f"guest={spec.name},debug-threads=on", "-uuid", str(spec.uuid)]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-msg", "timestamp=on"]
    argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    # A guest that ends stays, paused, until the agent has seen why.
    argv += ["-no-shutdown", "-action", "reboot=reset,shutdown=pause,panic=pause,watchdog=reset"]
    argv += ["-machine", f"{spec.machine},usb=off,vmport=off,dump-guest-core=off,memory-backend=memory"]
    argv += [
        "-accel",
        accelerator,
        "-cpu",
        f"{spec.cpu_model},enforce=on",
        "-smp",
        f"cpus={spec.vcpus},sockets=1,cores={spec.vcpus}",
    ]
    argv += ["-m", f"{spec.memory_bytes // MEBIBYTE}M", "-object", _json(_memory(spec.memory_bytes))]
    argv += ["-kernel", f"/proc/self/fd/{fds.kernel}", "-initrd", f"/proc/self/fd/{fds.initrd}"]
    argv += ["-append", plan.kernel_command_line]
    argv += ["-fw_cfg", f"name={FW_CFG_NAME},file=/proc/self/fd/{fds.directory}/config"]
    for name, number in fds.sockets.items():
        argv += ["-chardev", f"socket,id={name},fd={number},server=on,wait=off"]
        if name != "console":
            argv += ["-mon", f"chardev={name},mode=control"]
    argv += _device("isa-serial", "serial0", chardev="console")
    # Every PCI device lengthens the blackout (2 ms of loading under TCG): pvpanic is ISA's, and there is no virtio-rng,
    # because QEMU seeds the kernel at each boot (SETUP_RNG_SEED of the Linux boot protocol).
    argv += _device("pvpanic", "panic0")
    for index, nic in enumerate(spec.nics):
        argv += ["-netdev", _json({"type": "tap", "id": f"net{index}", "fd": str(fds.taps[index]), "vhost": False})]
        off = dict.fromkeys(_TAP_FEATURES_OF_THE_HOST, False)
        slot = FIRST_NIC_SLOT + index
        # no option ROM: nothing boots from the network, and a ROM is memory to migrate
        argv += _pci("virtio-net-pci", f"nic{index}", slot, netdev=f"net{index}", mac=nic.mac, romfile="", **off)
    if plan.volumes:
        argv += ["-object", _json(tls_credentials("volumes", "client", fds.directory))]
    for index, device in enumerate(plan.volumes):
        argv += _volume(index, device, queues=min(spec.vcpus, MAX_QUEUES))
    if plan.incoming:
        argv += ["-S", "-incoming", "defer"]
    return argv


def tls_credentials(name: str, endpoint: str, directory_fd: int) -> dict[str, Any]:
    """Return the tls-creds-x509 object ``name``; ``endpoint`` is server or client. Both ends verify the other."""
    return {
        "qom-type": "tls-creds-x509",
        "id": name,
        "endpoint": endpoint,
        "dir": tls_directory(directory_fd),
        "verify-peer": True,
    }


def _memory(size_bytes: int) -> dict[str, Any]:
    return {
        "qom-type": "memory-backend-ram",
        "id": "memory",
        "size": size_bytes,
        "share": False,
        "prealloc": False,
        "merge": False,
        "dump": False,
    }


def _volume(index: int, device: BlockDevice, *, queues: int) -> list[str]:
    """A volume. NBD has no image locks: that only the owner writes is for the volume service to enforce, by epoch."""
    endpoint = device.source
    if not isinstance(endpoint, NbdEndpoint):
        raise BadInput(f"{device.volume} is no export", field="volumes", hint="an NBD export")
    server = {"type": "inet", "host": endpoint.host, "port": str(endpoint.port)}
    nbd = {
        "driver": "nbd",
        "node-name": f"export{index}",
        "server": server,
        "export": endpoint.export,
        "tls-creds": "volumes",
        "tls-hostname": endpoint.tls_hostname,
        "reconnect-delay": NBD_RECONNECT_DELAY_S,
        "cache": {"direct": True, "no-flush": False},
    }
    raw = {
        "driver": "raw",
        "node-name": f"volume{index}",
        "size": device.size_bytes,
        "file": f"export{index}",
        "cache": {"direct": True, "no-flush": False},
    }
    options = {"drive": f"volume{index}", "serial": device.serial, "num-queues": queues, "write-cache": "on"}
    on_error = {"werror": "stop", "rerror": "stop"}
    slot = FIRST_VOLUME_SLOT + index
    disk = _pci("virtio-blk-pci", f"disk{index}", slot, **options, **on_error)
    return ["-blockdev", _json(nbd), "-blockdev", _json(raw), *disk]


def _pci(driver: str, name: str, slot: int, **options: Any) -> list[str]:
    return _device(driver, name, bus="pci.0", addr=hex(slot), **{"disable-legacy": "on"}, **options)


def _device(driver: str, name: str, **options: Any) -> list[str]:
    return ["-device", _json({"driver": driver, "id": name, **options})]


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
