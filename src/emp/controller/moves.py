"""Volumes that one node alone can have, in one migration: lent by the source, moved once the EVM runs at the target.

::

    target's relay          controller            source's relay
      | hold: nothing outstanding, all flushed        |
      |<-------------------- |                        |
      |                      | take back ------------>| ends
      |                      | detach, attach (the cloud)
      |<------------ go on   |
      | at its own attachment; then the relay ends

Each step may be repeated, and where to go on is read from where the volume is attached: so a controller that was killed
in between, or whose order was not answered, just begins again. What is refused leaves the volume with the source: its
I/O goes on through the relay, people are told, and it is tried again. An EVM that ends at the target meanwhile, by an
order or by itself, needs its volumes nowhere: they stay where they are for its next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from emp.controller.agents import AgentClient, Agents
from emp.controller.nodes import Nodes
from emp.controller.tasks import all_of
from emp.controller.volumes import Volumes
from emp.model.errors import EmpError, NotFound, OutcomeUnknown, StaleEpoch, Unavailable
from emp.model.migration import Migration, MoveStep, VolumeMove, VolumeOrder
from emp.model.orders import GoOnOrder, HoldOrder, LendOrder, Relayed, TakeBackOrder, VolumeGrant
from emp.model.volume import Volume

log = logging.getLogger(__name__)

HOLD_S = 5.0
"""for what is on its way through the relays to be answered"""
ALARM_S = 15.0
"""a move that takes longer is told to people"""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""between tries"""
LOOKS = 6
"""before a volume that its service does not know is taken for gone, about half a minute: a cloud's answers lag"""

Say = Callable[[], Awaitable[None]]
At = Callable[[str, MoveStep | None], None]


class _Gone(Exception):
    """The EVM, and with it every relay, is gone from the target, so that it needs no volume there."""


