"""Who has an EVM's volumes after each turn that it can take, on both kinds of volume service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError

from emp.controller.config import Config, EbsVolumes
from emp.controller.volumes import Volumes
from emp.controller.wiring import _volume_driver
from emp.model.errors import Conflict, OutcomeUnknown, StaleEpoch
from emp.volumes.ebs import EbsVolumeDriver
from tests.fakes.agent import Script
from tests.fakes.pool import Pool, a_pool
from tests.fakes.volumes import FakeEbs, FakeVolumes

KINDS = {"nbd": FakeVolumes, "ebs": FakeEbs}


@pytest.fixture(params=KINDS)
async def pool(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2", volumes=KINDS[request.param]()) as made:
        yield made


def is_ebs(pool: Pool) -> bool:
    return isinstance(pool.volumes, FakeEbs)


async def made(pool: Pool, wish: str = "io2:16MiB") -> tuple[Any, str]:
    evm = await pool.create("web", volumes=[wish], node="n1")
    (volume,) = evm["spec"]["volumes"]
    pool.volumes.log.clear()
    return evm, volume


async def migrate(pool: Pool) -> Any:
    return await pool.post("/v1/evms/web/migrations", {"target": "n2"})


async def closed(pool: Pool, migration: Any) -> Any:
    return await pool.until(f"/v1/migrations/{migration['id']}", lambda m: m["stage"] == "closed")


def controllers_view(pool: Pool, volume: str) -> list[tuple[str, int]]:
    assert pool.controller is not None
    record = pool.controller.services.book.volumes.get(volume)
    return [(held.node, held.epoch) for held in record.attachments]


async def went_back(pool: Pool) -> Any:
    pool.agents["n1"].script = Script()
    begun = await migrate(pool)
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["stage"] == "source-brownout")
    await pool.post(f"/v1/migrations/{begun['id']}/abort")
    pool.agents["n1"].script = Script.free()
    return await closed(pool, begun)


async def test_a_source_that_goes_back_keeps_its_volume_and_the_target_is_shut_out(pool: Pool) -> None:
    evm, volume = await made(pool)
    done = await went_back(pool)
    assert done["outcome"] == "aborted"
    target, source = done["epoch_target"], done["epoch_source"]
    held = {"n1": source if is_ebs(pool) else evm["epoch"]}
    assert pool.volumes.holders(volume) == held, "its own agent claims it, where that can be"
    assert controllers_view(pool, volume) == list(held.items())
    if is_ebs(pool):
        verbs = [(verb, node, epoch) for verb, node, epoch, _ in pool.volumes.log]
        assert verbs == [
            ("attach", "n2", target), ("attach", "n1", source), ("fence", "", source),
        ], "it is taken over before the fence, which would close it"  # fmt: skip
        with pytest.raises(StaleEpoch):
            await pool.volumes.attach(volume, node="n2", epoch=target)


async def test_there_and_back_again_after_a_way_back(pool: Pool) -> None:
    _, volume = await made(pool)
    await went_back(pool)
    done = await closed(pool, await migrate(pool))
    assert done["outcome"] == "completed"
    assert pool.volumes.holders(volume) == {"n2": done["epoch_target"]}
    assert pool.volumes.fences[volume] == done["epoch_target"]
    assert controllers_view(pool, volume) == [("n2", done["epoch_target"])]


async def test_nothing_is_taken_by_force_from_a_node_that_may_have_it_open(pool: Pool) -> None:
    await made(pool)
    await closed(pool, await migrate(pool))
    assert not any(unheld for _, _, _, unheld in pool.volumes.log)


async def test_what_a_fenced_source_had_needs_no_letting_go(pool: Pool) -> None:
    _, volume = await made(pool)
    script = pool.agents["n1"].script = Script()
    script.precopy.set()
    script.blackout.set()
    begun = await migrate(pool)
    await pool.until(f"/v1/migrations/{begun['id']}", lambda m: m["committed"])
    pool.volumes.failing["fence"] = OutcomeUnknown(f"{volume} is still busy at n1")
    await pool.lose("n1")
    await pool.post("/v1/nodes/n1/fence", {"confirm": True, "reason": "it burns"})
    del pool.volumes.failing["fence"]
    done = await closed(pool, begun)
    assert pool.volumes.holders(volume) == {"n2": done["epoch_target"]}
    assert ("fence", "", done["epoch_target"], True) in pool.volumes.log


async def test_a_cold_start_elsewhere_detaches_first_what_one_node_alone_can_have(pool: Pool) -> None:
    evm, volume = await made(pool, "gp3:16MiB")
    await pool.lose("n1")
    await pool.post("/v1/nodes/n1/fence", {"confirm": True, "reason": "it burns"})
    recovered = await pool.post("/v1/evms/web/recover")
    assert (recovered["owner"], recovered["state"]) == ("n2", "running")
    assert pool.volumes.holders(volume) == {"n2": recovered["epoch"]}
    assert pool.volumes.log == [
        ("detach", "n1", evm["epoch"], True), ("attach", "n2", recovered["epoch"], False),
        ("fence", "", recovered["epoch"], True),
    ], "its node is proven off: if it does not let go, it is made to"  # fmt: skip


async def test_a_start_on_the_same_node_takes_over_what_is_attached_there(pool: Pool) -> None:
    _, volume = await made(pool, "gp3:16MiB")
    pool.volumes.failing["detach"] = Conflict("not now")  # so that the stop leaves it attached
    await pool.post("/v1/evms/web/stop", {"grace_s": 0})
    del pool.volumes.failing["detach"]
    assert list(pool.volumes.holders(volume)) == ["n1"]
    pool.volumes.log.clear()
    started = await pool.post("/v1/evms/web/start")
    assert pool.volumes.holders(volume) == {"n1": started["epoch"]}
    assert [verb for verb, *_ in pool.volumes.log][:1] == ["attach"], "the seven seconds of a detach are not spent"
    assert controllers_view(pool, volume) == [("n1", started["epoch"])]


async def test_a_cold_start_is_patient_with_a_detach_that_hangs(pool: Pool) -> None:
    _, volume = await made(pool, "gp3:16MiB")
    await pool.lose("n1")
    await pool.post("/v1/nodes/n1/fence", {"confirm": True, "reason": "it burns"})
    pool.volumes.failing["detach"] = OutcomeUnknown(f"{volume} is still detaching at n1")
    recovering = asyncio.create_task(pool.post("/v1/evms/web/recover"))
    await pool.until("/v1/evms/web", lambda evm: "still detaching" in (evm["reason"] or ""))
    assert list(pool.volumes.holders(volume)) == ["n1"]
    del pool.volumes.failing["detach"]
    assert (await recovering)["owner"] == "n2"
    assert list(pool.volumes.holders(volume)) == ["n2"]


async def test_what_somebody_else_has_attached_is_left_to_him(tmp_path: Path) -> None:
    async with a_pool(tmp_path, "n1", volumes=(ebs := FakeEbs())) as pool:
        volume = await pool.post("/v1/volumes", {"type": "gp3", "size_bytes": "16MiB"})
        ebs.attach_by_hand(volume["id"], "i-00000000000000abc")
        with pytest.raises(Conflict, match="is attached to i-00000000000000abc"):
            await pool.create("web", volumes=[volume["id"]], node="n1")
        assert ebs.holders(volume["id"]) == {"i-00000000000000abc": 0}
        assert [verb for verb, *_ in ebs.log if verb == "detach"] == []


# ---------------------------------------------------------------- one order at a time


async def of(pool: Pool) -> Volumes:
    assert pool.controller is not None
    return pool.controller.services.volumes


async def test_a_newer_attachment_is_not_detached_with_the_older_ones(pool: Pool) -> None:
    _, volume = await made(pool)
    volumes = await of(pool)
    await volumes.attach([volume], node="n2", epoch=50)
    await volumes.release([volume], node="n2", older_than=50)
    assert pool.volumes.holders(volume)["n2"] == 50
    await volumes.release([volume], node="n2", older_than=51)
    assert "n2" not in pool.volumes.holders(volume)


async def test_a_volume_that_is_gone_is_taken_back_by_nobody(pool: Pool) -> None:
    volumes = await of(pool)
    await volumes.take_back(["vol-9999"], node="n1", epoch=7)
    assert pool.volumes.log == []


async def test_a_source_that_a_newer_owner_has_shut_out_takes_nothing_back(pool: Pool) -> None:
    _, volume = await made(pool)
    volumes = await of(pool)
    await pool.volumes.attach(volume, node="n1", epoch=90)
    await pool.volumes.fence(volume, epoch=90)
    await volumes.take_back([volume], node="n1", epoch=80)
    assert pool.volumes.holders(volume) == {"n1": 90}


# ---------------------------------------------------------------- the configuration


def config_of(volumes: dict[str, Any], pool: Pool) -> Config:
    return Config.model_validate(pool.config().model_dump() | {"volumes": volumes})


EBS = {"driver": "ebs", "region": "eu-west-1", "zone": "eu-west-1a", "instances": {"n1": "i-0123456789abcdef0"}}


async def test_the_configuration_picks_the_driver(tmp_path: Path) -> None:
    config = config_of(EBS | {"endpoint_url": "https://127.0.0.1:1", "ca_file": "/ca.pem"}, Pool(tmp_path))
    assert isinstance(config.volumes, EbsVolumes)
    driver = _volume_driver(config, cast(Any, None))  # which is for the pool's own service
    assert isinstance(driver, EbsVolumeDriver)
    await driver.aclose()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"driver": "efs"}, "volumes"),
        ({"instances": {"n1": "n1"}}, "volumes.ebs.instances.n1"),
        ({"instances": {}}, "volumes.ebs.instances"),
        ({"region": "Not A Region"}, "volumes.ebs.region"),
        ({"zones": "eu-west-1a"}, "volumes.ebs.zones"),
    ],
)
def test_a_wrong_configuration_names_its_field(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config_of(EBS | change, Pool(tmp_path))
    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == field
