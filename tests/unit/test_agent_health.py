"""The last look at a target's volumes, before it says that it has everything."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from emp.agent import health
from emp.agent.health import Health
from emp.model.errors import Unreachable


class Probe:
    """Fails ``broken`` times, then answers; hangs if ``hangs``."""

    def __init__(self, *, broken: int = 0, hangs: bool = False) -> None:
        self.broken, self.hangs, self.reads, self.at_once = broken, hangs, 0, 0

    async def read(self) -> None:
        self.reads += 1
        self.at_once += 1
        assert self.at_once == 1, "a connection takes one question at a time"
        try:
            await asyncio.sleep(0)
            if self.hangs:
                await asyncio.Event().wait()
            if self.broken:
                self.broken -= 1
                raise Unreachable("the connection is an old one")
        finally:
            self.at_once -= 1

    async def close(self) -> None: ...


@contextlib.asynccontextmanager
async def looked_after(**probes: Probe) -> AsyncIterator[Health]:
    made = Health(cast(Any, None), cast(Any, None), probes)
    try:
        yield made
    finally:
        await made.close()


async def test_every_volume_is_read_anew() -> None:
    first, second = Probe(), Probe()
    async with looked_after(a=first, b=second) as made:
        made.look_at_volumes()
        await asyncio.sleep(0)  # these reads have begun, and count as from before
        assert await made.unread_volumes(time.monotonic()) == []
    assert (first.reads, second.reads) == (2, 2)


async def test_a_connection_that_broke_is_tried_again() -> None:
    async with looked_after(a=Probe(broken=2)) as made:
        assert await made.unread_volumes(made.look_at_volumes()) == []


async def test_a_question_of_the_source_meanwhile_disturbs_no_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async with looked_after(a=Probe(broken=3)) as made:
        looking = asyncio.create_task(made.unread_volumes(made.look_at_volumes()))
        while not looking.done():
            made.look_at_volumes()  # as at each question
            await asyncio.sleep(0)
        assert looking.result() == []


async def test_the_silent_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LAST_LOOK_S", 0.2)
    async with looked_after(good=Probe(), hung=Probe(hangs=True), gone=Probe(broken=1000)) as made:
        assert await made.unread_volumes(made.look_at_volumes()) == ["hung", "gone"]


async def test_nothing_is_read_once_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "AGAIN_S", 0.0)
    probe = Probe(broken=1000)
    async with looked_after(a=probe) as made:
        looking = asyncio.create_task(made.unread_volumes(made.look_at_volumes()))
        while probe.reads < 3:  # noqa: ASYNC110 - a read is no event
            await asyncio.sleep(0)
    reads = probe.reads
    assert await looking == ["a"]
    assert probe.reads == reads
