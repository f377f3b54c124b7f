"""Asking again until it is known what became of an order: a lost answer decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from emp.controller.book import Book
from emp.controller.nodes import Nodes
from emp.model.errors import EmpError, OutcomeUnknown, Unavailable, Unreachable

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0


async def until_known(
    book: Book,
    nodes: Nodes,
    node: str | None,
    call: Callable[[], Awaitable[T]],
    *,
    sent: bool = True,
    on_wait: Callable[[EmpError], Awaitable[None]] | None = None,
) -> T:
    """Return what ``call`` answers; it must be an order that may be repeated.

    While ``node`` is down it is not asked. ``sent`` False says that nobody was asked before: then a peer that cannot be
    reached has done nothing, and ``Unreachable`` is raised at once. Any other refusal is raised.
    """
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except (Unavailable, OutcomeUnknown) as error:
            if isinstance(error, Unreachable) and not sent:
                raise
            sent = True
            log.warning("%s; asking again", error)
            if on_wait is not None:
                await on_wait(error)
        await _breath(book, nodes, node, pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


async def _breath(book: Book, nodes: Nodes, node: str | None, pause_s: float) -> None:
    """Wait a while, or, if ``node`` is down, until it is back or fenced."""
    if node is None or _is_ready(nodes, node) or _is_fenced(nodes, node):
        await asyncio.sleep(pause_s)
        return
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(60.0):
            await book.until(lambda: _is_ready(nodes, node) or _is_fenced(nodes, node))


def _is_ready(nodes: Nodes, name: str) -> bool:
    node = nodes.find(name)
    return node is not None and node.ready


def _is_fenced(nodes: Nodes, name: str) -> bool:
    node = nodes.find(name)
    return node is not None and node.fence is not None
