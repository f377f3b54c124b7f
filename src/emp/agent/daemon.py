"""The agent as a process: builds its parts, adopts what is here, serves, and leaves every EVM alone when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
from dataclasses import dataclass

from emp import __version__
from emp.agent import wiring
from emp.agent.addresses import SeenFiles
from emp.agent.adoption import Adoption
from emp.agent.api import make_app, make_local_app
from emp.agent.assembly import Assembler
from emp.agent.claims import Claims
from emp.agent.config import AgentConfig
from emp.agent.gate import Gate
from emp.agent.heartbeat import Heartbeat
from emp.agent.images import Images
from emp.agent.incoming import IncomingLinks
from emp.agent.journal import Journal, JournalUntrusted, Standing
from emp.agent.lending import Lending
from emp.agent.links import exchange_hello
from emp.agent.migrations import Dial, DialFrames, Migrations
from emp.agent.relays import Relays
from emp.agent.residents import Residents
from emp.agent.roles import Roles
from emp.agent.shelf import Shelf
from emp.hypervisor.base import HypervisorFacts
from emp.model.node import NodeReport, Versions
from emp.model.orders import PROTOCOL_VERSION, HeartbeatReply, Peer
from emp.wire import sockets, tls
from emp.wire.http import WireClient
from emp.wire.identity import Identity, Role
from emp.wire.link import Link, LinkServer, connect_link
from emp.wire.process import told_to_end
from emp.wire.serve import Listener, Server

log = logging.getLogger(__name__)


async def run(config: AgentConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = told_to_end()
    hypervisor, network = wiring.hypervisor(config), wiring.network(config)
    facts = await hypervisor.facts()
    await network.start()
    journal, untrusted = _open_journal(config)
    images = Images(config.images_dir)
    devices = wiring.devices(config)
    relays = Relays(wiring.relays(config), devices, config.run_dir / "relays.json")
    await relays.start()
    seen = SeenFiles(config.run_dir / "addresses")
    assembler = Assembler(hypervisor, network, images, devices, relays, seen)
    residents = Residents(journal, Shelf(config.state_dir / "evms"), assembler, memory_bytes=config.memory_bytes)
    claims, gate = Claims(wiring.claims(config)), Gate()
    gate.distrust = untrusted
    roles = Roles(journal, gate)
    dial = _dial(config, journal)
    probe = wiring.probe(config, devices)
    migrations = Migrations(
        journal,
        residents,
        roles,
        dial,
        claims,
        gate,
        relays,
        stream_host=config.address,
        dial_frames=_dial_frames(config, journal),
        probe=probe,
    )
    lending = Lending(journal, residents, roles, claims, gate, relays)
    links = IncomingLinks(journal, roles, gate)
    parts = Parts(facts, images, journal, residents, roles, migrations, lending, claims, gate, relays)
    try:
        await _serve(config, parts, links, stop)
    finally:
        log.info("agent of %s stops; its EVMs go on", config.node)
        await roles.close()
        await links.close()
        await claims.close()
        await residents.close()
        await relays.close()
        await devices.aclose()
        await network.close()
        journal.close()


@dataclass(frozen=True)
class Parts:
    facts: HypervisorFacts
    images: Images
    journal: Journal
    residents: Residents
    roles: Roles
    migrations: Migrations
    lending: Lending
    claims: Claims
    gate: Gate
    relays: Relays


def _open_journal(config: AgentConfig) -> tuple[Journal, str | None]:
    """Return the journal, and why it cannot be trusted: then nothing is touched, and a person is told."""
    path, instead = config.state_dir / "journal", config.run_dir / "quarantine" / "journal"
    try:
        journal = Journal.open(path, seen=config.run_dir / "journal-seen")
    except JournalUntrusted as error:
        log.critical("%s: %s", path, error)
        return Journal.open(instead), str(error)
    instead.unlink(missing_ok=True)  # of an agent that did not trust its journal
    return journal, None


def _dial_frames(config: AgentConfig, journal: Journal) -> DialFrames:
    dial = _dial(config, journal, carries="frames")

    async def dial_frames(peer: Peer, migration: str) -> Link:
        link, _ = await dial(peer, migration)
        return link

    return dial_frames


def _dial(config: AgentConfig, journal: Journal, *, carries: str | None = None) -> Dial:
    context = tls.mutual_client(config.credentials)

    async def dial(peer: Peer, migration: str) -> tuple[Link, Standing]:
        there = Identity(Role.AGENT, peer.node)
        link = await connect_link(peer.host, peer.link_port, tls=context, peer=there, pool=config.pool)
        try:
            return link, await exchange_hello(link, journal, migration, carries=carries)
        except BaseException:
            link.abort()
            raise

    return dial


async def _serve(config: AgentConfig, parts: Parts, incoming: IncomingLinks, stop: asyncio.Event) -> None:
    server_tls = tls.mutual_server(config.credentials)
    gate = parts.gate
    reporter = Reporter(config, parts)
    app = make_app(parts.residents, parts.roles, parts.migrations, parts.lending, gate, reporter.report)
    local_app = make_local_app(parts.roles, parts.migrations, gate, reporter.report)
    api = Listener(sockets.listen(config.address, config.port, field="port"), server_tls)
    links = sockets.listen(config.address, config.link_port, field="link_port")
    async with contextlib.AsyncExitStack() as stack:
        controller = WireClient(
            config.controller_url,
            tls=tls.mutual_client(config.credentials),
            server=Identity.parse(config.controller_name),
        )
        await stack.enter_async_context(controller)
        local = sockets.listen_unix(config.run_dir / "agent.sock")
        await stack.enter_async_context(Server(local_app, [Listener(local, None)], pool=config.pool))
        adoption = Adoption(parts.journal, parts.residents, parts.migrations, parts.claims)
        if gate.distrust is None and (strangers := await adoption.run()):
            reporter.trouble = f"machines without a record in the journal, not touched: {', '.join(strangers)}"
        gate.starting = None
        await stack.enter_async_context(Server(app, [api], pool=config.pool))
        await stack.enter_async_context(LinkServer(links, tls=server_tls, pool=config.pool, on_link=incoming.take))
        beat = Heartbeat(
            controller, config.node, reporter.report, parts.residents.changed, lambda reply: _hear(parts, reply)
        )
        work = [
            asyncio.create_task(beat.run(), name="heartbeat"),
            asyncio.create_task(adoption.go_on(), name="adoption"),
        ]
        log.info("agent of %s serves on %s:%d", config.node, config.address, config.port)
        gc.collect()
        gc.freeze()  # what is here now stays: a collection in a blackout need not walk it
        await stop.wait()
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


def _hear(parts: Parts, reply: HeartbeatReply) -> None:
    gate = parts.gate
    if reply.quarantine != gate.ordered:
        log.critical("the controller: %s", reply.quarantine or "the quarantine is over")
    gate.ordered = reply.quarantine
    parts.residents.allow(reply.allowed)
    if reply.elsewhere is not None:
        parts.residents.place(reply.elsewhere)


class Reporter:
    """Makes the node's report, for the heartbeat and for whoever asks."""

    def __init__(self, config: AgentConfig, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        self._boot_id = secrets.token_hex(8)
        self.trouble: str | None = None

    def report(self) -> NodeReport:
        config, facts, residents = self._config, self._parts.facts, self._parts.residents
        distrust, standing = self._parts.gate.distrust, self._parts.journal.standing
        images = self._parts.images.all()
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
                images={image.name: image.digest for image in images},
                images_without_pod_ipv6=tuple(image.name for image in images if not image.pod_ipv6),
            ),
            evms=residents.reports(),
            boot_id=self._boot_id,
            journal=distrust or self.trouble,
            journal_id="" if distrust else standing.id,
            journal_seq=0 if distrust else standing.seq,
            open_roles=self._parts.roles.open(),
            mtu_bytes=residents.mtu_bytes,
            is_overlay=residents.assembler.network.is_overlay,
            no_ipv6=residents.assembler.network.no_ipv6,
            lending=self._parts.relays.lending,
        )
