"""The agent as a process: builds its parts, adopts what is here, serves, and leaves every EVM alone when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
from collections.abc import Callable

from emp import __version__
from emp.agent import wiring
from emp.agent.adoption import Adoption
from emp.agent.api import Gate, make_app
from emp.agent.assembly import Assembler
from emp.agent.config import AgentConfig
from emp.agent.heartbeat import Heartbeat
from emp.agent.images import Images
from emp.agent.journal import Journal, JournalUntrusted
from emp.agent.migrations import Migrations
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
    gate = Gate()
    images = Images(config.images_dir)
    hypervisor, network = wiring.hypervisor(config), wiring.network(config)
    facts = await hypervisor.facts()
    await network.start()
    untrusted: str | None = None
    try:
        journal = Journal.open(config.state_dir / "journal")
    except JournalUntrusted as error:
        # Quarantine: touch nothing, answer that nothing is known, report. An empty journal beside it is not written to.
        log.critical("%s: %s", config.state_dir / "journal", error)
        untrusted = gate.closed = str(error)
        journal = Journal.open(config.run_dir / "quarantine" / "journal")
    assembler = Assembler(hypervisor, network, images)
    residents = Residents(journal, Shelf(config.state_dir / "evms"), assembler, memory_bytes=config.memory_bytes)
    client_tls = tls.mutual_client(config.credentials)

    async def dial(peer: Peer, migration: str) -> Link:
        link = await connect_link(
            peer.host, peer.link_port, tls=client_tls, peer=Identity(Role.AGENT, peer.node), pool=config.pool
        )
        await link.send({"type": "hello", "migration": migration})
        return link

    migrations = Migrations(journal, residents, dial, stream_host=config.address)
    server_tls = tls.mutual_server(config.credentials)
    api_socket = sockets.listen(config.address, config.port, field="port")
    link_socket = sockets.listen(config.address, config.link_port, field="link_port")
    report = _reporter(config, facts, images, residents, untrusted)
    app = make_app(residents, migrations, gate, report)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            WireClient(config.controller_url, tls=client_tls, server=Identity.parse(config.controller_name))
        )
        if untrusted is None:
            await Adoption(journal, residents, migrations).run()
            gate.closed = None
        await stack.enter_async_context(Server(app, [Listener(api_socket, server_tls)], pool=config.pool))
        await stack.enter_async_context(
            LinkServer(link_socket, tls=server_tls, pool=config.pool, on_link=migrations.take_link)
        )
        heart = asyncio.create_task(Heartbeat(client, config.node, report, residents.changed).run(), name="heartbeat")
        log.info("agent of %s serves on %s:%d", config.node, config.address, config.port)
        await stop.wait()
        log.info("agent of %s stops; its EVMs go on", config.node)
        heart.cancel()
        await asyncio.gather(heart, return_exceptions=True)
    await migrations.close()
    await residents.close()
    journal.close()


def _reporter(
    config: AgentConfig, facts: HypervisorFacts, images: Images, residents: Residents, untrusted: str | None
) -> Callable[[], NodeReport]:
    boot_id = secrets.token_hex(8)

    def report() -> NodeReport:
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
                images=images.digests(),
            ),
            evms=residents.reports(),
            boot_id=boot_id,
            journal=untrusted,
        )

    return report
