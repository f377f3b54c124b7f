"""What every hypervisor driver must do with the volumes of a machine that lives: see ``emp.hypervisor.base.Machine``.

What the guest's own I/O sees of it is in ``tests/lab/test_qemu_volumes.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from emp.hypervisor.base import BlockDevice, Machine, RunState, StreamStatus
from emp.model.errors import BadInput, Conflict, HypervisorError, NotFound
from emp.model.volume import NbdEndpoint
from tests.fakes.bench import FakeBench, fake_bench
from tests.qemu_bench import LOOPBACK, Bench, bench, is_stream, start_stream, until
from tests.qemu_storage import MEBIBYTE, Storage

AnyBench = Bench | FakeBench


class FakeStorage:
    """Volumes that are served unless they are ``gone``."""

    def __init__(self, nodes: FakeBench) -> None:
        self.gone: set[str] = set()
        nodes.fabric.served = self._served  # type: ignore[method-assign]

    def _served(self, node: str, device: BlockDevice) -> bool:
        return isinstance(device.source, NbdEndpoint) and device.source.export not in self.gone

    def export(self, name: str) -> BlockDevice:
        return self._device(name, "volumes")

    def relay(self, name: str) -> BlockDevice:
        return self._device(name, "relay")

    def attached(self, name: str) -> BlockDevice:
        return self._device(name, "device")

    def grown(self, device: BlockDevice) -> BlockDevice:
        return replace(device, size_bytes=2 * device.size_bytes)

    def absent(self, device: BlockDevice) -> BlockDevice:
        self.gone.add("absent")
        return replace(device, source=NbdEndpoint(host=LOOPBACK, port=1, export="absent", tls_hostname="x"))

    @staticmethod
    def _device(name: str, server: str) -> BlockDevice:
        source = NbdEndpoint(host=LOOPBACK, port=1, export=name, tls_hostname=server)
        return BlockDevice(name, name, 16 * MEBIBYTE, source)


@dataclass
class Stage:
    nodes: AnyBench
    storage: Storage | FakeStorage

    async def booted(self, *volumes: BlockDevice) -> Machine:
        return await self.nodes.booted(volumes=volumes)

    async def moved(self, source: Machine, slots: dict[int, BlockDevice], *, runs: bool = True) -> Machine:
        """Migrate; the target is made from a record with these volumes."""
        target = await self.waiting(slots)
        sent, loaded = source.events(), target.events()
        await start_stream(source, target, to=self.nodes.right, source_name=self.nodes.left.identity)
        await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
        await source.continue_stream()
        await until(sent, is_stream(StreamStatus.COMPLETED))
        await until(loaded, is_stream(StreamStatus.COMPLETED))
        async with asyncio.timeout(10):
            while await target.run_state() is not RunState.PAUSED:  # noqa: ASYNC110 - no event for it on both
                await asyncio.sleep(0.01)
        if runs:
            await target.cont()
        await source.kill()
        return target

    async def waiting(self, slots: dict[int, BlockDevice]) -> Machine:
        names = tuple(device.volume for device in slots.values())
        spec = self.nodes.specs["one"].model_copy(update={"volumes": names, "volume_slots": tuple(slots)})
        plan = self.nodes.plan(spec, incoming=True, volumes=tuple(slots.values()))
        return await self.nodes.right.hypervisor.launch(plan)


@pytest.fixture(params=["qemu", "fake"])
async def stage(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    if request.param == "qemu" and os.geteuid() != 0:
        pytest.skip("machines can be started by root only")
    if request.param == "fake":
        async with fake_bench() as fake:
            yield Stage(fake, FakeStorage(fake))
        return
    with contextlib.ExitStack() as after:
        async with bench(tmp_path) as real:
            storage = Storage(real)
            after.enter_context(storage.opened)
            yield Stage(real, storage)


class TestMove:
    async def test_to_each_kind_of_source_and_again(self, stage: Stage) -> None:
        export, relay, device = (of("v") for of in (stage.storage.export, stage.storage.relay, stage.storage.attached))
        machine = await stage.booted(export)
        for source in (relay, relay, device, device, export, device, relay, export):
            await machine.move_volume(source)
        assert await machine.run_state() is RunState.RUNNING
        await machine.kill()

    async def test_of_a_paused_machine(self, stage: Stage) -> None:
        machine = await stage.booted(stage.storage.export("v"))
        await machine.stop()
        await machine.move_volume(stage.storage.relay("v"))
        assert await machine.run_state() is RunState.PAUSED
        await machine.cont()
        await machine.kill()

    async def test_of_a_target_that_has_loaded_and_does_not_run_yet(self, stage: Stage) -> None:
        export = stage.storage.export("v")
        source = await stage.booted(export)
        target = await stage.moved(source, {0: export}, runs=False)
        await target.move_volume(stage.storage.attached("v"))
        assert await target.run_state() is RunState.PAUSED
        await target.cont()
        assert await target.run_state() is RunState.RUNNING
        await target.move_volume(export)
        await target.kill()

    async def test_by_an_agent_that_has_adopted_it(self, stage: Stage) -> None:
        machine = await stage.booted(stage.storage.export("v"))
        await machine.move_volume(stage.storage.relay("v"))
        await machine.close()
        adopted = await stage.nodes.left.hypervisor.adopt(stage.nodes.specs["one"], machine.process)
        device = stage.storage.attached("v")
        await adopted.move_volume(device)
        await adopted.move_volume(device)
        await adopted.kill()

    async def test_a_source_that_is_not_there_leaves_the_old_one_in_use(self, stage: Stage) -> None:
        export = stage.storage.export("v")
        machine = await stage.booted(export)
        for _ in range(2):
            with pytest.raises(HypervisorError):
                await machine.move_volume(stage.storage.absent(export))
        await machine.move_volume(stage.storage.relay("v"))
        await machine.kill()

    async def test_of_a_disk_that_it_has_not_got(self, stage: Stage) -> None:
        machine = await stage.booted(stage.storage.export("v"))
        with pytest.raises(NotFound):
            await machine.move_volume(stage.storage.export("w"))
        await machine.kill()


class TestPlug:
    async def test_the_new_disk_is_known_by_its_slot_on_the_target(self, stage: Stage) -> None:
        one, two = stage.storage.export("v"), stage.storage.attached("w")
        machine = await stage.booted(one)
        await machine.plug_volume(two, 5)
        await machine.plug_volume(two, 5)
        target = await stage.moved(machine, {0: one, 5: two})
        await target.unplug_volume("w", 5)
        await target.unplug_volume("w", 5)
        with pytest.raises(NotFound):
            await target.move_volume(two)
        await target.plug_volume(two, 1)
        await target.kill()

    async def test_a_target_without_the_disk_refuses_the_stream(self, stage: Stage) -> None:
        one, two = stage.storage.export("v"), stage.storage.export("w")
        machine = await stage.booted(one)
        await machine.plug_volume(two, 5)
        target, sent = await stage.waiting({0: one, 4: two}), machine.events()
        await start_stream(machine, target, to=stage.nodes.right, source_name=stage.nodes.left.identity)
        await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
        await machine.continue_stream()
        await until(sent, is_stream(StreamStatus.FAILED))
        async with asyncio.timeout(10):
            while await machine.run_state() is not RunState.RUNNING:  # noqa: ASYNC110 - no event for it on both
                await asyncio.sleep(0.01)
        await machine.kill()
        await target.kill()

    async def test_all_slots_and_none_beyond(self, stage: Stage) -> None:
        machine = await stage.booted()
        device = stage.storage.export("v")
        for slot in range(24):
            await machine.plug_volume(replace(device, volume=f"v{slot}", serial=f"s{slot}"), slot)
        for slot in (-1, 24):
            with pytest.raises(BadInput) as error:
                await machine.plug_volume(replace(device, serial="more"), slot)
            assert error.value.field == "slot"
        await machine.kill()

    async def test_not_where_another_disk_is(self, stage: Stage) -> None:
        machine = await stage.booted(stage.storage.export("v"))
        with pytest.raises(Conflict):
            await machine.plug_volume(stage.storage.export("w"), 0)
        with pytest.raises(Conflict):
            await machine.unplug_volume("w", 0)
        await machine.unplug_volume("v", 0)
        await machine.plug_volume(stage.storage.export("w"), 0)
        await machine.kill()

    async def test_one_that_cannot_be_opened_leaves_nothing(self, stage: Stage) -> None:
        device = stage.storage.export("v")
        machine = await stage.booted()
        with pytest.raises(HypervisorError):
            await machine.plug_volume(stage.storage.absent(device), 3)
        with pytest.raises(NotFound):
            await machine.move_volume(device)
        await machine.plug_volume(device, 3)
        await machine.move_volume(stage.storage.relay("v"))
        await machine.kill()


class TestResize:
    async def test_grows_and_stays_movable(self, stage: Stage) -> None:
        device = stage.storage.export("v")
        machine = await stage.booted(device)
        grown = stage.storage.grown(device)
        await machine.resize_volume(grown)
        await machine.resize_volume(grown)
        with pytest.raises(BadInput) as error:
            await machine.resize_volume(device)
        assert error.value.field == "size_bytes"
        with pytest.raises(NotFound):
            await machine.resize_volume(replace(grown, serial="other"))
        target = await stage.moved(machine, {0: grown})
        await target.kill()


async def test_nothing_of_it_while_a_migration_is_on_its_way(stage: Stage) -> None:
    one, two = stage.storage.export("v"), stage.storage.export("w")
    source = await stage.booted(one)
    target, sent = await stage.waiting({0: one}), source.events()
    await start_stream(source, target, to=stage.nodes.right, source_name=stage.nodes.left.identity)
    await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
    for machine in (source, target):
        for order in (
            machine.move_volume(stage.storage.relay("v")),
            machine.plug_volume(two, 1),
            machine.unplug_volume("v", 0),
            machine.resize_volume(one),
        ):
            with pytest.raises(Conflict):
                await order
    await source.cancel_stream()
    await target.kill()
    await source.plug_volume(two, 1)
    await source.kill()
