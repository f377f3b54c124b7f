"""An agent's stream of snapshots: it is never silent for long while its migration goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest

from emp.agent import api
from emp.model.migration import Stage
from emp.model.orders import Role, RolePhase, RoleStatus

STATUS = RoleStatus(
    migration="m1", evm="web", role=Role.SOURCE, phase=RolePhase.PRECOPY, stage=Stage.SOURCE_BROWNOUT, committed=False
)


async def test_a_comment_comes_where_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "WATCH_ALIVE_S", 0.02)
    goes_on = asyncio.Event()

    async def snapshots() -> AsyncGenerator[RoleStatus]:
        yield STATUS
        await goes_on.wait()
        yield STATUS

    said = [text async for text in _until_three_comments(api.watched(snapshots()), goes_on)]
    events = [text for text in said if not text.startswith(b":")]
    assert said[2:5] == [b": keep-alive\n\n"] * 3
    assert events == [f"event: status\ndata: {STATUS.model_dump_json()}\n\n".encode()] * 2


async def _until_three_comments(stream: AsyncGenerator[bytes], then: asyncio.Event) -> AsyncGenerator[bytes]:
    comments = 0
    async for text in stream:
        comments += text.startswith(b": keep")
        if comments == 3:
            then.set()
        yield text


async def test_a_reader_that_leaves_leaves_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "WATCH_ALIVE_S", 0.02)

    async def snapshots() -> AsyncGenerator[RoleStatus]:
        await asyncio.Event().wait()
        yield STATUS

    async with contextlib.aclosing(api.watched(snapshots())) as stream:
        assert [await anext(stream), await anext(stream)] == [b": connected\n\n", b": keep-alive\n\n"]
