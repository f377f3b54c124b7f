"""The faults of the matrix (switchover, section 2.6), drawn from the seed: what, in which column, at which moment.

Each heals by itself after a while of its own, or when ``heal`` ends everything at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.simulation.patches import GROUND

if TYPE_CHECKING:
    from tests.simulation.world import World

DAY_S = 86_400.0


@dataclass
class Planned:
    """A fault that strikes after ``countdown`` moments in ``column``."""

    row: int
    name: str
    column: str
    countdown: int
    act: Callable[[World], None]

    def strike(self, world: World) -> None:
        text = f"fault {self.row}.{self.column} {self.name}"
        world.fired.append(text)
        world.note(f"** {text}")
        self.act(world)


# -- the rows; each function returns what happens when its fault strikes


def _restart_after(rng: random.Random) -> float:
    return rng.choice((0.1, 1.0, 1.0, 5.0, 60.0))


def kill_controller(rng: random.Random) -> Callable[[World], None]:
    delay_s = _restart_after(rng)

    def act(world: World) -> None:
        world.controller.kill()
        world.later(delay_s, world.controller.start)

    return act


def kill_agent(rng: random.Random, role: str) -> Callable[[World], None]:
    delay_s, times = _restart_after(rng), rng.choice((1, 1, 1, 3))

    def act(world: World) -> None:
        assert world.track is not None
        agent = world.agents[world.track.node(role)]

        def again(left: int) -> None:
            agent.kill()
            world.later(delay_s, agent.start)
            if left > 1:
                world.later(delay_s + rng.uniform(0, 1.5), lambda: again(left - 1))

        again(times)

    return act


def kill_qemu(rng: random.Random, role: str) -> Callable[[World], None]:
    def act(world: World) -> None:
        assert world.track is not None
        for qemu in world.copies(world.track.evm):
            if qemu.node == world.track.node(role):
                with world.disturbance():
                    qemu.die()

    return act


def kill_volumes(rng: random.Random) -> Callable[[World], None]:
    delay_s, whole = rng.choice((1.0, 5.0, 20.0)), rng.random() < 0.5

    def act(world: World) -> None:
        world.volumes.kill()
        if whole:
            with world.disturbance():
                world.exports.clear()
        world.later(delay_s, world.volumes.start)

    return act


def cut(rng: random.Random, one: str, other: str) -> Callable[[World], None]:
    way = rng.choice(("both", "both", "there", "back"))
    for_s = rng.choice((0.3, 2.0, 5.0, 15.0, 45.0))

    def act(world: World) -> None:
        assert world.track is not None
        hosts = [world.track.node(name) if name in ("source", "target") else name for name in (one, other)]
        ways = {"both": [(0, 1), (1, 0)], "there": [(0, 1)], "back": [(1, 0)]}[way]

        def change(what: Callable[[str, str], None]) -> None:
            with world.disturbance():
                for a, b in ways:
                    what(hosts[a], hosts[b])

        world.note(f"cut {hosts[0]}-{hosts[1]} ({way}) for {for_s:g} s")
        change(world.net.cut)
        world.later(for_s, lambda: change(world.net.heal))

    return act


def isolate(rng: random.Random, role: str) -> Callable[[World], None]:
    for_s = rng.choice((2.0, 10.0, 40.0))

    def act(world: World) -> None:
        assert world.track is not None
        host = world.track.node(role)
        others = [h for h in ("ctl", "vol", *world.agents) if h != host]

        def change(what: Callable[[str, str], None]) -> None:
            with world.disturbance():
                for other in others:
                    what(host, other)
                    what(other, host)

        change(world.net.cut)
        world.later(for_s, lambda: change(world.net.heal))

    return act


def hang_qemu(rng: random.Random, role: str) -> Callable[[World], None]:
    for_s = rng.choice((1.0, 6.0, 30.0))

    def act(world: World) -> None:
        assert world.track is not None
        for qemu in world.copies(world.track.evm):
            if qemu.node == world.track.node(role) and not qemu.hung:
                qemu.hang()
                world.later(for_s, qemu.wake)

    return act


def fail_disk(rng: random.Random, role: str) -> Callable[[World], None]:
    kind, for_s = rng.choice(("EIO", "ENOSPC")), rng.choice((0.005, 0.5, 5.0, 30.0))

    def act(world: World) -> None:
        assert world.track is not None
        disk = world.disks[world.track.node(role)]
        disk.failing = kind
        world.later(for_s, lambda: setattr(disk, "failing", None))

    return act


def fail_store(rng: random.Random) -> Callable[[World], None]:
    kind, for_s = rng.choice(("refuse", "unknown")), rng.choice((0.05, 1.0, 10.0))

    def act(world: World) -> None:
        world.store.failing = kind
        world.later(for_s, lambda: setattr(world.store, "failing", None))

    return act


def slow(rng: random.Random) -> Callable[[World], None]:
    factor, for_s = rng.choice((0.5, 0.05, 0.005)), rng.choice((2.0, 20.0))

    def act(world: World) -> None:
        world.slow = factor
        world.later(for_s, lambda: setattr(world, "slow", 1.0))

    return act


def jump_clock(rng: random.Random) -> Callable[[World], None]:
    by_s = rng.choice((-DAY_S, -3600.0, 0.1, 3600.0, DAY_S))
    host = rng.choice(("ctl", "source", "target", "vol"))

    def act(world: World) -> None:
        assert world.track is not None
        name = world.track.node(host) if host in ("source", "target") else host
        GROUND.skews_s[name] = GROUND.skews_s.get(name, 0.0) + by_s

    return act


def mangle(rng: random.Random) -> Callable[[World], None]:
    kinds = [rng.choice(("lost", "reply lost", "late", "twice")) for _ in range(rng.choice((1, 1, 2, 4)))]

    def act(world: World) -> None:
        world.net.mangling += kinds

    return act


def refuse_cont(rng: random.Random, role: str) -> Callable[[World], None]:
    def act(world: World) -> None:
        assert world.track is not None
        for qemu in world.copies(world.track.evm):
            if qemu.node == world.track.node(role):
                qemu.refuse_cont = 1

    return act


def lose_cont_answer(rng: random.Random) -> Callable[[World], None]:
    def act(world: World) -> None:
        world.fabric.lose_answers = 1

    return act


def lose_power(rng: random.Random, role: str) -> Callable[[World], None]:
    delay_s = rng.choice((2.0, 30.0))

    def act(world: World) -> None:
        assert world.track is not None
        agent = world.agents[world.track.node(role)]
        agent.kill()
        with world.disturbance():
            for qemu in tuple(world.fabric.qemus):
                if qemu.node == agent.host:
                    qemu.die()
        agent.network.ports.clear()
        agent.relays.relays.clear()
        agent.disk.lose_power()
        world.later(delay_s, agent.start)

    return act


def ask_abort(rng: random.Random) -> Callable[[World], None]:
    def act(world: World) -> None:
        world.wants_abort = True

    return act


def guest_acts(rng: random.Random) -> Callable[[World], None]:
    resets = rng.random() < 0.5

    def act(world: World) -> None:
        assert world.track is not None
        for qemu in world.executing(world.track.evm):
            if resets:
                qemu.reset()
            else:
                qemu.press_power_button()

    return act


Row = tuple[int, str, str, Callable[[random.Random], Callable[["World"], None]]]

ROWS: list[Row] = [
    (1, "SIGKILL controller", "BPDHMT", kill_controller),
    (2, "SIGKILL source agent", "BPDHMT", lambda r: kill_agent(r, "source")),
    (3, "SIGKILL target agent", "BPDHMT", lambda r: kill_agent(r, "target")),
    (4, "SIGKILL source QEMU", "BPDHMT", lambda r: kill_qemu(r, "source")),
    (5, "SIGKILL target QEMU", "BPDHMT", lambda r: kill_qemu(r, "target")),
    (6, "SIGKILL volume server", "BPDHMT", kill_volumes),
    (7, "partition C-S", "BPDHMT", lambda r: cut(r, "ctl", "source")),
    (8, "partition C-T", "BPDHMT", lambda r: cut(r, "ctl", "target")),
    (9, "partition S-T", "BPDHMT", lambda r: cut(r, "source", "target")),
    (10, "partition S-V", "BPDHMT", lambda r: cut(r, "source", "vol")),
    (11, "partition T-V", "BPDHMT", lambda r: cut(r, "target", "vol")),
    (12, "partition C-V", "BPDHMT", lambda r: cut(r, "ctl", "vol")),
    (12, "store down", "BPDHMT", fail_store),
    (13, "T cut off from all", "BPDHMT", lambda r: isolate(r, "target")),
    (14, "S cut off from all", "BPDHMT", lambda r: isolate(r, "source")),
    (15, "SIGSTOP source QEMU", "BPDHMT", lambda r: hang_qemu(r, "source")),
    (16, "SIGSTOP target QEMU", "BPDHMT", lambda r: hang_qemu(r, "target")),
    (18, "source journal's disk fails", "BPDHMT", lambda r: fail_disk(r, "source")),
    (18, "target journal's disk fails", "BPDHMT", lambda r: fail_disk(r, "target")),
    (20, "slow link", "BPD", slow),
    (21, "clock jump", "BPDHMT", jump_clock),
    (22, "order lost, late, twice, or applied with its answer lost", "BPDHMT", mangle),
    (23, "cont refused", "BPDHM", lambda r: refuse_cont(r, "target")),
    (23, "cont refused on the way back", "BPDH", lambda r: refuse_cont(r, "source")),
    (23, "cont not answered", "BPDHM", lose_cont_answer),
    (25, "power cut at S", "BPDHMT", lambda r: lose_power(r, "source")),
    (25, "power cut at T", "BPDHMT", lambda r: lose_power(r, "target")),
    (26, "user aborts", "BPDHMT", ask_abort),
    (26, "guest shuts down or reboots", "BT", guest_acts),
]
PAIRED = (1, 2, 3, 5, 6, 9)
DEPTH = {"B": 40, "P": 8, "D": 10, "H": 8, "M": 16, "T": 25}
COLUMNS = "BPDHMT"


def draw(rng: random.Random) -> list[Planned]:
    """Return the faults of one migration: none, one, a pair at adjacent columns, or several anywhere."""
    shape = rng.random()
    if shape < 0.1:
        return []
    if shape < 0.5:
        return [_draw_one(rng, ROWS, None)]
    if shape < 0.8:
        rows = [row for row in ROWS if row[0] in PAIRED]
        first = rng.randrange(len(COLUMNS))
        second = min(len(COLUMNS) - 1, first + rng.choice((0, 1)))
        return [_draw_one(rng, rows, COLUMNS[first]), _draw_one(rng, rows, COLUMNS[second])]
    return [_draw_one(rng, ROWS, None) for _ in range(rng.choice((2, 3)))]


def _draw_one(rng: random.Random, rows: list[Row], column: str | None) -> Planned:
    number, name, columns, make = rng.choice(rows)
    column = column or rng.choice(columns)
    return Planned(number, name, column, rng.randrange(DEPTH[column]), make(rng))


def heal(world: World) -> None:
    """Everything that was disturbed is as it should be; every daemon runs."""
    world.armed.clear()
    world.heals += 1
    with world.disturbance():
        world.net.cuts.clear()
        world.net.heal("ctl", "vol")
    world.net.mangling.clear()
    world.fabric.lose_answers = 0
    world.store.failing = None
    world.slow = 1.0
    for disk in world.disks.values():
        disk.failing = None
    for qemu in tuple(world.fabric.qemus):
        qemu.refuse_cont = 0
        qemu.wake()
    for daemon in world.daemons:
        daemon.start()
