"""The real daemons' parts, put together as their ``daemon`` modules do it, on the simulated ground."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from emp.agent import daemon as agent_daemon
from emp.agent.addresses import SeenFiles
from emp.agent.adoption import Adoption
from emp.agent.api import make_app
from emp.agent.assembly import Assembler
from emp.agent.claims import Claims
from emp.agent.config import AgentConfig
from emp.agent.devices import Devices
from emp.agent.gate import Gate
from emp.agent.heartbeat import Heartbeat
from emp.agent.incoming import IncomingLinks
from emp.agent.journal import Standing
from emp.agent.lending import Lending
from emp.agent.links import exchange_hello
from emp.agent.migrations import Migrations
from emp.agent.relays import Relays
from emp.agent.residents import Residents
from emp.agent.roles import Roles
from emp.agent.shelf import Shelf
from emp.controller import daemon as controller_daemon
from emp.controller.agents import AgentClient, Agents
from emp.controller.app import agents_app
from emp.controller.config import Config, NbdVolumes, Network, People
from emp.controller.services import Services
from emp.controller.wiring import wire
from emp.model.node import Node
from emp.model.orders import Peer
from emp.volumes.nbd import NbdVolumeClaims, NbdVolumeDriver
from emp.volumes.server.app import make_app as make_volumes_app
from emp.volumes.server.config import Config as VolumesConfig
from emp.volumes.server.service import VolumeService as Volumes
from emp.wire.identity import Identity, Role
from tests.fakes.hypervisor import FakeHypervisor
from tests.simulation.disk import DiskPath
from tests.simulation.hosts import SimImages, SimNetwork
from tests.simulation.loop import Process
from tests.simulation.net import Server, SimWire
from tests.simulation.relays import SimRelays
from tests.simulation.routes import RouteTable
from tests.simulation.store import SimStore

if TYPE_CHECKING:
    from tests.simulation.world import World

CONTROLLER = Identity(Role.CONTROLLER, "main")
MEMORY_BYTES = 2 << 30


class Daemon:
    """A daemon that is started, killed and started again."""

    host: str
    name: str

    def __init__(self, world: World) -> None:
        self.world = world
        self.process: Process | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    def start(self) -> None:
        if not self.alive:
            self.world.note(f"start {self.name}")
            self.process = Process(self.name, self.host)
            self.process.spawn(self._guarded(self.process), self.name)

    def kill(self) -> None:
        if self.process is not None and self.process.alive:
            self.world.note(f"kill {self.name}")
            self.process.kill()

    async def _guarded(self, process: Process) -> None:
        try:
            await self.run(process)
        except Exception as error:  # noqa: BLE001 - a process that ends, whatever of
            self.world.crashed(self.name, error)
            process.kill()

    async def run(self, process: Process) -> None:
        raise NotImplementedError

    def serve(self, process: Process, app: Any) -> None:
        server = Server(process, cast(RouteTable, app))
        process.on_death.append(server.died)
        self.world.net.servers[self.host] = server


class AgentDaemon(Daemon):
    """As ``emp.agent.daemon``. What is of the host (QEMUs, ports, disk) stays when it is killed."""

    def __init__(self, world: World, node: str) -> None:
        super().__init__(world)
        self.host = node
        self.name = f"agent {node}"
        self.address = f"10.77.0.{int(node[1:])}"
        self.hypervisor = FakeHypervisor(world.fabric, node)
        self.network = SimNetwork(world, node)
        self.relays = SimRelays(world, node)
        self.disk = world.new_disk(node)
        self.residents: Residents | None = None
        self.roles: Roles | None = None

    def config(self) -> AgentConfig:
        state = cast(Path, DiskPath(self.disk, self.host))
        return AgentConfig.model_construct(
            pool="sim",
            node=self.host,
            address=self.address,
            controller_url="",
            state_dir=state,
            run_dir=state / "run",
            memory_bytes=MEMORY_BYTES,
            vcpus=4,
        )

    async def run(self, process: Process) -> None:
        config, net = self.config(), self.world.net
        me = Identity(Role.AGENT, self.host)
        facts = await self.hypervisor.facts()
        journal, untrusted = agent_daemon._open_journal(config)
        images: Any = SimImages()
        volumes: Any = SimWire(net, me, self.host, "vol")  # whose attachments all name an endpoint
        devices = Devices(volumes)
        relays = Relays(self.relays, devices, config.run_dir / "relays.json")
        await relays.start()
        seen = SeenFiles(config.run_dir / "addresses")
        assembler = Assembler(self.hypervisor, self.network, images, devices, relays, seen)
        residents = Residents(journal, Shelf(config.state_dir / "evms"), assembler, memory_bytes=config.memory_bytes)
        claims, gate = Claims(NbdVolumeClaims(volumes)), Gate()
        gate.distrust = untrusted

        async def dial(peer: Peer, migration: str) -> tuple[Any, Standing]:
            link: Any = await net.dial(self.host, me, peer.node, Identity(Role.AGENT, peer.node))
            try:
                return link, await exchange_hello(link, journal, migration)
            except BaseException:
                link.abort()
                raise

        roles = Roles(journal, gate)
        migrations = Migrations(journal, residents, roles, dial, claims, gate, relays, stream_host=config.address)
        lending = Lending(journal, residents, roles, claims, gate, relays)
        parts = agent_daemon.Parts(facts, images, journal, residents, roles, migrations, lending, claims, gate, relays)
        reporter = agent_daemon.Reporter(config, parts)
        app = make_app(residents, roles, migrations, lending, gate, reporter.report)
        adoption = Adoption(journal, residents, migrations, claims)
        if untrusted is None and (strangers := await adoption.run()):
            reporter.trouble = f"machines without a record in the journal: {', '.join(strangers)}"
        gate.starting = None
        self.residents, self.roles = residents, roles
        self.serve(process, app)
        net.link_servers[self.host] = process, IncomingLinks(journal, roles, gate).take
        client: Any = SimWire(net, me, self.host, "ctl")
        hear = agent_daemon._hear
        beat = Heartbeat(client, self.host, reporter.report, residents.changed, lambda reply: hear(parts, reply))
        process.spawn(adoption.go_on(), "adoption")
        await beat.run()


class SimAgentClient(AgentClient):
    """The controller's client of an agent, over the simulated network."""

    def __init__(self, world: World, node: str, url: str) -> None:
        self.url = url
        self._wire: Any = SimWire(world.net, CONTROLLER, "ctl", node)

    async def aclose(self) -> None:
        pass


