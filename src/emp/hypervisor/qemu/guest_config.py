"""What a guest is told of itself, through fw_cfg (``/sys/firmware/qemu_fw_cfg/by_name/opt/emp/config/raw``).

One fact per line, so that a shell in an initramfs can read it:

    hostname NAME
    nic N mac MAC addr ADDRESS/PREFIX
    pod NAME nic N mac MAC addr ADDRESS/PREFIX
    efs ADDRESS:/PATH MOUNT-POINT OPTIONS
"""

from __future__ import annotations

from emp.model.efs import MOUNT_OPTIONS
from emp.model.evm import EvmSpec

FW_CFG_NAME = "opt/emp/config"


def guest_config(spec: EvmSpec) -> str:
    """Return the text for the guest; it follows from the EVM's record alone, so that both ends of a migration agree."""
    lines = [f"hostname {spec.name}"]
    lines += [f"nic {n} mac {nic.mac} addr {nic.address}/{nic.prefix_length}" for n, nic in enumerate(spec.nics)]
    lines += [f"pod {pod.name} nic {pod.nic} mac {pod.mac} addr {pod.address}/{pod.prefix_length}" for pod in spec.pods]
    lines += [f"efs {mount.address}:{mount.path} {mount.mount_point} {MOUNT_OPTIONS}" for mount in spec.efs]
    return "\n".join(lines) + "\n"
