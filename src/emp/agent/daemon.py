"""The agent as a process: builds its parts, adopts what is here, serves, and leaves every EVM alone when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import signal
from dataclasses import dataclass

from emp import __version__
from emp.agent import wiring
from emp.agent.adoption import Adoption
from emp.agent.api import Gate, make_app
from emp.agent.assembly import Assembler
from emp.agent.config import AgentConfig
from emp.agent.heartbeat import Heartbeat
from emp.agent.images import Images
from emp.agent.journal import Journal, JournalUntrusted
from emp.agent.migrations import Dial, Migrations
from emp.agent.residents import Residents
from emp.agent.shelf import Shelf
from emp.hypervisor.base import HypervisorFacts
from emp.model.node import NodeReport, Versions
from emp.model.orders import PROTOCOL_VERSION, Peer
from emp.wire import sockets, tls
from emp.wire.http import WireClient
from emp.wire.identity import Identity, Role
from emp.wire.link import Link, LinkServer, connect_link
from emp.wire.serve import Listener, Server

log = logging.getLogger(__name__)


async def run(config: AgentConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    hypervisor, network = wiring.hypervisor(config), wiring.network(config)
    facts = await hypervisor.facts()
    await network.start()
    journal, untrusted = _open_journal(config)
    images = Images(config.images_dir)
    assembler = Assembler(hypervisor, network, images)
    residents = Residents(journal, Shelf(config.state_dir / "evms"), assembler, memory_bytes=config.memory_bytes)
    migrations = Migrations(journal, residents, _dial(config), stream_host=config.address)
    try:
        await _serve(config, Parts(facts, images, residents, migrations, untrusted), stop)
    finally:
        log.info("agent of %s stops; its EVMs go on", config.node)
        await migrations.close()
        await residents.close()
        await network.close()
        journal.close()


@dataclass(frozen=True)
class Parts:
    facts: HypervisorFacts
    images: Images
    residents: Residents
    migrations: Migrations
    untrusted: str | None
    """why the journal cannot be trusted: then nothing is touched, nothing is answered, and a person is told"""


def _open_journal(config: AgentConfig) -> tuple[Journal, str | None]:
    path = config.state_dir / "journal"
    try:
        return Journal.open(path), None
    except JournalUntrusted as error:
        log.critical("%s: %s", path, error)
        return Journal.open(config.run_dir / "quarantine" / "journal"), str(error)


def _dial(config: AgentConfig) -> Dial:
    context = tls.mutual_client(config.credentials)

    async def dial(peer: Peer, migration: str) -> Link:
        there = Identity(Role.AGENT, peer.node)
        link = await connect_link(peer.host, peer.link_port, tls=context, peer=there, pool=config.pool)
        await link.send({"type": "hello", "migration": migration})
        return link

    return dial


async def _serve(config: AgentConfig, parts: Parts, stop: asyncio.Event) -> None:
    server_tls = tls.mutual_server(config.credentials)
    gate = Gate()
    reporter = Reporter(config, parts)
    app = make_app(parts.residents, parts.migrations, gate, reporter.report)
    api = Listener(sockets.listen(config.address, config.port, field="port"), server_tls)
    links = sockets.listen(config.address, config.link_port, field="link_port")
    async with contextlib.AsyncExitStack() as stack:
        controller = WireClient(
            config.controller_url,
            tls=tls.mutual_client(config.credentials),
            server=Identity.parse(config.controller_name),
        )
        await stack.enter_async_context(controller)
        if parts.untrusted is None:
            strangers = await Adoption(parts.residents.journal, parts.residents, parts.migrations).run()
            if strangers:
                reporter.trouble = f"machines without a record in the journal, not touched: {', '.join(strangers)}"
        gate.closed = parts.untrusted
        await stack.enter_async_context(Server(app, [api], pool=config.pool))
        on_link = parts.migrations.take_link
        await stack.enter_async_context(LinkServer(links, tls=server_tls, pool=config.pool, on_link=on_link))
        beat = Heartbeat(controller, config.node, reporter.report, parts.residents.changed)
        heart = asyncio.create_task(beat.run(), name="heartbeat")
        log.info("agent of %s serves on %s:%d", config.node, config.address, config.port)
        gc.collect()
        gc.freeze()  # what is here now stays: a collection in a blackout need not walk it
        await stop.wait()
        heart.cancel()
        await asyncio.gather(heart, return_exceptions=True)


class Reporter:
    """Makes the node's report, for the heartbeat and for whoever asks."""

    def __init__(self, config: AgentConfig, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        self._boot_id = secrets.token_hex(8)
        self.trouble: str | None = None

    def report(self) -> NodeReport:
        config, facts, residents = self._config, self._parts.facts, self._parts.residents
        return NodeReport(
            name=config.node,
            address=config.address,
            port=config.port,
            link_port=config.link_port,
            memory_bytes=config.memory_bytes,
            memory_used_bytes=residents.memory_used_bytes,
            vcpus=config.vcpus,
            versions=Versions(
                emp=__version__,
                protocol=PROTOCOL_VERSION,
                qemu=facts.version,
                machines=facts.machines,
                cpu_models=facts.cpu_models,
                accelerator=facts.accelerator,
                images=self._parts.images.digests(),
            ),
            evms=residents.reports(),
            boot_id=self._boot_id,
            journal=self._parts.untrusted or self.trouble,
        )
