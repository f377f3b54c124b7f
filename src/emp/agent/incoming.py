"""Links that peers have opened: each goes to the role it is for, or gets the journal's last word where that is over."""

from __future__ import annotations

import asyncio
import logging

from emp.agent.gate import Gate
from emp.agent.journal import Journal, Standing
from emp.agent.links import answer_from_journal, hello, standing_in
from emp.agent.roles import Roles
from emp.agent.target import TargetRole
from emp.wire.identity import Identity, Role
from emp.wire.link import Link

log = logging.getLogger(__name__)


class IncomingLinks:
    def __init__(self, journal: Journal, roles: Roles, gate: Gate) -> None:
        self._journal = journal
        self._roles = roles
        self._gate = gate
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, link: Link) -> None:
        """Serve a link that a source has opened, until it ends."""
        task = asyncio.create_task(self._serve(link), name=f"link from {link.peer}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, link: Link) -> None:
        """``hello`` says for which migration it is, and how far the peer's journal is."""
        async for message in link:
            standing = standing_in(message)
            if standing is None or not isinstance(migration := message.get("migration"), str):
                break
            await link.send(hello(self._journal, migration))
            if message.get("carries") == "frames":
                await self._take_frames(link, migration)
            else:
                await self._route(link, migration, standing)
            return
        await link.close()

    async def _take_frames(self, link: Link, migration: str) -> None:
        """The target may be running by now, and its role over."""
        role = self._roles.get(migration)
        if isinstance(role, TargetRole) and role.assembly and link.peer == Identity(Role.AGENT, role.state.source):
            await role.take_frames(link)
        else:
            log.warning("%s: frames from %s for an EVM that is not here by it", migration, link.peer)
            await link.close()

    async def _route(self, link: Link, migration: str, standing: Standing) -> None:
        role = self._roles.get(migration)
        if role is not None and not role.phase.final:
            other = role.state.source if isinstance(role, TargetRole) else role.state.target
            if link.peer != Identity(Role.AGENT, other):
                log.warning("%s: %s has no part in it", migration, link.peer)
                await link.close()
                return
            await role.serve(link, standing)
        async for message in link:  # over here: the journal has the last word, if it is to be believed
            if self._gate.closed or link.peer is None:
                continue
            if answer := answer_from_journal(self._journal, migration, message, peer=link.peer.name):
                await link.send(answer)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
