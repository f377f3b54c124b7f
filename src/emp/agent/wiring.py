"""The only file of the agent that picks drivers."""

from __future__ import annotations

from emp.agent.config import AgentConfig, ServiceDevices
from emp.agent.devices import Devices, GrantProbe, MakeProbe, Source
from emp.hypervisor.base import Hypervisor
from emp.hypervisor.qemu.hypervisor import QemuHypervisor
from emp.model.errors import BadInput
from emp.model.volume import HostDevice
from emp.network.base import NetworkDriver
from emp.network.l2 import L2Driver
from emp.network.uplink import Vxlan
from emp.network.vpc import VpcDriver
from emp.volumes.base import RelayDriver, VolumeClaims, VolumeProbe
from emp.volumes.device_probe import DeviceProbe
from emp.volumes.devices import ServiceResolver
from emp.volumes.nbd import NbdVolumeClaims
from emp.volumes.nbd_probe import NbdProbe
from emp.volumes.nvme import NvmeResolver
from emp.volumes.relay.manager import Relays as RelayProcesses
from emp.wire import tls
from emp.wire.http import WireClient
from emp.wire.identity import Identity


def hypervisor(config: AgentConfig) -> Hypervisor:
    return QemuHypervisor(run_dir=config.run_dir, credentials_dir=config.qemu_credentials, binary=config.qemu)


def network(config: AgentConfig) -> NetworkDriver:
    if config.network.driver == "l2":
        settings, vxlan = config.network, None
        if settings.vxlan is not None:
            peers = {node: address for node, address in settings.vxlan.peers.items() if node != config.node}
            vxlan = Vxlan(settings.vxlan.id, config.address, peers)
        return L2Driver(bridge=settings.bridge, uplink=settings.uplink, vlan=settings.vlan, vxlan=vxlan)
    if config.network.driver == "vpc":
        return VpcDriver(uplink=config.network.uplink)
    raise BadInput(f"there is no network driver {config.network.driver!r}", field="network.driver", hint="l2 or vpc")


def claims(config: AgentConfig) -> VolumeClaims:
    return NbdVolumeClaims(tls.mutual_client(config.credentials))


def devices(config: AgentConfig) -> Devices:
    match config.devices:
        case ServiceDevices(url=url, server_name=name):
            client = WireClient(url, tls=tls.mutual_client(config.credentials), server=Identity.parse(name))
            return Devices(ServiceResolver(client))
        case _:
            return Devices(NvmeResolver())


def relays(config: AgentConfig) -> RelayDriver:
    return RelayProcesses(
        run_dir=config.run_dir, credentials=config.credentials, address=config.address, node=config.node
    )


def probe(config: AgentConfig, devices: Devices) -> MakeProbe:
    context = tls.mutual_client(config.credentials)

    def make(source: Source) -> VolumeProbe:
        return DeviceProbe(source) if isinstance(source, HostDevice) else NbdProbe(source, context)

    return lambda grant: GrantProbe(devices, grant, make)
