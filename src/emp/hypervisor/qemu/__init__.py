"""The QEMU driver: QEMU 10.0 or newer, ``pc-i440fx`` machines, KVM where it is usable and TCG elsewhere.

``hypervisor`` makes, finds and adopts machines · ``machine`` one of them · ``command_line`` LaunchPlan -> argv (pure)
· ``guest_config`` what the guest reads of itself (pure) · ``stream`` migration parameters and ``query-migrate`` (pure)
· ``events`` QMP events -> machine events · ``qmp`` a monitor connection · ``run_directory`` what a machine has on this
node while it lives · ``ending`` how a process ended · ``binary`` which QEMU, and what it can do.
"""

from emp.hypervisor.qemu.hypervisor import QemuHypervisor
from emp.hypervisor.qemu.machine import QemuMachine

__all__ = ["QemuHypervisor", "QemuMachine"]
