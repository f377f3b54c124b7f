"""EFS through the REST API: what an EVM is given to mount, who may delete it, and a pool that has none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

from emp.model.efs import EfsFacts, FileSystem, MountTarget, NodePlace, Rule
from emp.model.errors import BadInput, Conflict, NotFound, Refused, Unavailable
from tests.fakes.pool import Pool, a_pool

FS, THEIRS = "fs-0123456789abcdef0", "fs-0123456789abcdef1"


class FakeEfs:
    """File systems in memory, each with a mount target in the zone of n1 and one in that of n2."""

    def __init__(self) -> None:
        self.there = {FS: self._made(FS, ours=True), THEIRS: self._made(THEIRS, ours=False)}
        self.problem: str | None = None

    def _made(self, name: str, *, ours: bool) -> FileSystem:
        targets = tuple(
            MountTarget(
                id=f"fsmt-{zone}", address=f"10.77.251.{number}", zone=zone, subnet=zone, vpc="v", state="available",
                groups=("sg",), rules=(Rule(cidr="10.77.0.0/16"),),
            )
            for number, zone in enumerate(("a", "b"), start=4)
        )  # fmt: skip
        return FileSystem(id=name, state="available", ours=ours, targets=targets)

    async def create(self) -> FileSystem:
        return self.there[FS]

    async def list(self) -> tuple[FileSystem, ...]:
        return tuple(each for each in self.there.values() if each.ours)

    async def describe(self, file_system: str) -> FileSystem:
        if file_system not in self.there:
            raise NotFound(f"no {file_system}", field="efs")
        return self.there[file_system]

    async def delete(self, file_system: str) -> None:
        self.there.pop(file_system, None)

    async def facts(self, file_systems: Iterable[str]) -> EfsFacts:
        places = {node: NodePlace(zone=zone, subnet=zone, vpc="v") for node, zone in (("n1", "a"), ("n2", "b"))}
        found = tuple(self.there[name] for name in file_systems if name in self.there)
        return EfsFacts(file_systems=found, places=places, problem=self.problem)

    async def aclose(self) -> None:
        """There is nothing to close."""


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Pool]:
    async with a_pool(tmp_path, "n1", "n2") as made:
        yield made


@pytest.fixture
def cloud(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> FakeEfs:
    """The pool's EFS, from now on."""
    made = FakeEfs()
    assert pool.controller is not None
    monkeypatch.setattr(pool.controller.services.efs, "_driver", made)
    return made


@pytest.mark.parametrize(("node", "address"), [("n1", "10.77.251.4"), ("n2", "10.77.251.5")])
async def test_an_evm_gets_the_mount_target_of_its_zone(pool: Pool, cloud: FakeEfs, node: str, address: str) -> None:
    evm = await pool.create("web", node=node, efs=[FS, f"{THEIRS}:/data"])
    assert [(m["file_system"], m["path"], m["address"]) for m in evm["spec"]["efs"]] == [
        (FS, "/", address), (THEIRS, "/data", address)
    ]  # fmt: skip


async def test_what_cannot_be_mounted_makes_no_evm(pool: Pool, cloud: FakeEfs) -> None:
    with pytest.raises(BadInput, match="named twice") as twice:
        await pool.create("web", efs=[FS, f"{FS}:/data"])
    assert twice.value.field == "efs[1]"
    with pytest.raises(NotFound, match="no file system fs-0123456789abcdeff"):
        await pool.create("web", efs=["fs-0123456789abcdeff"])
    cloud.there[FS] = cloud.there[FS].model_copy(update={"targets": ()})
    with pytest.raises(Refused, match="has no mount target"):
        await pool.create("web", efs=[FS])
    cloud.problem = "throttled"
    with pytest.raises(Unavailable, match="throttled"):
        await pool.create("web", efs=[FS])
    assert (await pool.get("/v1/evms"))["items"] == []


async def test_a_file_system_that_is_mounted_is_not_deleted(pool: Pool, cloud: FakeEfs) -> None:
    await pool.create("web", efs=[FS])
    with pytest.raises(Conflict, match="mounted by EVM web"):
        await pool.delete(f"/v1/efs/{FS}")
    await pool.delete("/v1/evms/web")
    await pool.delete(f"/v1/efs/{FS}")
    with pytest.raises(NotFound):
        await pool.get(f"/v1/efs/{FS}")


async def test_pre_flight_refuses_a_target_that_does_not_reach_it(pool: Pool, cloud: FakeEfs) -> None:
    await pool.create("web", node="n1", efs=[FS])
    plan = await pool.post("/v1/evms/web/migrations", {"target": "n2", "dry_run": True})
    assert [check["ok"] for check in plan["checks"] if check["name"] == "efs"] == [True]
    cloud.there.pop(FS)
    with pytest.raises(Refused, match=f"{FS} does not exist any more"):
        await pool.post("/v1/evms/web/migrations", {"target": "n2"})


async def test_a_pool_without_efs_says_so(pool: Pool) -> None:
    assert (await pool.get("/v1/efs"))["items"] == []
    for asked in (pool.post("/v1/efs"), pool.create("web", efs=[FS])):
        with pytest.raises(Refused, match="this pool has no EFS"):
            await asked
