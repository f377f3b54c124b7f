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
from emp.hypervisor.qemu import disks
from emp.hypervisor.qemu.guest_config import FW_CFG_NAME
from emp.hypervisor.qemu.run_directory import MONITORS
from emp.model.errors import BadInput
from emp.model.evm import MAX_VOLUMES
from emp.model.names import check_name
from emp.model.volume import NbdEndpoint

FIRST_NIC_SLOT, MAX_NICS = 4, 4
CONTROLLER_SLOT = 8
MAX_QUEUES = 4
RECEIVE_BUFFERS = 1024
"""of a network card, the most that QEMU can: they remember what the guest has got (``emp.network.held``). They take
some 2 MB of the guest's memory"""
MEBIBYTE = 1 << 20
MINIMUM_MEMORY_BYTES = 64 * MEBIBYTE
_MACHINE = re.compile(r"pc-i440fx-\d+\.\d+")
_CPU_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
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
    """listening: those of ``run_directory.SOCKETS``"""
    taps: tuple[int, ...] = field(default=())
    devices: Mapping[int, int] = field(default_factory=dict)
    """slot of a volume that is a device of this node -> the open device"""
    relays: Mapping[int, int] = field(default_factory=dict)
    """slot of a volume that is relayed -> the directory of the relay's socket"""

    def all(self) -> tuple[int, ...]:
        volumes = (*self.devices.values(), *self.relays.values())
        return (self.directory, self.kernel, self.initrd, *self.sockets.values(), *self.taps, *volumes)


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
    for slot, device in zip(spec.slots, plan.volumes, strict=True):
        disks.check_slot(slot)
        disks.check_device(device)


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
        if name in MONITORS:
            argv += ["-mon", f"chardev={name},mode=control"]
    argv += _device("isa-serial", "serial0", chardev="console")
    # Every PCI device lengthens the blackout (2 ms of loading under TCG): the guest's agent has a serial port and no
    # virtio-serial, pvpanic is ISA's, and there is no virtio-rng, because QEMU seeds the kernel at each boot
    # (SETUP_RNG_SEED of the Linux boot protocol). Nor is there a vmgenid: a migration is no clone, and no state of a
    # random number generator is used twice (docs/design/0016-the-guests-clock.md).
    argv += _device("isa-serial", "serial1", chardev="qga", index=1)
    argv += _device("pvpanic", "panic0")
    for index, nic in enumerate(spec.nics):
        argv += ["-netdev", _json({"type": "tap", "id": f"net{index}", "fd": str(fds.taps[index]), "vhost": False})]
        off = dict.fromkeys(_TAP_FEATURES_OF_THE_HOST, False)
        slot = FIRST_NIC_SLOT + index
        # no option ROM: nothing boots from the network, and a ROM is memory to migrate
        card = {"netdev": f"net{index}", "mac": nic.mac, "romfile": "", "rx_queue_size": RECEIVE_BUFFERS}
        card |= {"host_mtu": plan.mtus_bytes[index]} if plan.mtus_bytes else {}
        argv += _pci("virtio-net-pci", f"nic{index}", slot, **card, **off)
    if any(isinstance(device.source, NbdEndpoint) for device in plan.volumes):
        argv += ["-object", _json(tls_credentials(disks.CREDENTIALS, "client", fds.directory))]
    argv += _at(CONTROLLER_SLOT, disks.controller(min(spec.vcpus, MAX_QUEUES)))
    for slot, device in zip(spec.slots, plan.volumes, strict=True):
        argv += _volume(slot, device, fds)
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


def _volume(slot: int, device: BlockDevice, fds: Descriptors) -> list[str]:
    handles = disks.Handles(directory=fds.relays.get(slot, 0), fdset=slot)
    words = ["-add-fd", f"fd={fds.devices[slot]},set={slot}"] if slot in fds.devices else []
    words += ["-blockdev", _json(disks.source_node(slot, device, handles))]
    words += ["-blockdev", _json(disks.raw_node(slot, device))]
    return [*words, "-device", _json(disks.disk(slot, device))]


def _pci(driver: str, name: str, slot: int, **options: Any) -> list[str]:
    return _at(slot, {"driver": driver, "id": name, **options})


def _at(slot: int, device: Mapping[str, Any]) -> list[str]:
    """Return a PCI device at its place on the bus."""
    place = {"bus": "pci.0", "addr": hex(slot), "disable-legacy": "on"}
    return ["-device", _json({"driver": device["driver"], "id": device["id"], **place, **device})]


def _device(driver: str, name: str, **options: Any) -> list[str]:
    return ["-device", _json({"driver": driver, "id": name, **options})]


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
