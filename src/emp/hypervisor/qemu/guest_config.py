"""What a guest is told of itself, through fw_cfg (``/sys/firmware/qemu_fw_cfg/by_name/opt/emp/config/raw``).

One fact per line, so that a shell in an initramfs can read it:

    hostname NAME
    nic N mac MAC addr ADDRESS/PREFIX [addr IPV6/PREFIX [gw IPV6]]
    pod NAME nic N mac MAC addr ADDRESS/PREFIX [addr IPV6/PREFIX [gw IPV6]]
    efs ADDRESS:/PATH MOUNT-POINT OPTIONS
"""

from __future__ import annotations

from emp.model.efs import MOUNT_OPTIONS
from emp.model.evm import EvmSpec, Nic, Pod

FW_CFG_NAME = "opt/emp/config"


def guest_config(spec: EvmSpec) -> str:
    """Return the text for the guest; it follows from the EVM's record alone, so that both ends of a migration agree."""
    lines = [f"hostname {spec.name}"]
    lines += [f"nic {n} {_addressed(nic)}" for n, nic in enumerate(spec.nics)]
    lines += [f"pod {pod.name} nic {pod.nic} {_addressed(pod)}" for pod in spec.pods]
    lines += [f"efs {mount.address}:{mount.path} {mount.mount_point} {MOUNT_OPTIONS}" for mount in spec.efs]
    return "\n".join(lines) + "\n"


def _addressed(each: Nic | Pod) -> str:
    words = f"mac {each.mac} addr {each.address}/{each.prefix_length}"
    if each.ipv6 is not None:
        words += f" addr {each.ipv6.address}/{each.ipv6.prefix_length}"
        words += f" gw {each.ipv6.gateway}" if each.ipv6.gateway else ""
    return words
