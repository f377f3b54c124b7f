"""What a volume's state is, for every way in which it, its EVM and a migration can stand together; and at the API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emp.controller.volume_states import state_of
from emp.model.errors import NotFound, Unreachable
from emp.model.evm import Evm, EvmState
from emp.model.migration import Migration, Stage
from emp.model.volume import Attachment, Handover, MoveOrder, Volume, VolumeState, VolumeType
from tests.fakes.agent import Script
from tests.fakes.pool import Pool, a_pool
from tests.fakes.values import MIB, a_spec

OPEN = Migration(id="m-1", evm="web", source="n1", target="n2", epoch_target=2, epoch_source=3, stage=Stage.BLACKOUT)
CLOSED = OPEN.model_copy(update={"stage": Stage.CLOSED})


def at(*nodes: str, evm: str | None = "web", fault: str | None = None) -> Volume:
    attachments = tuple(Attachment(volume="vol-1", node=node, epoch=1) for node in nodes)
    made = Volume(id="vol-1", type=VolumeType.GP3, size_bytes=MIB, serial="vol1", evm=evm, attachments=attachments)
    return made.model_copy(update={"fault": fault})


def web(owner: str | None, state: EvmState = EvmState.RUNNING) -> Evm:
    return Evm(spec=a_spec(), owner=owner, state=state)


@pytest.mark.parametrize(
    ("volume", "evm", "migration", "state"),
    [
        (at(evm=None), None, None, VolumeState.AVAILABLE),
        (at("n1", evm=None), None, None, VolumeState.IN_USE),  # what an EVM that is gone left behind
        (at(), web("n1", EvmState.STOPPED), None, VolumeState.IDLE),
        (at(), web(None, EvmState.CREATING), None, VolumeState.IDLE),
        (at("n1"), web("n1"), None, VolumeState.IN_USE),
        (at("n1"), web("n1", EvmState.UNKNOWN), None, VolumeState.IN_USE),
        (at("n1", "n2"), web("n2"), None, VolumeState.IN_USE),
        (at("n1"), web("n1"), OPEN, VolumeState.MOVING),
        (at("n1", "n2"), web("n1"), OPEN, VolumeState.MOVING),
        (at("n2"), web("n1"), OPEN, VolumeState.MOVING),  # the classic order, before the commit is on record
        (at(), web("n1"), OPEN, VolumeState.MOVING),
        (at("n1"), web("n2"), OPEN, VolumeState.RELAYED),
        (at(), web("n2"), OPEN, VolumeState.MOVING),
        (at("n2"), web("n2"), OPEN, VolumeState.MOVING),
        (at("n1"), web("n2"), CLOSED, VolumeState.RELAYED),
        (at("n1"), web("n2"), None, VolumeState.RELAYED),
        (at("n1"), web("n2", EvmState.CRASHED), None, VolumeState.IN_USE),
        (at("n1", fault="it is gone"), web("n1"), OPEN, VolumeState.ERROR),
    ],
)
def test_the_state_follows_from_the_records(
    volume: Volume, evm: Evm | None, migration: Migration | None, state: VolumeState
) -> None:
    assert state_of(volume, evm, migration, deleting=False) is state
    assert state_of(volume, evm, migration, deleting=True) is VolumeState.DELETING


# ------------------------------------------------------------------ at the API


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


async def states(pool: Pool, volume: str) -> tuple[str, str]:
    """Return what ``list`` and ``show`` say; they must not differ."""
    (listed,) = (v["state"] for v in (await pool.get("/v1/volumes"))["items"] if v["id"] == volume)
    return listed, (await pool.get(f"/v1/volumes/{volume}"))["state"]


async def test_from_its_making_to_its_deletion(pool: Pool) -> None:
    made = await pool.post("/v1/volumes", {"size_bytes": "16MiB"})
    assert (made["state"], made["driver"]) == ("available", "fake")
    volume = made["id"]
    await pool.create("web", node="n1", volumes=[volume])
    assert await states(pool, volume) == ("in-use", "in-use")
    script = pool.agents["n1"].script = Script()
    begun = await pool.post("/v1/evms/web/migrations", {"target": "n2"})
    assert await states(pool, volume) == ("moving", "moving")
    for event in (script.precopy, script.blackout, script.clearing):
        event.set()
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "closed")
    assert await states(pool, volume) == ("in-use", "in-use")
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    assert await states(pool, volume) == ("idle", "idle")
    await pool.delete("/v1/evms/web")
    assert await states(pool, volume) == ("available", "available")

    pool.volumes.hold.clear()
    deleting = asyncio.create_task(pool.delete(f"/v1/volumes/{volume}"))
    await pool.until(f"/v1/volumes/{volume}", lambda v: v["state"] == "deleting")
    pool.volumes.hold.set()
    await deleting
    with pytest.raises(NotFound):
        await pool.get(f"/v1/volumes/{volume}")


async def test_a_deletion_that_failed_is_not_one_that_goes_on(pool: Pool) -> None:
    volume = (await pool.post("/v1/volumes", {"size_bytes": "16MiB"}))["id"]
    pool.volumes.failing["delete"] = Unreachable("the service is away")
    with pytest.raises(Unreachable):
        await pool.delete(f"/v1/volumes/{volume}")
    assert await states(pool, volume) == ("available", "available")


async def test_what_was_deleted_behind_the_pools_back_is_in_error(pool: Pool) -> None:
    volume = (await pool.post("/v1/volumes", {"size_bytes": "16MiB"}))["id"]
    kept = pool.volumes.volumes.pop(volume)
    assert (await pool.get(f"/v1/volumes/{volume}"))["state"] == "error"
    (listed,) = (await pool.get("/v1/volumes"))["items"]
    assert (listed["state"], "does not know it any more" in listed["fault"]) == ("error", True)
    pool.volumes.volumes[volume] = kept
    assert await states(pool, volume) == ("error", "available"), "show asks the service"
    assert await states(pool, volume) == ("available", "available")
    del pool.volumes.volumes[volume]
    assert pool.controller is not None
    await pool.controller.services.volumes.load()
    (listed,) = (await pool.get("/v1/volumes"))["items"]
    assert listed["state"] == "error", "and so does the housekeeping"


async def test_a_service_that_is_away_leaves_the_record_as_it_stands(pool: Pool) -> None:
    volume = (await pool.post("/v1/volumes", {"size_bytes": "16MiB"}))["id"]
    pool.volumes.failing["describe"] = Unreachable("the service is away")
    assert await states(pool, volume) == ("available", "available")


async def test_the_last_move_stays_whatever_the_service_says(pool: Pool) -> None:
    assert pool.controller is not None
    volume = (await pool.post("/v1/volumes", {"size_bytes": "16MiB"}))["id"]
    move = Handover(migration="m-1", order=MoveOrder.RELAY, source="n1", target="n2", began_at=1.0, alarm="stuck")
    book = pool.controller.services.book
    await book.update(book.volumes, volume, lambda v: v.model_copy(update={"handover": move}))
    assert Handover.model_validate((await pool.get(f"/v1/volumes/{volume}"))["handover"]) == move
    await pool.restart()
    assert Handover.model_validate((await pool.get(f"/v1/volumes/{volume}"))["handover"]) == move
