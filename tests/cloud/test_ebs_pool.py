"""A whole controller over the simulated cloud: what becomes of a move when the cloud changes behind its back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from emp.controller import moves
from emp.lab.cloud.knobs import Fault, Harm
from emp.model.errors import NotFound
from tests.cloud.simulator import HandClock, Simulator
from tests.cloud.test_ebs_driver import driver_of
from tests.fakes.pool import Pool, a_pool


@pytest.fixture
async def pool(
    tmp_path: Path, simulator: Simulator, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pool]:
    """An EVM on n1 with a gp3 volume of the cloud; its agents are fakes."""
    monkeypatch.setattr(moves, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(moves, "LONGEST_PAUSE_S", 0.05)
    driver = driver_of(simulator, clock)
    try:
        async with a_pool(tmp_path, "n1", "n2", volumes=cast(Any, driver)) as made:
            await made.create("web", volumes=["gp3:1GiB"], node="n1")
            yield made
    finally:
        await driver.aclose()


async def test_a_volume_deleted_between_detach_and_attach_is_told_of_and_holds_nothing_up(
    pool: Pool, simulator: Simulator, ec2: Any
) -> None:
    (volume,) = (await pool.get("/v1/evms/web"))["spec"]["volumes"]
    simulator.turn(faults=[Fault(harm=Harm.DENIED, action="AttachVolume", times=None)])
    begun = await pool.post("/v1/evms/web/migrations", {"target": "n2"})
    path = f"/v1/migrations/{begun['id']}"
    await pool.until(path, lambda m: f"{volume} is not moved yet" in (m["hint"] or ""))
    assert (await pool.get("/v1/evms/web"))["owner"] == "n2", "the guest has been there since the blackout"
    ec2.delete_volume(VolumeId=volume)
    simulator.turn()
    done = await pool.until(path, lambda m: m["stage"] == "closed")
    assert done["outcome"] == "completed"
    shown = await pool.get(f"/v1/volumes/{volume}")
    assert shown["state"] == "error" and "does not know it any more" in shown["fault"]
    assert shown["handover"]["broken_off"] and "is gone, and its I/O waits for ever" in shown["handover"]["alarm"]
    evm = await pool.get("/v1/evms/web")
    assert (evm["owner"], evm["state"], evm["migration"]) == ("n2", "running", None)
    await pool.delete("/v1/evms/web")
    with pytest.raises(NotFound):
        await pool.get(f"/v1/volumes/{volume}")
