"""An agent changes the volumes of an EVM as it is ordered, on a fake machine: what is plugged, what is shelved."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from emp.agent.devices import Devices
from emp.agent.plugs import change_volumes
from emp.agent.shelf import Entry
from emp.model.errors import BadInput, Conflict, HypervisorError
from emp.model.evm import EvmSpec
from emp.model.orders import VolumeGrant, VolumesOrder
from emp.model.volume import Attachment, NbdEndpoint, Volume, VolumeType
from tests.fakes.bench import FakeBench, fake_bench
from tests.fakes.hypervisor import FakeMachine

MEBIBYTE = 1 << 20
DEVICES = Devices(cast("Any", None))  # every attachment here names its endpoint


def grant(name: str, *, epoch: int = 1, size_bytes: int = 16 * MEBIBYTE) -> VolumeGrant:
    endpoint = NbdEndpoint(host="h", port=epoch, export=f"{name}.{epoch}", tls_hostname="v")
    volume = Volume(id=name, type=VolumeType.IO2, size_bytes=size_bytes, serial=name)
    return VolumeGrant(volume=volume, attachment=Attachment(volume=name, node="left", epoch=epoch, endpoint=endpoint))


@pytest.fixture
async def nodes() -> AsyncIterator[FakeBench]:
    async with fake_bench() as made:
        yield made


async def evm(nodes: FakeBench, *names: str) -> tuple[FakeMachine, Entry]:
    grants = tuple(map(grant, names))
    machine = await nodes.booted(volumes=await DEVICES.open_all(grants))
    return machine, Entry(spec=nodes.specs["one"], volumes=grants)


def order(spec: EvmSpec, *grants: VolumeGrant, **how: Any) -> VolumesOrder:
    return VolumesOrder(epoch=1, spec=spec, grants=grants, **how)


def plugged(machine: FakeMachine) -> dict[int, tuple[str, int]]:
    return {slot: (device.volume, device.size_bytes // MEBIBYTE) for slot, device in machine.qemu.disks.items()}


async def test_the_machine_and_the_shelf_have_what_the_record_says(nodes: FakeBench) -> None:
    machine, entry = await evm(nodes, "a", "b")
    spec = entry.spec.without_volume("a").with_volume("c", 7)
    for _ in range(2):  # the first may have been carried out by an agent that has died before it was on the shelf
        after = await change_volumes(machine, entry, order(spec, grant("c")), DEVICES)
        assert plugged(machine) == {1: ("b", 16), 7: ("c", 16)}
    assert after.spec == spec
    assert [each.volume.id for each in after.volumes] == ["b", "c"]
    assert await change_volumes(machine, after, order(spec, grant("c")), DEVICES) == after


async def test_a_bigger_one_is_changed_over_to(nodes: FakeBench) -> None:
    machine, entry = await evm(nodes, "a", "b")
    bigger = grant("b", epoch=2, size_bytes=32 * MEBIBYTE)
    after = await change_volumes(machine, entry, order(entry.spec, bigger), DEVICES)
    assert plugged(machine) == {0: ("a", 16), 1: ("b", 32)}
    assert after.volumes[1] == bigger


async def test_a_volume_without_a_grant_is_refused_before_anything_is_done(nodes: FakeBench) -> None:
    machine, entry = await evm(nodes, "a")
    with pytest.raises(BadInput) as error:
        await change_volumes(machine, entry, order(entry.spec.without_volume("a").with_volume("c", 3)), DEVICES)
    assert error.value.field == "grants"
    assert plugged(machine) == {0: ("a", 16)}


@pytest.mark.parametrize(
    "change", [{"vcpus": 2}, {"volume_slots": (4,)}, {"name": "other"}], ids=["vcpus", "another slot", "name"]
)
async def test_nothing_but_the_set_of_volumes_may_change(nodes: FakeBench, change: dict[str, Any]) -> None:
    machine, entry = await evm(nodes, "a")
    with pytest.raises(BadInput) as error:
        await change_volumes(machine, entry, order(entry.spec.model_copy(update=change)), DEVICES)
    assert error.value.field == "spec"
    assert plugged(machine) == {0: ("a", 16)}


async def test_one_that_cannot_be_opened_changes_nothing(nodes: FakeBench) -> None:
    machine, entry = await evm(nodes, "a")
    nodes.fabric.served = lambda node, device: device.volume != "c"  # type: ignore[method-assign]
    with pytest.raises(HypervisorError):
        await change_volumes(machine, entry, order(entry.spec.with_volume("c", 3), grant("c")), DEVICES)
    assert plugged(machine) == {0: ("a", 16)}


async def test_one_that_the_guest_uses_is_taken_only_if_one_insists(
    nodes: FakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fakes.hypervisor.UNPLUG_TIMEOUT_S", 0.01)
    machine, entry = await evm(nodes, "a")
    assert machine.qemu.guest is not None
    machine.qemu.use_volumes()
    spec = entry.spec.without_volume("a")
    with pytest.raises(Conflict):
        await change_volumes(machine, entry, order(spec), DEVICES)
    assert plugged(machine) == {0: ("a", 16)}
    await change_volumes(machine, entry, order(spec, in_use=True), DEVICES)
    assert plugged(machine) == {}
