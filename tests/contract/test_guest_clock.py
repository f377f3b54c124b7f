"""The clock of a real guest in a real QEMU: it stands with the guest, and its agent sets it right, never back.

The guest is the image ``micro``, whose agent speaks the protocol of ``qemu-ga`` on the second serial port.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from emp.agent import guest_clock
from emp.hypervisor.base import Machine, NoGuestAgent, RunState, StreamStatus
from emp.hypervisor.qemu import QemuMachine
from emp.lab.images import KERNEL_COMMAND_LINE, Image, ensure_image
from emp.model.clock import GuestClock
from tests.qemu_bench import PATIENCE_S, Bench, Node, bench, console, is_stream, start_stream, until

PAUSE_S = 0.3

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines can be started by root only")


@pytest.fixture(scope="module")
def image() -> Image:
    return ensure_image()


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench(tmp_path) as made:
        yield made


async def launched(nodes: Bench, image: Image, node: Node, *, incoming: bool = False) -> QemuMachine:
    spec = nodes.specs.get("one") or await nodes.spec(memory_bytes=256 << 20)
    plan = nodes.plan(spec, incoming=incoming)
    kernel, initrd = image.kernel, image.initrd
    return await node.hypervisor.launch(
        replace(plan, kernel=kernel, initrd=initrd, kernel_command_line=KERNEL_COMMAND_LINE)
    )


async def looked_at(machine: Machine) -> GuestClock:
    """Return what an agent of a node tells in the end."""
    told: list[GuestClock] = []
    await guest_clock.set_right(machine, lambda: True, told.append, patience_s=PATIENCE_S)
    return told[-1]


async def right(machine: Machine) -> GuestClock:
    clock = await looked_at(machine)
    assert clock.is_right, clock
    return clock


async def booted(machine: Machine) -> None:
    """Return once the guest's clock is right. A guest may boot ahead, and none is set back: a pause takes that away."""
    clock = await looked_at(machine)
    assert clock.found_ms is not None, clock
    if not clock.is_right:
        await paused(machine, clock.found_ms / 1000 + PAUSE_S)
    await right(machine)


async def run(machine: Machine, command: str) -> str:
    """Return what a command prints in the guest's shell."""
    async with asyncio.timeout(PATIENCE_S), console(machine) as shell:
        for each in f"\n{command}; echo en''d\n":
            await shell.say(each)
        shown = ""
        while "end\r" not in shown:
            shown += await shell.read()
        return shown.partition("en''d")[2]


async def paused(machine: Machine, pause_s: float = PAUSE_S) -> None:
    await machine.stop()
    await asyncio.sleep(pause_s)  # is the pause
    await machine.cont()


async def test_a_clock_is_behind_by_the_pause_and_is_set_right(nodes: Bench, image: Image) -> None:
    machine = await launched(nodes, image, nodes.left)
    await booted(machine)
    await paused(machine)
    after = await right(machine)
    assert after.is_set
    assert after.found_ms is not None
    assert -PAUSE_S * 1000 - 400 < after.found_ms < -PAUSE_S * 1000 + 10
    assert after.now_ms is not None
    assert abs(after.now_ms) < 10
    await machine.kill()


async def test_a_clock_moves_with_its_guest(nodes: Bench, image: Image) -> None:
    source = await launched(nodes, image, nodes.left)
    await booted(source)
    target = await launched(nodes, image, nodes.right, incoming=True)
    sent, loaded = source.events(), target.events()
    await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
    await until(sent, is_stream(StreamStatus.PRE_SWITCHOVER))
    await source.continue_stream()
    await until(loaded, is_stream(StreamStatus.COMPLETED))
    async with asyncio.timeout(PATIENCE_S):
        while await target.run_state() is not RunState.PAUSED:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.001)
    await source.kill()
    await target.cont()
    moved = await right(target)
    assert moved.is_set
    assert moved.found_ms is not None
    assert moved.found_ms < -1
    await target.kill()


async def test_without_its_agent_a_guest_stays_behind(nodes: Bench, image: Image) -> None:
    machine = await launched(nodes, image, nodes.left)
    await booted(machine)
    await run(machine, "killall -STOP emp-agent")
    await paused(machine)
    with pytest.raises(NoGuestAgent, match="no agent in the guest answers"):
        await machine.set_clock()
    await run(machine, "killall -CONT emp-agent")  # answers what it was asked meanwhile, to nobody
    clock = await machine.set_clock()
    assert clock.found_ms is not None
    assert clock.found_ms < -PAUSE_S * 1000 + 10
    await machine.kill()


async def test_random_numbers_move_with_a_guest_and_no_device_says_that_it_was_cloned(
    nodes: Bench, image: Image
) -> None:
    """There is one copy of the generator's state at any time: nothing has to be reseeded."""
    machine = await launched(nodes, image, nodes.left)
    await booted(machine)
    assert "absent" in await run(machine, "ls /sys/bus/acpi/devices | grep -i -e QEMUVGID -e VMGENCTR || echo absent")
    devices = json.dumps(await machine._ask("qom-list", {"path": "/machine/peripheral"}))
    assert not re.search("vmgenid|genid", devices)
    await machine.kill()
