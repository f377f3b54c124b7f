"""What is left of a migration at an EVM's volumes, what is seen of those on their way, and what the next one learns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.controller import moves
from emp.controller.handovers import Handovers, order_of
from emp.controller.supervise import Supervision
from emp.migration.supervisor import Phase, Supervisor
from emp.model.errors import Conflict, Forbidden, StoreUnavailable
from emp.model.migration import Migration, MoveStep, Outcome, VolumeOrder, VolumeStep
from emp.model.orders import Role
from emp.model.volume import Handover, MoveOrder, VolumeType
from tests.fakes.agent import Script
from tests.fakes.pool import Pool, a_pool

IO2, GP3 = "vol-0001", "vol-0002"


@pytest.fixture
async def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pool]:
    monkeypatch.setattr(moves, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(moves, "LONGEST_PAUSE_S", 0.01)
    async with a_pool(tmp_path, "n1", "n2") as made:
        await made.create("web", volumes=["io2:16MiB", "gp3:16MiB"], node="n1")
        yield made


async def migrate(pool: Pool, **body: Any) -> Any:
    return await pool.post("/v1/evms/web/migrations", {"target": "n2", **body})


async def closed(pool: Pool, migration: Any) -> Any:
    return await pool.until(f"/v1/migrations/{migration['id']}", lambda m: m["stage"] == "closed")


async def handover(pool: Pool, volume: str) -> Handover:
    return Handover.model_validate((await pool.get(f"/v1/volumes/{volume}"))["handover"])


async def test_each_volume_has_its_handover_with_its_figures(pool: Pool) -> None:
    before_s = time.time()
    done = await closed(pool, await migrate(pool))
    multi, single = await handover(pool, IO2), await handover(pool, GP3)
    assert (multi.order, single.order) == (MoveOrder.MULTI_ATTACH, MoveOrder.RELAY)
    for made in (multi, single):
        assert (made.migration, made.source, made.target) == (done["id"], "n1", "n2")
        assert made.ended_at is not None and before_s <= made.began_at <= made.ended_at <= time.time()
        assert made.detach_ms is not None and made.attach_ms is not None
        assert (made.alarm, made.broken_off, made.tries) == (None, False, 1)
    assert multi.io_stall_ms is None and multi.relayed_bytes is None
    assert single.relayed_bytes == 12288 and single.relayed_s is not None
    assert single.io_stall_ms is not None and single.detach_ms is not None and single.attach_ms is not None
    assert single.io_stall_ms >= single.detach_ms + single.attach_ms
    assert done["moving"] == []


async def test_it_is_written_as_it_begins(pool: Pool) -> None:
    pool.agents["n1"].script = Script()
    begun = await migrate(pool)
    for volume in (IO2, GP3):
        shown = await pool.until(f"/v1/volumes/{volume}", lambda v: v["state"] == "moving" and v["handover"])
        assert (shown["handover"]["migration"], shown["handover"]["ended_at"]) == (begun["id"], None)
    await pool.post(f"/v1/migrations/{begun['id']}/abort")


async def test_an_aborted_one_is_over_and_has_not_gone_over(pool: Pool) -> None:
    pool.agents["n1"].script.target_fails = True
    assert (await closed(pool, await migrate(pool)))["outcome"] == "aborted"
    for volume in (IO2, GP3):
        made = await handover(pool, volume)
        assert made.broken_off and made.ended_at is not None
        assert (await pool.get(f"/v1/volumes/{volume}"))["state"] == "in-use"
    assert (await handover(pool, GP3)).relayed_since is None


async def test_a_refused_move_has_its_alarm_until_it_is_done(pool: Pool) -> None:
    pool.volumes.failing["detach"] = Forbidden("UnauthorizedOperation")
    begun = await migrate(pool)
    shown = await pool.until(f"/v1/volumes/{GP3}", lambda v: bool(v["handover"] and v["handover"]["alarm"]))
    assert shown["state"] == "relayed"
    stuck = Handover.model_validate(shown["handover"])
    assert stuck.alarm is not None and "stays relayed by n1" in stuck.alarm and "UnauthorizedOperation" in stuck.alarm
    assert stuck.relayed_since is not None and stuck.ended_at is None
    assert "UnauthorizedOperation" in (await pool.get(f"/v1/migrations/{begun['id']}"))["hint"]
    await pool.until(f"/v1/volumes/{GP3}", lambda v: v["handover"]["tries"] >= 3)
    del pool.volumes.failing["detach"]
    (move,) = (await closed(pool, begun))["report"]["volumes"]
    made = await handover(pool, GP3)
    assert (made.alarm, made.broken_off) == (None, False)
    assert made.tries == move["tries"] >= 3
    assert made.relayed_since == stuck.relayed_since


async def test_an_evm_whose_volume_stays_relayed_is_stopped_and_not_moved_on(pool: Pool) -> None:
    pool.volumes.failing["detach"] = Forbidden("EC2 refuses: UnauthorizedOperation")
    begun = await migrate(pool)
    path = f"/v1/migrations/{begun['id']}"
    await pool.until(path, lambda m: "stays relayed by n1" in (m["hint"] or ""))
    with pytest.raises(Conflict, match=r"runs on n2, and .* stays relayed by n1.*UnauthorizedOperation") as refused:
        await pool.post("/v1/evms/web/migrations", {"target": "n1", "dry_run": True})
    assert "emp evm stop web" in (refused.value.hint or "")
    stopped = await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    assert (stopped["state"], stopped["owner"], stopped["migration"]) == ("stopped", "n2", None)
    done = await pool.get(path)
    assert (done["outcome"], done["hint"], done["moving"]) == ("completed", None, [])
    assert pool.agents["n1"].lent == set(), "nothing is lent any more"
    assert pool.volumes.holders(GP3).keys() == {"n1"}, "where the cloud left it"
    left = await handover(pool, GP3)
    assert left.broken_off and left.alarm is not None
    del pool.volumes.failing["detach"]
    await pool.post("/v1/evms/web/start", {"node": "n2"})
    assert pool.volumes.holders(GP3).keys() == {"n2"}


async def test_an_evm_that_still_needs_its_source_is_not_stopped(pool: Pool) -> None:
    script = pool.agents["n1"].script = Script()
    script.precopy.set()
    script.blackout.set()
    begun = await migrate(pool)
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["committed"])
    with pytest.raises(Conflict, match=begun["id"]):
        await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    script.clearing.set()
    await closed(pool, begun)


async def test_the_steps_are_seen_while_they_are_taken(pool: Pool) -> None:
    detaching, go_on = asyncio.Event(), asyncio.Event()
    detach = pool.volumes.detach

    async def slow(volume: str, **where: Any) -> None:
        if volume == GP3:
            detaching.set()
            await go_on.wait()
        await detach(volume, **where)

    pool.volumes.detach = slow  # type: ignore[method-assign]  # the service takes its time
    begun = await migrate(pool)
    path = f"/v1/migrations/{begun['id']}"
    seen: list[list[Any]] = []

    async def follow() -> None:
        async with contextlib.aclosing(pool.api.events(f"{path}/events", last_event_id="")) as events:
            async for event in events:
                seen.append(json.loads(event.data)["moving"])

    following = asyncio.create_task(follow())
    await detaching.wait()
    (moving,) = (await pool.get(path))["moving"]
    assert (moving["volume"], moving["type"], moving["step"]) == (GP3, "gp3", "detach")
    assert moving["expected_ms"] == 2000.0, "what is usual at this service, as nothing was measured yet"
    assert abs(moving["held_since"] - time.time()) < 30
    go_on.set()
    assert (await closed(pool, begun))["moving"] == []
    await following
    steps = [shown[0]["step"] for shown in seen if shown]
    assert "detach" in steps and seen[-1] == []


async def test_the_next_plan_expects_what_the_last_move_took(pool: Pool) -> None:
    async def expected() -> str:
        plan = await migrate(pool, dry_run=True)
        return str(next(check["message"] for check in plan["checks"] if check["name"] == f"volume {GP3}"))

    assert "about 2.0 s" in await expected()
    detach = pool.volumes.detach

    async def slow(volume: str, **where: Any) -> None:
        await asyncio.sleep(0.3 if volume == GP3 else 0)
        await detach(volume, **where)

    pool.volumes.detach = slow  # type: ignore[method-assign]  # the service takes its time
    await closed(pool, await migrate(pool))
    took = await handover(pool, GP3)
    assert took.detach_ms is not None and took.attach_ms is not None and took.detach_ms >= 300
    assert pool.controller is not None
    learnt = pool.controller.services.volumes.expected_ms()
    assert learnt[VolumeType.GP3] == pytest.approx(took.detach_ms + took.attach_ms)
    await closed(pool, await pool.post("/v1/evms/web/migrations", {"target": "n1"}))
    assert "about 2.0 s" not in await expected()


async def test_a_restarted_controller_keeps_what_is_written(pool: Pool) -> None:
    """Killed with the io2 gone over and the gp3 under way: both are moved once, each with the figures it had."""
    pool.volumes.failing["detach"] = Forbidden("UnauthorizedOperation")
    begun = await migrate(pool)
    stuck = await pool.until(f"/v1/volumes/{GP3}", lambda v: bool(v["handover"] and v["handover"]["alarm"]))
    await pool.restart()
    del pool.volumes.failing["detach"]
    await closed(pool, begun)
    made = await handover(pool, GP3)
    assert made.began_at == stuck["handover"]["began_at"]
    assert made.relayed_since == stuck["handover"]["relayed_since"]
    assert made.ended_at is not None and not made.broken_off and made.alarm is None
    multi = await handover(pool, IO2)
    assert multi.ended_at is not None and not multi.broken_off


async def test_a_restarted_controller_does_not_measure_again_what_has_been_moved(pool: Pool) -> None:
    pool.volumes.failing["fence"] = Forbidden("UnauthorizedOperation")  # so that the source is not cleared
    begun = await migrate(pool)
    moved = await pool.until(f"/v1/volumes/{GP3}", lambda v: bool(v["handover"] and v["handover"]["ended_at"]))
    (reported,) = (await pool.get(f"/v1/migrations/{begun['id']}"))["report"]["volumes"]
    await pool.restart()
    del pool.volumes.failing["fence"]
    done = await closed(pool, begun)
    assert await handover(pool, GP3) == Handover.model_validate(moved["handover"])
    assert done["report"]["volumes"] == [reported] and reported["hold_s"] is not None


async def test_what_could_not_be_written_is_written_with_the_end(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool.controller is not None
    book, volumes = pool.controller.services.book, pool.controller.services.volumes
    live = Migration(id="m-1", evm="web", source="n1", target="n2", epoch_target=8, epoch_source=9)
    handovers = Handovers(book, volumes, live, lambda _: None)

    async def refuse(*_: Any) -> None:
        raise StoreUnavailable("the store is away")

    with monkeypatch.context() as away:
        away.setattr(book, "write", refuse)
        await handovers.begin((IO2, GP3))
        async with handovers.timed(IO2, "detach_ms"):
            await asyncio.sleep(0)
        await handovers.went_over((IO2,))
    assert book.volumes.get(IO2).handover is None
    await book.write(*handovers.edits((IO2, GP3, "vol-gone"), Outcome.COMPLETED, 7.0))
    multi, single = book.volumes.get(IO2).handover, book.volumes.get(GP3).handover
    assert multi is not None and multi.detach_ms is not None and not multi.broken_off and multi.ended_at != 7.0
    assert single is not None and single.broken_off, "it is attached to the source alone"
    assert book.volumes.find("vol-gone") is None


async def test_what_never_began_leaves_the_last_one_as_it_was(pool: Pool) -> None:
    assert pool.controller is not None
    book, volumes = pool.controller.services.book, pool.controller.services.volumes
    await closed(pool, await migrate(pool))
    last = await handover(pool, GP3)
    live = Migration(id="m-1", evm="web", source="n2", target="n1", epoch_target=80, epoch_source=90)
    await book.write(*Handovers(book, volumes, live, lambda _: None).edits((GP3,), Outcome.ABORTED, 7.0))
    assert await handover(pool, GP3) == last


@pytest.mark.parametrize(("outcome", "alarm"), [(Outcome.LOST, "vol-0002 is gone"), (Outcome.COMPLETED, None)])
async def test_the_alarm_stays_where_a_volume_has_not_gone_over(
    pool: Pool, outcome: Outcome, alarm: str | None
) -> None:
    assert pool.controller is not None
    book, volumes = pool.controller.services.book, pool.controller.services.volumes
    live = Migration(id="m-1", evm="web", source="n2", target="n1", epoch_target=8, epoch_source=9)  # it is at n1
    handovers = Handovers(book, volumes, live, lambda _: None)
    await handovers.note({GP3: "vol-0002 is gone"}, {}, {GP3: 6})
    await book.write(*handovers.edits((GP3,), outcome, 7.0))
    made = await handover(pool, GP3)
    assert (made.alarm, made.tries, made.broken_off) == (alarm, 6, alarm is not None)


@pytest.mark.parametrize(
    ("kind", "order", "goes"),
    [
        (VolumeType.IO2, VolumeOrder.CLASSIC, MoveOrder.MULTI_ATTACH),
        (VolumeType.IO1, VolumeOrder.RESUME_FIRST, MoveOrder.MULTI_ATTACH),
        (VolumeType.GP3, VolumeOrder.CLASSIC, MoveOrder.CLASSIC),
        (VolumeType.GP2, VolumeOrder.RESUME_FIRST, MoveOrder.RELAY),
        (VolumeType.SHARED, VolumeOrder.CLASSIC, MoveOrder.SHARED),
    ],
)
def test_the_order_is_by_type_and_policy(kind: VolumeType, order: VolumeOrder, goes: MoveOrder) -> None:
    assert order_of(kind, order) is goes


async def test_a_target_that_waits_for_its_volumes_is_not_taken_for_cut_off(pool: Pool) -> None:
    """In the classic order the source hears nothing of it until they are there, and wants a courier."""
    assert pool.controller is not None
    services = pool.controller.services
    tools = services.migrations._tools
    live = Migration(id="m-1", evm="web", source="n1", target="n2", epoch_target=8, epoch_source=9)
    waits = Supervision(tools, live)
    waits._state = Supervisor(phase=Phase.WATCHING, wanted=frozenset({Role.SOURCE}))
    assert "cannot reach each other" in str(waits._waits_for())
    waits._tally.moving((VolumeStep(volume=GP3, type=VolumeType.GP3, step=MoveStep.DETACH),))
    assert waits._waits_for() is None