class SimAgents(Agents):
    def __init__(self, world: World) -> None:
        self._world = world
        self._clients: dict[str, AgentClient] = {}
        self._outdated: list[AgentClient] = []

    def of(self, node: Node) -> AgentClient:
        if node.name not in self._clients:
            self._clients[node.name] = SimAgentClient(self._world, node.name, f"https://{node.report.address}:7443")
        return self._clients[node.name]


class ControllerDaemon(Daemon):
    """As ``emp.controller.daemon``."""

    host = "ctl"
    name = "controller"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.services: Services | None = None

    def config(self) -> Config:
        network = Network(subnet="10.77.0.0/16", evm_first="10.77.1.0", evm_last="10.77.250.255")
        return Config(
            pool="sim",
            address="10.77.0.100",
            port=7701,
            people=People(host="10.77.0.100", port=7700),
            credentials=Path("credentials"),
            state_dir=Path("state"),
            token_file=Path("token"),
            network=network,
            volumes=NbdVolumes(driver="nbd", url="https://10.77.0.200:7445", server_name="volumes-main"),
        )

    async def run(self, process: Process) -> None:
        self.services = None
        config, world = self.config(), self.world
        client: Any = SimWire(world.net, CONTROLLER, "ctl", "vol")
        store: Any = SimStore(world.store)
        controller = await wire(config, store, driver=NbdVolumeDriver(client))
        await controller.start()
        self.services = controller.services
        self.serve(process, agents_app(controller.services))
        async with controller_daemon._background(config, controller):
            await asyncio.Event().wait()


class VolumesDaemon(Daemon):
    """As ``emp.volumes.server``. Its exports are processes of their own."""

    host = "vol"
    name = "volumes"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.disk = world.new_disk("vol")
        self.service: Volumes | None = None

    async def run(self, process: Process) -> None:
        state = cast(Path, DiskPath(self.disk, "vol"))
        config = VolumesConfig.model_construct(
            address="10.77.0.200", port=7445, nbd_ports=(10809, 12000), state_dir=state, pool="sim"
        )
        credentials: Any = _Credentials()
        self.service = Volumes(config, credentials)
        app = make_volumes_app(self.service)
        await self.service.start()
        self.serve(process, app)
        await asyncio.Event().wait()


class _Credentials:
    identity = Identity(Role.VOLUMES, "main")