@dataclass
class Moves:
    """Of the volumes of one migration. ``say`` shows that ``alarms`` or ``made`` have changed.

    ``at`` is told each step of each volume as it begins; None: its move is over. ``until_ended`` returns once the EVM
    has ended at the target, by its agent's word.
    """

    migration: Migration
    volumes: Volumes
    agents: Agents
    nodes: Nodes
    say: Say
    at: At
    until_ended: Callable[[], Awaitable[None]]
    alarms: dict[str, str] = field(default_factory=dict)
    """volume -> why its move is not done yet, for people"""
    made: dict[str, VolumeMove] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    """volumes that the EVM, having ended, did not take along"""

    # -- before the hand-over, and back

    async def lend(self, volumes: Sequence[str]) -> tuple[VolumeGrant, ...]:
        """Have the source serve ``volumes`` to the target; return how the target gets them."""
        if not volumes:
            return ()
        held = [await self._at_source(volume) for volume in volumes]
        lent = await self._source.lend(self._lend_order(held))
        return tuple(VolumeGrant(volume=one.volume, relay=lent.endpoints[one.volume.id]) for one in held)

    async def take_back(self, volumes: Sequence[str]) -> None:
        """The EVM stays on the source: end what it has lent. A source that is down ends it when it goes back."""
        if volumes:
            await self._unless_down(self.migration.source, lambda: self._take_back(None))

    # -- behind the commit

    async def finish(self, volumes: Sequence[str]) -> None:
        """Have the target get each of ``volumes`` itself, however long it takes, while the EVM is there."""
        ending = asyncio.ensure_future(self.until_ended())
        try:
            await all_of(self._move(volume, ending) for volume in volumes)
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _move(self, volume: str, ending: asyncio.Future[None]) -> None:
        pause_s = FIRST_PAUSE_S
        if self.migration.policy.volume_order is not VolumeOrder.CLASSIC:  # else the guest stands
            self.at(volume, MoveStep.RELAYED)
        while volume not in self.made:
            self.tries[volume] = self.tries.get(volume, 0) + 1
            moving = asyncio.ensure_future(self._try(volume))
            try:
                if not (await asyncio.wait([moving], timeout=ALARM_S))[0]:
                    await self._alarm(volume, f"is on its way to {self.migration.target} for {ALARM_S:g} s and more")
                await moving
                return
            except _Gone as error:
                log.warning("%s: %s is not moved: %s", self.migration.id, volume, error)
                self.at(volume, None)
                return
            except EmpError as error:
                log.error("%s: %s: %s", self.migration.id, volume, error)
                if self.tries[volume] >= LOOKS and await self._is_no_more(volume):
                    await self._alarm(volume, f"is gone, and its I/O waits for ever: {error.message}")
                    self.at(volume, None)
                    return
                where = await self._go_on_as_before(volume, error)
                await self._alarm(volume, f"{where}: {error.message}; tried again in {pause_s:g} s")
            finally:
                moving.cancel()
                await asyncio.gather(moving, return_exceptions=True)
            if (await asyncio.wait([ending], timeout=pause_s))[0]:
                await self._leave(volume)
                return
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _try(self, volume: str) -> None:
        live, steps, relayed = self.migration, _Steps(lambda step: self.at(volume, step)), None
        if await self._is_at(volume, live.source):
            if self.tries[volume] == 1:  # its I/O goes on; before a later try it may wait
                await self.volumes.expect(volume, node=live.target, epoch=live.epoch_target)
            with steps.timed(MoveStep.HOLD):
                relayed = await self._hold(volume)
                await self._unless_down(live.source, lambda: self._take_back((volume,)))
            with steps.timed(MoveStep.DETACH):
                await self.volumes.release((volume,), node=live.source, unheld=True)
        with steps.timed(MoveStep.ATTACH):
            try:
                (grant,) = await self.volumes.attach((volume,), node=live.target, epoch=live.epoch_target)
            except StaleEpoch as error:
                raise _Gone(f"a newer owner has it: {error.message}") from error
        with steps.timed(MoveStep.LAND):
            order = GoOnOrder(evm=live.evm, epoch=live.epoch_target, grant=grant)
            try:
                landed = await self._target.go_on(live.id, order)
            except NotFound as error:
                raise _Gone(str(error)) from error
        figures = steps.figures | _relayed(relayed or landed)
        self.made[volume] = VolumeMove(volume=volume, tries=self.tries[volume], **figures)
        self.alarms.pop(volume, None)
        self.at(volume, None)
        await self.say()

    async def _leave(self, volume: str) -> None:
        """Nobody uses it any more: have nothing lent, and detach it if its service lets it go now.

        Nothing depends on the detach: the next start detaches what another node has, or happens there.
        """
        live = self.migration
        await self._unless_down(live.source, lambda: self._take_back((volume,)))
        try:
            await self.volumes.release((volume,), unheld=True)
        except EmpError as error:
            log.warning("%s: %s is left where it is attached: %s", live.id, volume, error)
        self.left.add(volume)
        self.alarms.pop(volume, None)
        self.at(volume, None)

    async def bring_home(self, volumes: Sequence[str]) -> None:
        """The EVM went back when volumes may have left already, in the classic order: have the source get them anew."""
        if self.migration.policy.volume_order is VolumeOrder.CLASSIC:
            await all_of(self._bring_home(volume) for volume in volumes)

    async def _bring_home(self, volume: str) -> None:
        live = self.migration
        try:
            held = [a.epoch for a in (await self.volumes.look(volume)).attachments if a.node == live.source]
            if held and max(held) < live.epoch_source:
                return  # it has never left
            (grant,) = await self.volumes.attach((volume,), node=live.source, epoch=live.epoch_source)
            await self._source.go_on(live.id, GoOnOrder(evm=live.evm, epoch=live.epoch_source, grant=grant))
        except NotFound as error:  # the volume, or the EVM there too: a cold start attaches what it needs
            log.warning("%s: %s is not brought home: %s", live.id, volume, error)

    async def _hold(self, volume: str) -> Relayed | None:
        """Return how its relay is, held; None if the target has none any more."""
        order = HoldOrder(evm=self.migration.evm, volume=volume, within_s=HOLD_S)
        try:
            return await self._target.hold(self.migration.id, order)
        except NotFound:
            return None
        except EmpError:
            # One that must be empty lends nothing again, so that waiting would help nobody.
            if not (self._is_down(self.migration.source) or self.migration.policy.source_must_be_empty):
                raise
            return None  # it is held, and what was on its way is sent again to wherever the volume is next

    async def _go_on_as_before(self, volume: str, error: EmpError) -> str:
        """Let a held volume's I/O go on through the source, if that can be; return how it stands, for people."""
        live = self.migration
        if live.policy.source_must_be_empty:
            return f"its I/O waits for {live.target} to get it"
        if isinstance(error, OutcomeUnknown) and not isinstance(error, Unavailable):
            return "its I/O waits, as the order may still be carried out"
        try:
            if await self._is_at(volume, live.target):
                return f"is attached to {live.target}, and its machine does not use it itself yet"
            if not await self._is_at(volume, live.source):
                await self.volumes.attach((volume,), node=live.source, epoch=live.epoch_target)
            order = self._lend_order([await self._at_source(volume)], given=True)
            lent = await self._source.lend(order)
            grant = VolumeGrant(volume=order.volumes[0].volume, relay=lent.endpoints[volume])
            await self._target.go_on(live.id, GoOnOrder(evm=live.evm, epoch=live.epoch_target, grant=grant))
        except EmpError as worse:
            log.error("%s: %s: nor does its I/O go on through %s: %s", live.id, volume, live.source, worse)
            return "is not moved yet"
        self.at(volume, MoveStep.RELAYED)
        return f"it stays relayed by {live.source}, which has to stay up"

    async def _alarm(self, volume: str, text: str) -> None:
        self.alarms[volume] = f"{volume} {text}"
        await self.say()

    # -- tools

    async def _at_source(self, volume: str) -> VolumeGrant:
        """Return the volume as it is attached to the source. Raises ``NotFound`` where it is not."""
        found = await self.volumes.look(volume)
        held = [attachment for attachment in found.attachments if attachment.node == self.migration.source]
        if not held:
            raise NotFound(f"{volume} is not attached to {self.migration.source}", field="volume")
        return VolumeGrant(volume=found, attachment=max(held, key=lambda attachment: attachment.tag))

    async def _is_no_more(self, volume: str) -> bool:
        try:
            await self.volumes.look(volume)
        except NotFound:
            return True
        except EmpError as error:
            log.info("%s: is %s still there? %s", self.migration.id, volume, error)
        return False

    async def _is_at(self, volume: str, node: str) -> bool:
        found: Volume = await self.volumes.look(volume)
        return any(attachment.node == node for attachment in found.attachments)

    def _lend_order(self, volumes: Sequence[VolumeGrant], *, given: bool = False) -> LendOrder:
        live = self.migration
        return LendOrder(migration=live.id, evm=live.evm, target=live.target, volumes=tuple(volumes), given=given)

    async def _take_back(self, volumes: tuple[str, ...] | None) -> None:
        await self._source.take_back(self.migration.id, TakeBackOrder(volumes=volumes))

    async def _unless_down(self, node: str, call: Callable[[], Awaitable[None]]) -> None:
        """Have it done; while the node is down, do without."""
        while True:
            with contextlib.suppress(Unavailable, OutcomeUnknown):
                await call()
                return
            if self._is_down(node):
                return
            await asyncio.sleep(FIRST_PAUSE_S)

    def _is_down(self, name: str) -> bool:
        node = self.nodes.find(name)
        return node is None or not node.ready

    @property
    def _source(self) -> AgentClient:
        return self.agents.of(self.nodes.get(self.migration.source))

    @property
    def _target(self) -> AgentClient:
        return self.agents.of(self.nodes.get(self.migration.target))


class _Steps:
    """How long each step of a move took, and all of them together."""

    def __init__(self, begins: Callable[[MoveStep], None]) -> None:
        self._begins = begins
        self._took_s: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, step: MoveStep) -> Iterator[None]:
        self._begins(step)
        began_s = time.monotonic()
        yield
        self._took_s[f"{step}_s"] = round(time.monotonic() - began_s, 4)

    @property
    def figures(self) -> dict[str, Any]:
        return self._took_s | {"held_ms": round(sum(self._took_s.values()) * 1000, 1)}


def _relayed(last: Relayed) -> dict[str, Any]:
    return last.model_dump(include={"read_bytes", "written_bytes", "mean_ms", "max_ms"})
