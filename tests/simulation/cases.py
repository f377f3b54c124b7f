"""What the simulation once found in the daemons, each as one migration with the faults that show it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.simulation import faults
from tests.simulation.faults import Planned
from tests.simulation.world import World


@dataclass(frozen=True)
class Case:
    faults: tuple[tuple[str, int, Callable[[World], None]], ...]
    """(column, moment in it, what happens)"""

    def planned(self) -> list[Planned]:
        return [Planned(0, act.__name__, column, moment, act) for column, moment, act in self.faults]


def _of(role: str) -> Callable[[World], str]:
    def node(world: World) -> str:
        assert world.track is not None
        return world.track.node(role)

    return node


def shut_down(world: World) -> None:
    assert world.track is not None
    for qemu in world.executing(world.track.evm):
        qemu.press_power_button()


def hang_target(world: World) -> None:
    assert world.track is not None
    for qemu in world.copies(world.track.evm):
        if qemu.node == _of("target")(world):
            qemu.hang()
            world.later(30.0, qemu.wake)


def kill_target_agent(world: World) -> None:
    agent = world.agents[_of("target")(world)]
    agent.kill()
    world.later(1.0, agent.start)


def kill_source_qemu(world: World) -> None:
    faults.kill_qemu(random.Random(0), "source")(world)


def fill_target_disk(world: World) -> None:
    disk = world.disks[_of("target")(world)]
    disk.failing = "ENOSPC"
    world.later(0.5, lambda: setattr(disk, "failing", None))


def stop_store(world: World) -> None:
    world.store.failing = "refuse"
    world.later(1.0, lambda: setattr(world.store, "failing", None))


def refuse_cont(world: World) -> None:
    faults.refuse_cont(random.Random(0), "target")(world)


def ask_abort(world: World) -> None:
    world.wants_abort = True


CASES = {
    "a guest that shuts down as it arrives": Case((("T", 0, shut_down),)),
    "a guest that shuts down while the journal's disk is full": Case((("T", 2, shut_down), ("T", 1, fill_target_disk))),
    "a cont that a hung target loses": Case((("M", 2, hang_target),)),
    "an agent that starts while its QEMU hangs": Case((("P", 1, hang_target), ("D", 2, kill_target_agent))),
    "a source QEMU that dies before DONE": Case((("T", 4, kill_source_qemu),)),
    "a preparation on a full disk": Case((("B", 8, fill_target_disk),)),
    "an agent that dies between its shelf and its journal": Case((("B", 12, kill_target_agent),)),
    "a rescue to a source whose volume has left, in the classic order": Case((("H", 0, refuse_cont),)),
    "an abort while the store is down at the arrival": Case((("H", 0, stop_store), ("H", 1, ask_abort))),
}
