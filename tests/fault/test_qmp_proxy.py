"""The QMP proxy between the product's driver and a real QEMU: each thing that it does, and that it can do nothing."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from emp.host.processes import find
from emp.hypervisor.base import MachineEventKind, RunState, StreamStatus
from emp.hypervisor.qemu import QemuHypervisor
from emp.model.errors import OutcomeUnknown
from tests.fault.qmp_faults import QmpFaults, install
from tests.leaks import Machine as Processes
from tests.qemu_bench import Bench, bench, console, is_kind, is_stream, start_stream, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines can be started by root only")

KIND = MachineEventKind


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[QmpFaults]:
    with tempfile.TemporaryDirectory(prefix="emp-qmp-", dir="/var/tmp") as directory:  # where QEMU's user may look
        home = Path(directory)
        home.chmod(0o755)
        monkeypatch.setenv("EMP_QEMU", str(install(home / "bin", rules=home / "faults")))
        yield QmpFaults(home / "faults")


@pytest.fixture
async def nodes(tmp_path: Path, faults: QmpFaults) -> AsyncIterator[Bench]:
    async with bench(tmp_path) as made:
        yield made


async def test_passes_everything_and_ends_with_its_qemu(nodes: Bench, faults: QmpFaults) -> None:
    before = Processes.now().pids
    machine = await nodes.booted()
    await machine.stop()
    assert await machine.run_state() is RunState.PAUSED
    async with console(machine) as guest:
        await machine.cont()
        assert await guest.ask() == "0"
    log = faults.log()
    assert {"control", "cancel"} <= {entry["monitor"] for entry in log}
    assert {entry["evm"] for entry in log} == {"one"}
    assert [(one["kind"], one["name"]) for one in log if one["name"] == "stop"] == [
        ("command", "stop"),
        ("reply", "stop"),
    ]
    assert {entry["monitor"] for entry in log if entry["name"] == "STOP"} == {"control", "cancel"}  # each is told
    serving = [pid for pid in Processes.now().pids - before if "qmp_proxy.py" in command(pid)]
    assert len(serving) == 1
    await machine.kill()
    process = find(serving[0])
    if process is not None:
        async with asyncio.timeout(20):
            await process.ended()


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


async def test_holds_a_command_until_it_is_released(nodes: Bench, faults: QmpFaults) -> None:
    machine = await nodes.booted()
    events = machine.events()
    held = faults.hold("command", "stop", evm="one")
    stopping = asyncio.create_task(machine.stop())
    await asyncio.to_thread(held.wait)
    assert await machine.run_state() is RunState.RUNNING  # other commands overtake it
    held.release()
    await stopping
    assert await machine.run_state() is RunState.PAUSED
    await until(events, is_kind(KIND.STOPPED))
    await machine.kill()


async def test_a_held_command_can_be_dropped_after_all(nodes: Bench, faults: QmpFaults) -> None:
    nodes.node("left", timeout_s=1.0)
    machine = await nodes.booted()
    held = faults.hold("command", "stop")
    stopping = asyncio.create_task(machine.stop())
    await asyncio.to_thread(held.wait)
    held.drop()
    with pytest.raises(OutcomeUnknown):
        await stopping
    assert await machine.run_state() is RunState.RUNNING
    assert faults.messages("command", "stop", "dropped")
    await machine.kill()


async def test_drops_a_reply_to_what_was_done(nodes: Bench, faults: QmpFaults) -> None:
    nodes.node("left", timeout_s=1.0)
    machine = await nodes.booted()
    faults.drop("reply", "stop", times=1)
    with pytest.raises(OutcomeUnknown):
        await machine.stop()
    assert await machine.run_state() is RunState.PAUSED
    await machine.cont()
    await machine.stop()  # the rule is used up
    await machine.kill()


async def test_drops_only_the_events_that_fit(nodes: Bench, faults: QmpFaults) -> None:
    source, target = await nodes.pair()
    faults.drop("event", "MIGRATION", evm="one", fields={"data": {"status": "active"}})
    events = source.events()
    await start_stream(source, target, to=nodes.right, source_name=nodes.left.identity)
    seen = await until(events, is_stream(StreamStatus.PRE_SWITCHOVER))
    assert StreamStatus.ACTIVE not in {event.stream for event in seen}
    assert faults.messages("event", "MIGRATION", "dropped")
    await source.kill()
    await target.kill()


async def test_duplicates_a_command_an_event_and_a_reply(nodes: Bench, faults: QmpFaults) -> None:
    machine = await nodes.booted()
    events = machine.events()
    command = faults.duplicate("command", "cont", times=1)
    reply = faults.duplicate("reply", "stop", skip=1, times=1)
    await machine.stop()
    await machine.cont()
    event = faults.duplicate("event", "STOP", monitor="control")
    await machine.stop()
    event.release()
    await machine.cont()
    kinds = [KIND.STOPPED, KIND.RESUMED, KIND.STOPPED, KIND.STOPPED, KIND.RESUMED]
    seen = [(await until(events, lambda _: True))[0].kind for _ in kinds]
    assert seen == kinds
    assert len(command.entries()) == len(reply.entries()) == len(event.entries()) == 1
    await machine.kill()


async def test_a_rule_may_wait_for_a_qemu_that_is_not_there_yet(nodes: Bench, faults: QmpFaults) -> None:
    held = faults.hold("reply", "query-uuid", evm="one")
    spec = await nodes.spec()
    launching = asyncio.create_task(nodes.left.hypervisor.launch(nodes.plan(spec)))
    await asyncio.to_thread(held.wait)
    assert not launching.done()
    faults.clear()
    await (await launching).kill()


async def test_a_new_client_is_served_when_the_old_one_has_gone(nodes: Bench, faults: QmpFaults) -> None:
    """As after the restart of an agent; the old one's command is still held, and is lost with it."""
    machine = await nodes.booted()
    held = faults.hold("command", "stop")
    stopping = asyncio.create_task(machine.stop())
    await asyncio.to_thread(held.wait)
    stopping.cancel()
    await machine.close()
    again = QemuHypervisor(run_dir=nodes.left.run_dir.parent, credentials_dir=nodes.left.credentials_dir)
    adopted = await again.adopt(nodes.specs["one"], machine.process)
    held.release()
    assert await adopted.run_state() is RunState.RUNNING
    await adopted.kill()
