"""The only file of the agent that picks drivers."""

from __future__ import annotations

from emp.agent.config import AgentConfig
from emp.agent.health import MakeProbe
from emp.hypervisor.base import Hypervisor
from emp.hypervisor.qemu.hypervisor import QemuHypervisor
from emp.model.errors import BadInput
from emp.network.base import NetworkDriver
from emp.network.l2 import L2Driver
from emp.volumes.base import VolumeClaims
from emp.volumes.nbd import NbdVolumeClaims
from emp.volumes.nbd_probe import NbdProbe
from emp.wire import tls


def hypervisor(config: AgentConfig) -> Hypervisor:
    return QemuHypervisor(run_dir=config.run_dir, credentials_dir=config.qemu_credentials, binary=config.qemu)


def network(config: AgentConfig) -> NetworkDriver:
    if config.network.driver == "l2":
        return L2Driver(bridge=config.network.bridge, uplink=config.network.uplink)
    raise BadInput(f"there is no network driver {config.network.driver!r}", field="network.driver", hint="l2")


def claims(config: AgentConfig) -> VolumeClaims:
    return NbdVolumeClaims(tls.mutual_client(config.credentials))


def probe(config: AgentConfig) -> MakeProbe:
    context = tls.mutual_client(config.credentials)
    return lambda endpoint: NbdProbe(endpoint, context)
