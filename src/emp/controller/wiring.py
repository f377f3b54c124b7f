"""Puts the controller together; the only file that picks drivers."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from emp.addresses.base import AddressMover
from emp.addresses.ec2 import Ec2AddressMover
from emp.controller.agents import Agents
from emp.controller.blueprint import Blueprints
from emp.controller.book import Book
from emp.controller.boot import Boot
from emp.controller.capacity import Capacity
from emp.controller.config import Config, EbsVolumes, Ec2Fencing, LabFencing, NbdVolumes
from emp.controller.console import Consoles
from emp.controller.efs import Efs
from emp.controller.evms import Evms
from emp.controller.fences import Fences
from emp.controller.hub import Hub
from emp.controller.learnt import LearntAddresses
from emp.controller.metrics import Metrics
from emp.controller.migrations import Migrations
from emp.controller.nodes import Nodes
from emp.controller.reach import Reach
from emp.controller.reports import Reports
from emp.controller.restart import Restarts
from emp.controller.services import Services
from emp.controller.shared import SharedRecords
from emp.controller.steps import Tools
from emp.controller.sweep import Sweep
from emp.controller.volumes import Volumes
from emp.fencing.base import FenceDriver
from emp.fencing.ec2 import Ec2Fence
from emp.fencing.lab import LabFence
from emp.fencing.manual import ManualFence
from emp.model.errors import NotFound
from emp.store.base import Store
from emp.store.sqlite import SqliteStore
from emp.volumes.base import EfsDriver, VolumeDriver
from emp.volumes.ebs import EbsVolumeDriver
from emp.volumes.efs import EfsCloud
from emp.volumes.nbd import NbdVolumeDriver
from emp.volumes.nbd_probe import export_size_bytes
from emp.volumes.router import VolumeRouter
from emp.volumes.shared import PREFIX as SHARED_PREFIX
from emp.volumes.shared import SharedVolumeDriver
from emp.wire.http import WireClient
from emp.wire.identity import Identity
from emp.wire.secret import Secret
from emp.wire.tls import mutual_client


@dataclass(frozen=True)
class Controller:
    """The parts that must be started and closed, and what the API serves from."""

    services: Services
    agents: Agents
    restarts: Restarts
    sweep: Sweep
    driver: VolumeDriver
    reach: Reach

    async def start(self) -> None:
        """Take over the records, and carry on where an earlier process stopped."""
        self.services.nodes.load()
        self.services.evms.resume()
        self.services.migrations.resume()

    async def close(self) -> None:
        """Stop acting. Nothing happens to any EVM."""
        self.services.consoles.close()
        await self.restarts.close()
        await self.sweep.close()
        await self.services.fences.close()
        await self.services.migrations.close()
        await self.services.evms.close()
        await self.services.efs.aclose()
        await self.agents.aclose()
        await self.driver.aclose()
        await self.reach.aclose()


async def open_store(config: Config) -> Store:
    return await SqliteStore.open(config.state_dir / "controller.db")


async def wire(
    config: Config,
    store: Store,
    *,
    driver: VolumeDriver | None = None,
    fence_driver: FenceDriver | None = None,
    efs_driver: EfsDriver | None = None,
    mover: AddressMover | None = None,
) -> Controller:
    """Return the controller of ``store``, its records loaded; the drivers stand in for services in tests."""
    tls = mutual_client(config.credentials)
    book = Book(store)
    await book.load()
    driver = driver or _volume_driver(config, tls)
    nodes = Nodes(book, down_after_s=config.node_down_s)
    agents, hub, metrics = Agents(tls), Hub(), Metrics(book, nodes)
    shared = SharedVolumeDriver(SharedRecords(book), lambda endpoint: export_size_bytes(endpoint, tls))
    driver = VolumeRouter(driver, {SHARED_PREFIX: shared})
    volumes = Volumes(book, driver, shared)
    capacity = Capacity(book, nodes)
    efs = Efs(book, efs_driver or _efs_driver(config))
    blueprints = Blueprints(book, nodes, capacity, volumes, efs, config.network)
    fences = Fences(book, nodes, agents, fence_driver or _fence_driver(config, tls))
    reach = Reach(mover or _address_mover(config))
    migrations = Migrations(Tools(book, nodes, agents, volumes, hub, metrics, reach), capacity, config.network, efs)
    boot = Boot(book, nodes, agents, volumes, fences, reach)
    evms = Evms(book, nodes, capacity, blueprints, boot, migrations, volumes)
    restarts = Restarts(book, evms.start)
    reports = Reports(book, restarts)
    sweep = Sweep(book, nodes, agents, migrations)
    learnt = LearntAddresses(book, nodes, config.network)
    nodes.on_report += [reports.heard, fences.heard, sweep.heard, learnt.heard]
    nodes.on_down += [reports.lost, migrations.node_down]
    services = Services(
        pool=config.pool,
        token=_token(config),
        heartbeat_s=config.heartbeat_s,
        book=book,
        nodes=nodes,
        volumes=volumes,
        efs=efs,
        fences=fences,
        evms=evms,
        migrations=migrations,
        learnt=learnt,
        consoles=Consoles(book, nodes, agents, hub),
        metrics=metrics,
    )
    return Controller(services, agents, restarts, sweep, driver, reach)


def _volume_driver(config: Config, tls: ssl.SSLContext) -> VolumeDriver:
    match config.volumes:
        case NbdVolumes(url=url, server_name=name):
            return NbdVolumeDriver(WireClient(url, tls=tls, server=Identity.parse(name)))
        case EbsVolumes() as ebs:
            return EbsVolumeDriver(
                ebs.instances,
                pool=config.pool,
                region=ebs.region,
                zone=ebs.zone,
                endpoint_url=ebs.endpoint_url,
                ca_file=ebs.ca_file,
                credentials_file=ebs.credentials_file,
            )


def _efs_driver(config: Config) -> EfsDriver | None:
    if config.efs is None:
        return None
    settings = config.efs
    return EfsCloud(
        settings.instances,
        pool=config.pool,
        region=settings.region,
        endpoint_url=settings.endpoint_url,
        ca_file=settings.ca_file,
        credentials_file=settings.credentials_file,
    )


def _address_mover(config: Config) -> AddressMover | None:
    if config.network.vpc is None:
        return None
    settings = config.network.vpc
    return Ec2AddressMover(
        settings.instances,
        region=settings.region,
        interfaces=settings.interfaces,
        endpoint_url=settings.endpoint_url,
        ca_file=settings.ca_file,
        credentials_file=settings.credentials_file,
    )


def _fence_driver(config: Config, tls: ssl.SSLContext) -> FenceDriver:
    match config.fencing:
        case LabFencing(url=url, server_name=name):
            return LabFence(WireClient(url, tls=tls, server=Identity.parse(name)), url)
        case Ec2Fencing(region=region, instances=instances):
            return Ec2Fence(instances, region=region)
        case _:
            return ManualFence()


def _token(config: Config) -> Secret:
    """Return the token for people; made on the first start."""
    try:
        return Secret.read(config.token_file)
    except NotFound:
        token = Secret.new()
        token.write(config.token_file)
        return token
