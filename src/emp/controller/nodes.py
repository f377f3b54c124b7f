"""The pool's nodes: which report, which are down and since when. A heartbeat costs no write unless something changed.

Whether a node is down is decided by the monotonic clock of this process alone; after a restart of the controller every
node first gets the whole time in which to report. Wall-clock times are shown to people and decide nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from emp.controller import trust
from emp.controller.book import Book, Edit
from emp.model.errors import EmpError, NodeDown, Unavailable
from emp.model.evm import Evm
from emp.model.node import EvmReport, Fence, Node, NodeReport

log = logging.getLogger(__name__)

Listener = Callable[[Node], Awaitable[None]]


class Nodes:
    """``on_report`` is awaited after each heartbeat, ``on_down`` once when a node stops reporting."""

    def __init__(self, book: Book, *, down_after_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._book = book
        self._down_after_s = down_after_s
        self._clock = clock
        self._live: dict[str, Node] = {}
        self._beat_at: dict[str, float] = {}
        self._past: dict[str, set[str]] = {}
        self._writing = asyncio.Lock()
        self.on_report: list[Listener] = []
        self.on_down: list[Listener] = []

    def load(self) -> None:
        """Take over the stored nodes; those that were ready have the usual time to report again."""
        now = self._clock()
        for node in self._book.nodes.all():
            self._live[node.name] = node
            self._beat_at[node.name] = now

    # -------------------------------------------------------------- reading

    def all(self) -> list[Node]:
        return [self._live[name] for name in sorted(self._live)]

    def ready(self) -> list[Node]:
        return [node for node in self.all() if node.ready]

    def find(self, name: str | None) -> Node | None:
        return self._live.get(name) if name else None

    def get(self, name: str, *, field: str = "node") -> Node:
        """Return the node as it last reported. Raises ``NotFound``."""
        return self._live.get(name) or self._book.nodes.get(name, field=field)

    def need_ready(self, name: str, *, field: str = "node") -> Node:
        """Return the node. Raises ``NotFound``, ``NodeDown`` saying since when, or ``Unavailable`` saying why not."""
        node = self.get(name, field=field)
        if not node.ready:
            raise self.down(node, field=field)
        return self.need_trusted(name, field=field)

    def need_trusted(self, name: str, *, field: str = "node") -> Node:
        """Return the node if its word is taken. Raises ``NotFound``, or ``Unavailable`` saying why it is not."""
        node = self.get(name, field=field)
        if (why := trust.doubt(node)) is not None:
            raise Unavailable(f"node {name} takes no orders: {why}", field=field, hint=f"see: emp node show {name}")
        return node

    def down(self, node: Node, *, field: str | None = None) -> NodeDown:
        return NodeDown(
            f"node {node.name} is down: {since(node)}",
            field=field,
            hint=f"start its agent, or choose another node; see: emp node show {node.name}",
            node=node.name,
            last_seen_at=node.last_seen_at,
        )

    def elsewhere(self, node: Node) -> dict[str, str] | None:
        """Return which other node has which MAC, for one that must know; None for one that need not."""
        if not node.report.is_overlay:
            return None
        owners = ((evm.spec, evm.owner) for evm in self._book.evms.all() if evm.owner not in (None, node.name))
        return {mac: owner for spec, owner in owners if owner is not None for mac, _ in spec.addresses}

    def report_of(self, evm: Evm) -> EvmReport | None:
        """Return what its owner last said of an EVM."""
        return self.told_of(evm.spec.name, evm.owner)

    def told_of(self, evm: str, name: str | None) -> EvmReport | None:
        """Return what that node last said of an EVM."""
        node = self.find(name)
        return next((report for report in node.report.evms if report.name == evm), None) if node else None

    # -------------------------------------------------------------- writing

    async def heartbeat(self, report: NodeReport) -> None:
        """Take a node's report, unless it came late. Written to the store only where it says something new."""
        name, known = report.name, self._live.get(report.name)
        if trust.is_late(known, report) or report.boot_id in self._past.get(name, ()):
            log.info("a late report of node %s is left out", name)
            return
        if known is not None and known.report.boot_id != report.boot_id:
            self._past.setdefault(name, set()).add(known.report.boot_id)
        self._beat_at[name] = self._clock()
        node = self._live[name] = trust.heard(known, report, at_s=time.time())
        if node.quarantine is not None and (known is None or known.quarantine is None):
            log.error("node %s is quarantined: %s", name, node.quarantine)
        stored = self._book.nodes.find(name)
        if stored is None or _lasting(stored) != _lasting(node):
            if stored is None or not stored.ready:
                log.info("node %s is ready", name)
            await self._store(name)
        await _tell(self.on_report, self._live[name])

    async def cordon(self, name: str, *, cordoned: bool) -> Node:
        """Let the node take nothing new, or let it again. Raises ``NotFound``."""
        return await self.change(name, lambda node: node.model_copy(update={"cordoned": cordoned}))

    async def change(self, name: str, update: Callable[[Node], Node]) -> Node:
        """Change what is remembered of a node; on disk before it counts. Raises ``NotFound``, or as the store."""
        self._live.setdefault(name, self.get(name))
        async with self._writing:
            await self._book.write(Edit(self._book.nodes, name, lambda _: update(self._live[name])))
            self._live[name] = update(self._live[name])
        return self._live[name]

    async def fenced(self, name: str, fence: Fence) -> Node:
        """Note the proof that the node is off, and tell of its end."""
        node = await self.change(name, lambda node: node.model_copy(update={"fence": fence, "ready": False}))
        log.warning("node %s is fenced (%s, %s)", name, fence.driver, fence.by)
        await _tell(self.on_down, node)
        return node

    async def watch_over(self) -> None:
        """For ever: declare nodes down whose heartbeats have stopped."""
        while True:
            await asyncio.sleep(max(0.05, self._next_check_s()))
            await self.check()

    async def check(self) -> None:
        """Declare those nodes down that have been silent for too long."""
        for node in self.ready():
            if self._clock() - self._beat_at[node.name] >= self._down_after_s:
                await self._declare_down(node)

    def overdue(self, name: str) -> None:
        """Count the node's last heartbeat as long past: the next ``check`` finds it down."""
        self._beat_at[name] = self._clock() - self._down_after_s

    def _next_check_s(self) -> float:
        beats = [self._beat_at[node.name] for node in self.ready()]
        return min(beats, default=self._clock()) + self._down_after_s - self._clock()

    async def _declare_down(self, node: Node) -> None:
        down = self._live[node.name] = node.model_copy(update={"ready": False})
        log.warning("node %s is down: %s", node.name, since(node))
        await self._store(node.name)
        await _tell(self.on_down, down)

    async def _store(self, name: str) -> None:
        try:
            async with self._writing:
                await self._book.write(Edit(self._book.nodes, name, lambda _: self._live[name]))
        except EmpError as error:  # the memory is right; the next change is written again
            log.error("node %s could not be recorded: %s", name, error)


def since(node: Node) -> str:
    """Return since when a node has been silent, for people."""
    if not node.last_seen_at:
        return "it has never reported"
    at = datetime.fromtimestamp(node.last_seen_at, UTC)
    return f"its agent has not answered since {at:%Y-%m-%d %H:%M:%S} UTC"


def _lasting(node: Node) -> Node:
    """Return the node without what changes all the time and is told elsewhere."""
    report = node.report.model_copy(update={"memory_used_bytes": 0, "evms": (), "open_roles": (), "lending": ()})
    return node.model_copy(update={"report": report, "last_seen_at": 0.0})


async def _tell(listeners: list[Listener], node: Node) -> None:
    for listener in listeners:
        try:
            await listener(node)
        except EmpError as error:
            log.error("the report of node %s could not be acted on: %s", node.name, error)
