"""What a migration asks of the services of the EVM's volumes before it begins, and what comes of their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emp.controller import volumes
from emp.controller.survey import REMEMBERED, expected_ms
from emp.model.errors import Conflict, NoPlacement, Refused, Unreachable
from emp.model.volume import Handover, MoveOrder, Volume, VolumeType
from tests.fakes.pool import Pool, a_pool

WHY = "it is in eu-west-1b, n2 in eu-west-1a"


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2", "n3") as made:
        yield made


async def made(pool: Pool) -> str:
    return str((await pool.create("web", node="n1", volumes=["io2:16MiB"]))["spec"]["volumes"][0])


async def migrate(pool: Pool, **body: Any) -> Any:
    return await pool.post("/v1/evms/web/migrations", body)


def line(migration: Any, volume: str) -> tuple[bool, str]:
    (check,) = (c for c in migration["checks"] if c["name"] == f"volume {volume}")
    return check["ok"], check["message"]


async def test_a_volume_that_cannot_follow_stops_the_move_before_it_costs_anything(pool: Pool) -> None:
    volume = await made(pool)
    pool.volumes.obstructed["n2"] = {volume: WHY}
    with pytest.raises(Refused, match=f"volume {volume}: io2, 16 MiB: {WHY}"):
        await migrate(pool, target="n2")
    assert pool.volumes.holders(volume).keys() == {"n1"}
    planned = await migrate(pool, target="n2", dry_run=True)
    assert line(planned, volume) == (False, f"io2, 16 MiB: {WHY}")
    assert (await pool.get("/v1/migrations"))["items"] == []


async def test_placement_takes_a_node_that_the_volumes_can_follow_to(pool: Pool) -> None:
    volume = await made(pool)
    pool.volumes.obstructed["n2"] = {volume: WHY}
    planned = await migrate(pool, dry_run=True)
    assert (planned["target"], WHY in planned["placement"]) == ("n3", True)
    assert line(planned, volume) == (True, "io2, 16 MiB: attached to n3 before the pause; no I/O stall beyond it")
    pool.volumes.obstructed["n3"] = {volume: "n3 takes 27 volumes"}
    with pytest.raises(NoPlacement, match="n3 takes 27 volumes"):
        await migrate(pool)


async def test_a_volume_deleted_behind_the_pools_back_is_named(pool: Pool) -> None:
    volume = await made(pool)
    del pool.volumes.volumes[volume]
    with pytest.raises(Refused, match=f"volume {volume}: .*does not know it any more"):
        await migrate(pool, target="n2")


async def test_a_service_that_does_not_answer_stops_the_move(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = await made(pool)
    pool.volumes.failing["obstacles"] = Unreachable("the cloud is away")
    with pytest.raises(Refused, match="could not be asked whether it can move: the cloud is away"):
        await migrate(pool, target="n2")
    del pool.volumes.failing["obstacles"]
    monkeypatch.setattr(volumes, "SURVEY_S", 0.05)
    pool.volumes.silent.add("obstacles")
    with pytest.raises(Refused, match=r"has not said within 0\.05 s"):
        await migrate(pool, target="n2")
    pool.volumes.silent.clear()
    assert line(await migrate(pool, target="n2", dry_run=True), volume)[0]


async def test_an_evm_without_volumes_asks_nobody(pool: Pool) -> None:
    await pool.create("web", node="n1")
    pool.volumes.failing["obstacles"] = Unreachable("the cloud is away")
    assert (await migrate(pool, target="n2"))["stage"] == "preparation"


async def test_volumes_that_change_while_the_service_is_asked_stop_the_move(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = await made(pool)
    assert pool.controller is not None
    book = pool.controller.services.book
    pool.volumes.silent.add("obstacles")
    asking = asyncio.create_task(migrate(pool, target="n2"))
    await pool.volumes.asked.wait()
    spec = book.evms.get("web").spec.model_copy(update={"volumes": (volume, "vol-9")})
    await book.update(book.evms, "web", lambda evm: evm.model_copy(update={"spec": spec}))
    pool.volumes.silent.clear()
    pool.volumes.go_on.set()
    with pytest.raises(Conflict, match="the volumes of EVM web have changed"):
        await asking


# ------------------------------------------------------------------ what a move is expected to take


def moved(kind: VolumeType, detach_ms: float | None, attach_ms: float | None, ended_at: float | None = 1.0) -> Volume:
    move = Handover(
        migration="m-1", order=MoveOrder.RELAY, source="n1", target="n2", began_at=0.0,
        ended_at=ended_at, detach_ms=detach_ms, attach_ms=attach_ms,
    )  # fmt: skip
    return Volume(id="vol-1", type=kind, size_bytes=1 << 30, serial="vol1", handover=move)


def test_until_one_was_measured_a_move_takes_what_is_usual() -> None:
    unmeasured = [moved(VolumeType.GP3, None, 2.0), moved(VolumeType.GP3, 1.0, 2.0, ended_at=None)]
    assert expected_ms(unmeasured, usual_s=7.0) == {VolumeType.GP3: 7000.0, VolumeType.GP2: 7000.0}
    assert expected_ms([], usual_s=None) == {}


def test_what_moves_of_a_type_took_is_what_the_next_is_expected_to_take() -> None:
    known = [moved(VolumeType.GP3, 1000.0 * number, 500.0) for number in (4, 5, 9)]
    known += [moved(VolumeType.IO2, 10.0, 10.0)]
    assert expected_ms(known, usual_s=7.0) == {VolumeType.GP3: 5500.0, VolumeType.GP2: 7000.0}
    assert expected_ms(known, usual_s=None) == {VolumeType.GP3: 5500.0}


def test_old_moves_are_forgotten() -> None:
    old = [moved(VolumeType.GP3, 60_000.0, 0.0, ended_at=float(at)) for at in range(1, 30)]
    new = [moved(VolumeType.GP3, 3000.0, 0.0, ended_at=100.0 + at) for at in range(REMEMBERED)]
    assert expected_ms([*new, *old], usual_s=7.0)[VolumeType.GP3] == 3000.0
