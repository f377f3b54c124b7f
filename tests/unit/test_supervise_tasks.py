"""What a supervision does beside its turns, and leaves nothing of."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, cast

from emp.controller.supervise import Supervision
from emp.model.migration import Migration


async def test_work_that_is_ended_before_its_first_step_is_closed() -> None:
    """Else Python warns, at some later moment, that it was never awaited."""
    live = Migration(id="m-1", evm="web", source="n1", target="n2", epoch_target=5, epoch_source=4)
    tools = SimpleNamespace(book=None, volumes=None, agents=None, nodes=None, reach=None)
    supervision = Supervision(cast(Any, tools), live)

    async def watch() -> None:
        pass

    work = watch()
    supervision._spawn("watch", work)
    await supervision._end_tasks()
    assert inspect.getcoroutinestate(work) == inspect.CORO_CLOSED
