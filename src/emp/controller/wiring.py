"""Puts the controller together; the only file that picks drivers."""

from __future__ import annotations

from dataclasses import dataclass

from emp.controller.agents import Agents
from emp.controller.blueprint import Blueprints
from emp.controller.book import Book
from emp.controller.boot import Boot
from emp.controller.capacity import Capacity
from emp.controller.config import Config
from emp.controller.console import Consoles
from emp.controller.evms import Evms
from emp.controller.hub import Hub
from emp.controller.metrics import Metrics
from emp.controller.migrations import Migrations
from emp.controller.nodes import Nodes
from emp.controller.reports import Reports
from emp.controller.restart import Restarts
from emp.controller.services import Services
from emp.controller.steps import Tools
from emp.controller.volumes import Volumes
from emp.model.errors import NotFound
from emp.store.base import Store
from emp.store.sqlite import SqliteStore
from emp.volumes.base import VolumeDriver
from emp.volumes.nbd import NbdVolumeDriver
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
    volume_client: WireClient | None

    async def start(self) -> None:
        """Take over the records, and carry on where an earlier process stopped."""
        self.services.nodes.load()
        self.services.evms.resume()
        self.services.migrations.resume()

    async def close(self) -> None:
        """Stop acting. Nothing happens to any EVM."""
        self.services.consoles.close()
        await self.restarts.close()
        await self.services.migrations.close()
        await self.services.evms.close()
        await self.agents.aclose()
        if self.volume_client is not None:
            await self.volume_client.aclose()


async def open_store(config: Config) -> Store:
    return await SqliteStore.open(config.state_dir / "controller.db")


async def wire(config: Config, store: Store, *, driver: VolumeDriver | None = None) -> Controller:
    """Return the controller of ``store``, its records loaded; ``driver`` stands in for the volume service in tests."""
    tls = mutual_client(config.credentials)
    book = Book(store)
    await book.load()
    client = None
    if driver is None:
        server = Identity.parse(config.volumes.server_name)
        client = WireClient(config.volumes.url, tls=tls, server=server)
        driver = NbdVolumeDriver(client)
    nodes = Nodes(book, down_after_s=config.node_down_s)
    agents, hub, metrics = Agents(tls), Hub(), Metrics(book, nodes)
    volumes, capacity = Volumes(book, driver), Capacity(book, nodes)
    blueprints = Blueprints(book, nodes, capacity, volumes, config.network)
    evms = Evms(book, nodes, capacity, blueprints, Boot(book, nodes, agents, volumes))
    migrations = Migrations(Tools(book, nodes, agents, volumes, hub, metrics), capacity, config.network)
    restarts = Restarts(book, evms.start)
    reports = Reports(book, restarts)
    nodes.on_report.append(reports.heard)
    nodes.on_down += [reports.lost, migrations.node_down]
    services = Services(
        pool=config.pool,
        token=_token(config),
        heartbeat_s=config.heartbeat_s,
        book=book,
        nodes=nodes,
        volumes=volumes,
        evms=evms,
        migrations=migrations,
        consoles=Consoles(book, nodes, agents, hub),
        metrics=metrics,
    )
    return Controller(services, agents, restarts, client)


def _token(config: Config) -> Secret:
    """Return the token for people; made on the first start."""
    try:
        return Secret.read(config.token_file)
    except NotFound:
        token = Secret.new()
        token.write(config.token_file)
        return token
