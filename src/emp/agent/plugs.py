"""The volumes of an EVM that runs on this node, changed as the controller orders. The shelf follows the machine.

Each step may be repeated: an agent that dies in between is given the same order again.
"""

from __future__ import annotations

from emp.agent.devices import Devices
from emp.agent.shelf import Entry
from emp.hypervisor.base import Machine
from emp.model.errors import BadInput
from emp.model.evm import EvmSpec
from emp.model.orders import VolumesOrder


async def change_volumes(machine: Machine, entry: Entry, order: VolumesOrder, devices: Devices) -> Entry:
    """Return the entry to be put on the shelf. Raises what ``Machine`` and ``Devices`` raise, and ``BadInput``."""
    _check_same_evm(entry.spec, order.spec)
    known = {grant.volume.id: grant for grant in entry.volumes}
    given = {grant.volume.id: grant for grant in order.grants}
    slots = dict(zip(order.spec.volumes, order.spec.slots, strict=True))
    if missing := slots.keys() - known.keys() - given.keys():
        raise BadInput(f"no grant of {', '.join(sorted(missing))}", field="grants", hint="one for each new volume")
    for volume, slot in zip(entry.spec.volumes, entry.spec.slots, strict=True):
        if volume not in slots:
            await machine.unplug_volume(known[volume].volume.serial, slot, in_use=order.in_use)
    for volume, slot in slots.items():
        if volume not in known:
            await machine.plug_volume(await devices.open(given[volume]), slot)
        elif volume in given:
            # The device of a cloud's volume that has grown shows it a moment later than the cloud.
            was_bytes = known[volume].volume.size_bytes
            await machine.resize_volume(await devices.open(given[volume], was_bytes=was_bytes))
    grants = tuple(given.get(volume) or known[volume] for volume in slots)
    return entry.model_copy(update={"spec": order.spec, "volumes": grants})


def _check_same_evm(old: EvmSpec, new: EvmSpec) -> None:
    kept = set(old.volumes) & set(new.volumes)
    moved = [v for v in kept if _slot_of(old, v) != _slot_of(new, v)]
    volumes = {"volumes": (), "volume_slots": ()}
    if moved or old.model_copy(update=volumes) != new.model_copy(update=volumes):
        raise BadInput("more than the set of volumes would change", field="spec", hint="stop the EVM for that")


def _slot_of(spec: EvmSpec, volume: str) -> int:
    return spec.slots[spec.volumes.index(volume)]
