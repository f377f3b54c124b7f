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

from emp.controller.book import Book, Edit
from emp.model.errors import EmpError, NodeDown
from emp.model.node import Node, NodeReport

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
        """Return the node. Raises ``NotFound``, or ``NodeDown`` saying since when."""
        node = self.get(name, field=field)
        if not node.ready:
            raise self.down(node, field=field)
        return node

    def down(self, node: Node, *, field: str | None = None) -> NodeDown:
        return NodeDown(
            f"node {node.name} is down: {since(node)}",
            field=field,
            hint=f"start its agent, or choose another node; see: emp node show {node.name}",
            node=node.name,
            last_seen_at=node.last_seen_at,
        )

    # -------------------------------------------------------------- writing

    async def heartbeat(self, report: NodeReport) -> None:
        """Take a node's report. Written to the store only where it says something new."""
        known = self._live.get(report.name)
        self._beat_at[report.name] = self._clock()
        node = Node(report=report, cordoned=known.cordoned if known else False, last_seen_at=time.time(), ready=True)
        self._live[report.name] = node
        stored = self._book.nodes.find(report.name)
        if stored is None or not stored.ready or _lasting(stored.report) != _lasting(report):
            if stored is None or not stored.ready:
                log.info("node %s is ready", report.name)
            await self._store(node)
        await _tell(self.on_report, node)

    async def cordon(self, name: str, *, cordoned: bool) -> Node:
        """Let the node take nothing new, or let it again. Raises ``NotFound``."""
        node = self.get(name).model_copy(update={"cordoned": cordoned})
        self._live[name] = node
        await self._store(node)
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
        down = node.model_copy(update={"ready": False})
        self._live[node.name] = down
        log.warning("node %s is down: %s", node.name, since(node))
        await self._store(down)
        await _tell(self.on_down, down)

    async def _store(self, node: Node) -> None:
        try:
            await self._book.write(Edit(self._book.nodes, node.name, lambda _: node))
        except EmpError as error:  # the memory is right; the next change is written again
            log.error("node %s could not be recorded: %s", node.name, error)


def since(node: Node) -> str:
    """Return since when a node has been silent, for people."""
    if not node.last_seen_at:
        return "it has never reported"
    at = datetime.fromtimestamp(node.last_seen_at, UTC)
    return f"its agent has not answered since {at:%Y-%m-%d %H:%M:%S} UTC"


def _lasting(report: NodeReport) -> NodeReport:
    """Return the report without what changes all the time and is told elsewhere."""
    return report.model_copy(update={"memory_used_bytes": 0, "evms": ()})


async def _tell(listeners: list[Listener], node: Node) -> None:
    for listener in listeners:
        try:
            await listener(node)
        except EmpError as error:
            log.error("the report of node %s could not be acted on: %s", node.name, error)
